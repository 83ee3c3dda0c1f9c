// The content of a model file, checked and named: sizes, matrices, norms. Nothing is copied from
// the mapping.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "file.h"
#include "tokenizer.h"

namespace rkemu {

struct Config {
  bool post_norms;  // Gemma 2
  int vocab_size, hidden_size, intermediate_size, layers, heads, kv_heads, head_dim, sliding_window;
  float rms_norm_eps, rope_theta, query_pre_attn_scalar, attn_softcap, final_softcap;
  int q_size() const { return heads * head_dim; }
  int kv_size() const { return kv_heads * head_dim; }
};

// int8 rows with scales [out, groups].
struct Quantized {
  const int8_t* data;
  const float* scale;
  int groups;
};

// A weight matrix [out, in].
struct Matrix {
  int out = 0, in = 0;
  std::variant<const float*, Quantized> weights;

  // The number of scales per row; 0 for floats.
  int groups() const {
    const auto* quantized = std::get_if<Quantized>(&weights);
    return quantized ? quantized->groups : 0;
  }
};

enum class Part { q, k, v, o, gate, up, down };
constexpr int kParts = 7;
constexpr const char* kPartNames[kParts] = {"attn_q",   "attn_k", "attn_v",  "attn_o",
                                            "ffn_gate", "ffn_up", "ffn_down"};

struct Layer {
  Matrix parts[kParts];
  const float* attn_norm;
  const float* attn_post_norm;
  const float* ffn_norm;
  const float* ffn_post_norm;
  bool sliding;

  const Matrix& operator[](Part part) const { return parts[static_cast<int>(part)]; }
};

// Text that the runtime puts around a prompt from release 1.2.0 on.
struct ChatTemplate {
  std::string system, prefix, suffix;
};

// The facts of a file that a runtime prints and checks before it reads any weights.
struct ModelCard {
  std::string architecture, toolkit_version, target_platform, dtype;
  int max_context, npu_cores;
  ChatTemplate chat_template;
  Config config;
};

ModelCard read_card(const File& file);

// The sizes [out, in] of a layer's matrix.
std::pair<int, int> part_shape(const Config& config, Part part);

class Model {
 public:
  // Failure: a tensor is missing, or does not have the shape that the metadata says. The file must
  // outlive the model.
  Model(const File& file, const Config& config);

  const Config& config() const { return config_; }
  const std::vector<Layer>& layers() const { return layers_; }
  const Matrix& head() const { return head_; }
  const float* output_norm() const { return output_norm_; }
  bool quantized() const { return head_.groups() > 0; }
  // False for a model that was exported without its embedding table.
  bool has_embedding() const { return embedding_.has_value(); }
  // Copies a token's row of the embedding table, without Gemma's factor sqrt(hidden).
  void embed(int32_t token, float* row) const;

 private:
  Config config_;
  std::optional<Matrix> embedding_;
  Matrix head_;
  std::vector<Layer> layers_;
  const float* output_norm_;
};

// A LoRA adapter: for some matrices of some layers, y += factor * b (a x).
class Adapter {
 public:
  struct Pair {
    const float* a = nullptr;  // [rank, in]
    const float* b = nullptr;  // [out, rank]
    int rank = 0;
    float factor = 0;
  };
  // Failure: not an adapter, or one for another model.
  Adapter(const std::string& path, const Model& model, const std::string& base_fingerprint,
          float scale);

  const Pair& at(size_t layer, Part part) const {
    return pairs_[layer * kParts + static_cast<size_t>(part)];
  }

 private:
  File file_;
  std::vector<Pair> pairs_;
};

}  // namespace rkemu

#include "model.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "log.h"

namespace rkemu {

namespace {

constexpr int64_t kMaxWidth = 65536;  // 65536 * 127 * 255 still fits into int32
constexpr int64_t kMaxVocab = 1 << 24;
constexpr int64_t kMaxLayers = 512;
constexpr double kHuge = 1e30;
constexpr int kMaxRank = 4096;
constexpr int64_t kMaxHeadDim = 1024;

std::string in_layer(size_t layer, const char* name) {
  return "blk." + std::to_string(layer) + "." + name;
}

const float* vector(const File& file, const std::string& name, int size) {
  file.verify(name);
  return file.tensor(name, DType::f32, {static_cast<uint64_t>(size)}).as<float>();
}

Matrix matrix(const File& file, const std::string& name, int out, int in) {
  const std::vector<uint64_t> shape{static_cast<uint64_t>(out), static_cast<uint64_t>(in)};
  const std::string scale_name = name + ".scale";
  const auto scale = file.tensors().find(scale_name);
  if (scale == file.tensors().end()) {
    return {out, in, file.tensor(name, DType::f32, shape).as<float>()};
  }
  const auto* data = file.tensor(name, DType::i8, shape).as<int8_t>();
  const auto& scale_shape = scale->second.shape;
  const uint64_t groups = scale_shape.size() == 2 ? scale_shape[1] : 0;
  if (groups < 1 || groups > shape[1] || shape[1] % groups) {
    throw failure("invalid rkllm model! (shape of " + scale_name + ")");
  }
  const auto* scales = file.tensor(scale_name, DType::f32, {shape[0], groups}).as<float>();
  return {out, in, Quantized{data, scales, static_cast<int>(groups)}};
}

Config read_config(const File& file, const std::string& architecture) {
  const auto number = [&](const char* key, int64_t low, int64_t high) {
    return static_cast<int>(file.integer(std::string("model.") + key, low, high));
  };
  const auto real = [&](const char* key, double low, double high) {
    return static_cast<float>(file.real(std::string("model.") + key, low, high));
  };
  Config c{};
  c.post_norms = architecture == "gemma2";
  c.vocab_size = number("vocab_size", 1, kMaxVocab);
  c.hidden_size = number("hidden_size", 1, kMaxWidth);
  c.intermediate_size = number("intermediate_size", 1, kMaxWidth);
  c.layers = number("num_hidden_layers", 1, kMaxLayers);
  c.heads = number("num_attention_heads", 1, 1024);
  c.kv_heads = number("num_key_value_heads", 1, c.heads);
  c.head_dim = number("head_dim", 2, kMaxHeadDim);
  c.sliding_window = number("sliding_window", 0, std::numeric_limits<int>::max());
  c.rms_norm_eps = real("rms_norm_eps", 1e-12, 1.0);
  c.rope_theta = real("rope_theta", 1.0, kHuge);
  c.query_pre_attn_scalar = real("query_pre_attn_scalar", 1e-6, kHuge);
  c.attn_softcap = real("attn_logit_softcapping", 0, kHuge);
  c.final_softcap = real("final_logit_softcapping", 0, kHuge);
  if (c.head_dim % 2 || c.heads % c.kv_heads || c.q_size() > kMaxWidth) {
    throw failure("invalid rkllm model! (heads)");
  }
  return c;
}

}  // namespace

ModelCard read_card(const File& file) {
  ModelCard card;
  if (file.text("general.kind") != "model") throw failure("invalid rkllm model! (an adapter)");
  card.architecture = file.text("general.architecture");
  if (card.architecture != "gemma2" && card.architecture != "gemma") {
    throw failure("unsupported model architecture: " + card.architecture);
  }
  card.toolkit_version = file.text_or("rkllm.toolkit_version", "unknown");
  card.target_platform = file.text("rkllm.target_platform");
  card.dtype = file.text("rkllm.model_dtype");
  card.max_context = static_cast<int>(file.integer("rkllm.max_context", 32, 16384));
  card.npu_cores = static_cast<int>(file.integer("rkllm.npu_core_num", 1, 3));
  card.chat_template.system = file.text_or("rkllm.chat_template.system", "");
  card.chat_template.prefix = file.text_or("rkllm.chat_template.prefix", "");
  card.chat_template.suffix = file.text_or("rkllm.chat_template.suffix", "");
  card.config = read_config(file, card.architecture);
  return card;
}

std::pair<int, int> part_shape(const Config& c, Part part) {
  switch (part) {
    case Part::q:
      return {c.q_size(), c.hidden_size};
    case Part::k:
    case Part::v:
      return {c.kv_size(), c.hidden_size};
    case Part::o:
      return {c.hidden_size, c.q_size()};
    case Part::gate:
    case Part::up:
      return {c.intermediate_size, c.hidden_size};
    case Part::down:
      break;
  }
  return {c.hidden_size, c.intermediate_size};
}

Model::Model(const File& file, const Config& config) : config_(config) {
  const Config& c = config_;
  const auto& types = file.integers("model.layer_types");
  if (types.size() != static_cast<size_t>(c.layers)) {
    throw failure("invalid rkllm model! (layer_types)");
  }
  if (file.has("token_embd")) embedding_ = matrix(file, "token_embd", c.vocab_size, c.hidden_size);
  head_ = file.has("output") || !has_embedding()
              ? matrix(file, "output", c.vocab_size, c.hidden_size)
              : *embedding_;
  for (size_t i = 0; i < types.size(); ++i) {
    Layer layer{};
    for (int p = 0; p < kParts; ++p) {
      const auto [out, in] = part_shape(c, static_cast<Part>(p));
      layer.parts[p] = matrix(file, in_layer(i, kPartNames[p]), out, in);
    }
    layer.attn_norm = vector(file, in_layer(i, "attn_norm"), c.hidden_size);
    layer.ffn_norm = vector(file, in_layer(i, "ffn_norm"), c.hidden_size);
    if (c.post_norms) {
      layer.attn_post_norm = vector(file, in_layer(i, "attn_post_norm"), c.hidden_size);
      layer.ffn_post_norm = vector(file, in_layer(i, "ffn_post_norm"), c.hidden_size);
    }
    layer.sliding = types[i] == 1 && c.sliding_window > 0;
    layers_.push_back(layer);
  }
  output_norm_ = vector(file, "output_norm", c.hidden_size);
}

void Model::embed(int32_t token, float* row) const {
  const int width = embedding_->in;
  const auto start = static_cast<size_t>(token) * static_cast<size_t>(width);
  if (const auto* floats = std::get_if<const float*>(&embedding_->weights)) {
    std::copy_n(*floats + start, width, row);
    return;
  }
  const auto& [data, scale, groups] = std::get<Quantized>(embedding_->weights);
  const float* scales = scale + static_cast<size_t>(token) * static_cast<size_t>(groups);
  for (int i = 0; i < width; ++i) {
    row[i] =
        static_cast<float>(data[start + static_cast<size_t>(i)]) * scales[i / (width / groups)];
  }
}

Adapter::Adapter(const std::string& path, const Model& model, const std::string& base_fingerprint,
                 float scale)
    : file_(File::open(path)) {
  if (file_.text("general.kind") != "adapter") throw failure("failed to load lora: not an adapter");
  const std::string base = file_.text_or("adapter.base_fingerprint", "");
  if (!base.empty() && base != base_fingerprint) throw failure("model arch and LoRA arch mismatch");
  const double alpha = file_.real("adapter.alpha", -kHuge, kHuge);
  const auto layers = model.layers().size();
  pairs_.resize(layers * kParts);
  size_t used = 0;
  for (size_t i = 0; i < layers; ++i) {
    for (int p = 0; p < kParts; ++p) {
      const std::string name = in_layer(i, kPartNames[p]);
      const auto a = file_.tensors().find(name + ".lora_a");
      if (a == file_.tensors().end()) continue;
      const auto [out, in] = part_shape(model.config(), static_cast<Part>(p));
      const uint64_t rank = a->second.shape.empty() ? 0 : a->second.shape[0];
      if (rank < 1 || rank > kMaxRank) throw failure("model arch and LoRA arch mismatch");
      Pair& pair = pairs_[i * kParts + static_cast<size_t>(p)];
      pair.rank = static_cast<int>(rank);
      pair.a =
          file_.tensor(name + ".lora_a", DType::f32, {rank, static_cast<uint64_t>(in)}).as<float>();
      pair.b = file_.tensor(name + ".lora_b", DType::f32, {static_cast<uint64_t>(out), rank})
                   .as<float>();
      pair.factor =
          static_cast<float>(alpha / static_cast<double>(rank) * static_cast<double>(scale));
      used += 2;
    }
  }
  if (used == 0 || used != file_.tensors().size())
    throw failure("model arch and LoRA arch mismatch");
  for (const auto& [name, tensor] : file_.tensors()) file_.verify(name);
}

}  // namespace rkemu

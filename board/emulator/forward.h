// The forward pass of Gemma and Gemma 2 for a batch of rows, each a position of a sequence.
#pragma once

#include <array>
#include <initializer_list>
#include <vector>

#include "cache.h"
#include "kernels.h"
#include "model.h"
#include "threads.h"

namespace rkemu {

struct Row {
  Cache* cache;
  int position;  // already appended to the cache; its keys and values are written here
};

class Forward {
 public:
  // The most rows in one call of run(); callers split longer prompts.
  static constexpr int kChunk = 128;

  Forward(const Model& model, Pool& pool, const Kernels& kernels);

  // Turns embeddings [rows][hidden] (scaled, see scale_embedding) into hidden states after the last
  // norm, in place. At most kChunk rows. `adapter` may be null. The result of a row does not depend
  // on the other rows.
  void run(const std::vector<Row>& rows, float* x, const Adapter* adapter);
  // Logits [rows][vocab], soft-cap applied.
  void logits(const float* hidden, int rows, float* out);
  // Multiplies a row of the embedding table by sqrt(hidden), as Gemma does.
  void scale_embedding(float* row) const;
  // Removes positions [begin, end) from a cache and rotates the keys behind them back.
  void erase(Cache& cache, int begin, int end);

 private:
  // One of several products with the same activations.
  struct Target {
    const Matrix* matrix;
    float* out;  // [rows][matrix->out]
    const Adapter::Pair* lora = nullptr;
    float softcap = 0;
  };

  // Scratch memory of one of the pool's workers.
  struct Workplace {
    alignas(64) std::array<int32_t, kChunk * IntegerProduct::kMaxRows> sums;
    alignas(64) std::array<int8_t, IntegerProduct::kRoom> weights;
    std::vector<float> attention;
  };

  // Rows [first, first + count) of a batch: consecutive positions of one cache.
  struct Tile {
    int first, count;
  };

  // Rows [first, first + count) of a matrix, for one worker.
  struct Block {
    int first, count, worker;
  };

  void multiply(const Rows<const float>& x, std::initializer_list<Target> targets);
  void quantize(const Rows<const float>& x, int groups);
  void multiply_block(const Target& target, const Rows<const float>& x, const Block& block);
  void integer_block(const Quantized& w, const Target& target, int rows, const Block& block);
  void add_lora(const Target& target, const Rows<const float>& x);
  void norm(const float* x, const float* weight, int rows, float* out);
  void attention(const std::vector<Row>& rows, int layer_index, const Layer& layer);
  void attend(const std::vector<Row>& rows, const Tile& tile, int layer_index, const Layer& layer,
              int head, int worker);
  void rotate(float* head, int position, bool back) const;
  void store(Cache& cache, int layer, int position, const float* k, const float* v);
  template <class Job>
  void each(int count, size_t work, const Job& job);
  void prepare_rope(int positions);

  const Model& model_;
  const Config& config_;
  Pool& pool_;
  const Kernels& kernels_;
  float embedding_factor_, attention_scale_;

  std::vector<float> inverse_frequencies_;
  std::vector<float> cos_, sin_;  // [position][head_dim / 2]
  std::vector<float> normed_, q_, k_, v_, mixed_, gate_, up_, y_, lora_low_, lora_high_;
  std::vector<Workplace> workplaces_;  // [worker]
  std::vector<int8_t> quantized_;      // [row][group], each group padded
  std::vector<float> x_scales_;
  std::vector<int32_t> x_sums_;
};

}  // namespace rkemu

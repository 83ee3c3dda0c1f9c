// libFuzzer target: whatever the bytes are, reading them as a model, tokenizing with it, planning its memory and, if
// it is small, computing two tokens with it ends in a result or a Failure. Built with
// FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION, which takes the checksums' part.
#include <cstdint>
#include <cstring>
#include <vector>

#include "cache.h"
#include "file.h"
#include "forward.h"
#include "kernels.h"
#include "log.h"
#include "memory.h"
#include "model.h"
#include "sampler.h"
#include "threads.h"
#include "tokenizer.h"

namespace {

constexpr int kSmall = 64;

void compute(const rkemu::Model& model, const rkemu::Tokenizer& tokenizer) {
  const rkemu::Config& config = model.config();
  if (config.layers > 4 || config.hidden_size > kSmall || config.intermediate_size > kSmall ||
      config.q_size() > kSmall || config.vocab_size > 1024 || !model.has_embedding()) {
    return;
  }
  rkemu::Pool pool(1);
  for (const rkemu::Kernels* kernels : rkemu::available_kernels()) {
    rkemu::Forward forward(model, pool, *kernels);
    rkemu::Cache cache(config, 8, model.quantized());
    std::vector<rkemu::Row> rows;
    std::vector<float> x(2 * static_cast<size_t>(config.hidden_size));
    for (int i = 0; i < 2; ++i) {
      float* row = x.data() + i * config.hidden_size;
      model.embed(i % config.vocab_size, row);
      forward.scale_embedding(row);
      rows.push_back({&cache, i});
      cache.append(i);
    }
    forward.run(rows, x.data(), nullptr);
    std::vector<float> logits(static_cast<size_t>(config.vocab_size));
    forward.logits(x.data(), 1, logits.data());
    forward.erase(cache, 0, 1);
    rkemu::Sampler sampler(1);
    sampler.start({});
    sampler.accept(0);
    const int32_t token = sampler.pick(logits);
    if (token < 0 || token >= config.vocab_size) __builtin_trap();
    tokenizer.decode(token);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // As a mapping: aligned to a page, and nothing readable behind it that the sanitizer does not know of.
  std::vector<uint64_t> aligned((size + 7) / 8);
  if (size) std::memcpy(aligned.data(), data, size);
  try {
    const auto file = rkemu::File::parse(reinterpret_cast<const uint8_t*>(aligned.data()), size);
    const rkemu::ModelCard card = rkemu::read_card(file);
    rkemu::blocks_of(file, card, card.max_context, 16);
    if (file.sizes_only()) return 0;
    const rkemu::Model model(file, card.config);
    rkemu::Tokenizer tokenizer(file, static_cast<size_t>(card.config.vocab_size));
    if (tokenizer.has_tables()) {
      tokenizer.encode("a b<x>\xf0\x9f\x99\x82\xff" + card.chat_template.prefix, true);
      for (int id = 0; id < card.config.vocab_size && id < 1024; ++id) tokenizer.decode(id);
    }
    compute(model, tokenizer);
  } catch (const rkemu::Failure&) {
  }
  return 0;
}

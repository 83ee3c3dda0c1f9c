// libFuzzer target: whatever the bytes are, reading them as an adapter or a prompt cache of the
// model that RKEMU_FUZZ_MODEL names, and computing with what was read, ends in a result or a
// Failure.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "cache.h"
#include "file.h"
#include "forward.h"
#include "kernels.h"
#include "log.h"
#include "model.h"
#include "session.h"
#include "threads.h"

namespace {

constexpr int kContext = 8;
const std::string kFingerprint = "fuzzing!";

struct Base {
  rkemu::File file = rkemu::File::open(std::getenv("RKEMU_FUZZ_MODEL"));
  rkemu::Config config = rkemu::read_card(file).config;
  rkemu::Model model{file, config};
  rkemu::Pool pool{1};
  rkemu::Forward forward{model, pool, rkemu::choose_kernels()};

  void compute(rkemu::Cache& cache, const rkemu::Adapter* adapter) {
    if (cache.length() == kContext) return;
    std::vector<float> x(static_cast<size_t>(config.hidden_size), 1.0f);
    const std::vector<rkemu::Row> rows{{&cache, cache.length()}};
    cache.append(0);
    forward.run(rows, x.data(), adapter);
  }
};

// The bytes as a file that can be opened by name.
std::string file_of(const uint8_t* data, size_t size) {
  static const int fd = ::memfd_create("input", 0);
  if (::ftruncate(fd, 0) != 0 || ::pwrite(fd, data, size, 0) != static_cast<ssize_t>(size)) {
    std::abort();
  }
  return "/proc/self/fd/" + std::to_string(fd);
}

template <class Work>
void may_fail(const Work& work) {
  try {
    work();
  } catch (const rkemu::Failure&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static Base base;
  may_fail([&] {
    const rkemu::Adapter adapter(file_of(data, size), base.model, kFingerprint, 0.5f);
    rkemu::Cache cache(base.config, kContext, base.model.quantized());
    base.compute(cache, &adapter);
  });
  // The checksum is put right, so that what stands before it is read.
  std::vector<uint8_t> whole(data, data + size);
  const uint32_t crc = rkemu::crc32(0, data, size);
  for (int i = 0; i < 4; ++i) whole.push_back(static_cast<uint8_t>(crc >> (8 * i)));
  may_fail([&] {
    rkemu::Cache cache(base.config, kContext, base.model.quantized());
    rkemu::read_prompt_cache(file_of(whole.data(), whole.size()), kFingerprint, cache, base.config);
    base.compute(cache, nullptr);
  });
  return 0;
}

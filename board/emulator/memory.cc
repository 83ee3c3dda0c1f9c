#include "memory.h"

#include <algorithm>
#include <array>
#include <string>

#include "log.h"

namespace rkemu {

namespace {

// A block of weights ends where the next matrix would pass this. Reported blocks of the first
// domain that end in the middle of a model: 4,022,861,824 bytes (ChatGLM3 6B; the next matrix makes
// it 4,078,960,640), 4,059,037,696 (a model of its size), and that of Gemma 2 9B below, which needs
// 4,062,248,960. So the limit lies between the last two numbers.
constexpr uint64_t kWeightBlock = uint64_t{3880} << 20;
// A grouped type needs this much for each group: 8 bytes in a block of scales, as 232,128,512 bytes
// are exactly 8 for each 128 weights of the first 18 layers of Gemma 2 9B and the attention, gate
// and up of the 19th; 4 more, or that block of weights would not end there.
constexpr uint64_t kGroupBytes = 12, kScaleBytes = 8;
// It also needs room for a layer in 16 bits, before the scales: with that, the scales of Gemma 2 9B
// do not fit, as reported, and Gemma 2 2B takes 319 MB more than with w8a8 (the vendor's figures:
// 0.30 GB).
constexpr uint64_t kUnpackedBytes = 2;
// Work space of a handle. Six models of 0.6B share a domain and a seventh does not fit, so a model
// needs 18 to 119 MB besides its weights.
constexpr uint64_t kWorkSpace = uint64_t{32} << 20;
constexpr uint64_t kHalf = 2;  // bytes of a number in the KV cache

struct Matrices {
  uint64_t weights = 0, groups = 0;  // groups: 0 with one scale per row

  uint64_t room() const { return weights + groups * kGroupBytes; }
  Matrices& operator+=(const Matrices& other) {
    weights += other.weights;
    groups += other.groups;
    return *this;
  }
};

Matrices size_of(const File& file, const std::string& name) {
  Matrices size;
  const auto matrix = file.tensors().find(name);
  if (matrix == file.tensors().end()) return size;
  const Tensor& tensor = matrix->second;
  size.weights = tensor.dtype == DType::f32 ? tensor.bytes / sizeof(float) * kHalf : tensor.bytes;
  const auto scale = file.tensors().find(name + ".scale");
  if (scale == file.tensors().end()) return size;
  const uint64_t groups = scale->second.bytes / sizeof(float);
  const bool grouped = !tensor.shape.empty() && groups > tensor.shape[0];
  size.groups = grouped ? groups : 0;
  return size;
}

// Distributes matrices over the domains, in the order of the layers.
class Splitter {
 public:
  void add(const Matrices& matrix) {
    if (parts_.back().weights && parts_.back().room() + matrix.room() > kWeightBlock) {
      parts_.push_back({});
    }
    parts_.back() += matrix;
  }
  int domain() const { return static_cast<int>(parts_.size()) - 1; }
  const std::vector<Matrices>& parts() const { return parts_; }

 private:
  std::vector<Matrices> parts_ = std::vector<Matrices>(1);
};

[[noreturn]] void refuse(const Block& block, int domain, const char* release, bool known_domain) {
  const std::string rknn = "E RKNN: " + time_of_day() + " ";
  const auto size = static_cast<unsigned long long>(block.bytes);
  std::string lines = rknn + "failed to allocate handle, ret: -1, ";
  if (known_domain) {
    lines += "errno: 14, errstr: Bad address\n";
    kernel_log(
        format("RKNPU: failed to allocate IOVA: -12\n"
               "RKNPU fdab0000.npu: RKNPU: rknpu_gem_get_pages: dma map %llu fail",
               size));
  } else {
    lines += format(
        "errno: 12, errstr: Cannot allocate memory\n"
        "can not create weight memory for domain%d\n",
        domain);
  }
  lines += rknn + format("failed to malloc npu memory, size: %llu, flags: 0x2\n", size);
  lines += rknn + "load model file error!";
  if (version_number(release) < version_number("1.2.0")) lines += "\nrknn_init fail! ret=-1";
  throw Failure(lines);
}

}  // namespace

std::vector<Block> blocks_of(const File& file, const ModelCard& card, int max_context,
                             int batches) {
  const Config& c = card.config;
  Splitter splitter;
  std::vector<int> layer_domains;
  uint64_t unpacked = 0;
  for (int layer = 0; layer < c.layers; ++layer) {
    layer_domains.push_back(-1);
    Matrices whole;
    for (const char* part : kPartNames) {
      const Matrices matrix = size_of(file, "blk." + std::to_string(layer) + "." + part);
      splitter.add(matrix);
      whole += matrix;
      if (layer_domains.back() < 0) layer_domains.back() = splitter.domain();
    }
    if (whole.groups) unpacked = std::max(unpacked, whole.weights * kUnpackedBytes);
  }
  splitter.add(size_of(file, file.has("output") ? "output" : "token_embd"));

  std::vector<Block> blocks;
  const auto add = [&](uint64_t bytes, int domain, bool movable) {
    if (bytes) blocks.push_back({bytes, domain, movable});
  };
  const auto& parts = splitter.parts();
  for (size_t i = 0; i < parts.size(); ++i) add(parts[i].weights, static_cast<int>(i), false);
  add(kWorkSpace, 0, false);
  add(unpacked, 0, false);
  for (size_t i = 0; i < parts.size(); ++i) {
    add(parts[i].groups * kScaleBytes, static_cast<int>(i), false);
  }
  const uint64_t cache = static_cast<uint64_t>(max_context) * static_cast<uint64_t>(batches) *
                         static_cast<uint64_t>(c.kv_size()) * 2 * kHalf;
  for (const int domain : layer_domains) add(cache, domain, true);
  return blocks;
}

Reservation::Reservation(const std::vector<Block>& blocks, int base_domain, const Device& device,
                         const char* release) {
  Ledger ledger;
  std::vector<uint64_t> used = ledger.used();
  std::vector<uint64_t> mine(used.size());
  for (const Block& block : blocks) {
    int domain = base_domain + block.domain;
    const auto fits = [&] {
      const auto at = static_cast<size_t>(domain);
      return block.bytes <= device.largest_block() &&
             used[at] + mine[at] + block.bytes <= kDomainBytes;
    };
    while (block.movable && domain + 1 < device.domains() && !fits()) ++domain;
    if (domain < 0 || domain >= device.domains()) refuse(block, domain, release, false);
    if (!fits()) refuse(block, domain, release, true);
    mine[static_cast<size_t>(domain)] += block.bytes;
  }
  entry_ = ledger.add(mine);
}

}  // namespace rkemu

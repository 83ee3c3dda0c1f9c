#include "cache.h"

#include <cstring>

namespace rkemu {

Cache::Cache(const Config& config, int max_context, bool half)
    : layers_(config.layers),
      heads_(config.kv_heads),
      capacity_(max_context),
      half_(half),
      row_bytes_(static_cast<size_t>(config.head_dim) * (half ? sizeof(uint16_t) : sizeof(float))),
      memory_(Mapping::anonymous(static_cast<size_t>(layers_) * static_cast<size_t>(heads_) * 2 *
                                 static_cast<size_t>(capacity_) * row_bytes_)) {
  keys_.reserve(static_cast<size_t>(capacity_));
}

uint8_t* Cache::rows(int layer, int head, int which) {
  const int index = (layer * heads_ + head) * 2 + which;
  return memory_.data() + static_cast<size_t>(index) * static_cast<size_t>(capacity_) * row_bytes_;
}

void Cache::truncate(int length) {
  if (length < this->length()) keys_.resize(static_cast<size_t>(length));
}

void Cache::erase(int begin, int end) {
  const auto behind = static_cast<size_t>(length() - end) * row_bytes_;
  for (int layer = 0; layer < layers_; ++layer) {
    for (int head = 0; head < heads_; ++head) {
      for (uint8_t* base : {keys(layer, head), values(layer, head)}) {
        std::memmove(base + static_cast<size_t>(begin) * row_bytes_,
                     base + static_cast<size_t>(end) * row_bytes_, behind);
      }
    }
  }
  keys_.erase(keys_.begin() + begin, keys_.begin() + end);
}

}  // namespace rkemu

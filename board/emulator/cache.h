// The KV cache of one sequence: keys (rope applied) and values per layer and KV head, and the token
// that each position was computed from.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "file.h"
#include "model.h"

namespace rkemu {

// Identifies the input of a position: a token id, or the hash of an embedding row, below zero.
using Key = int64_t;

class Cache {
 public:
  // Address space is reserved for all of max_context; pages cost nothing until they are written.
  // `half`: half floats instead of floats.
  Cache(const Config& config, int max_context, bool half);

  int length() const { return static_cast<int>(keys_.size()); }
  int capacity() const { return capacity_; }
  bool half() const { return half_; }
  const std::vector<Key>& contents() const { return keys_; }

  // [position][head_dim] of one layer and KV head.
  uint8_t* keys(int layer, int head) { return rows(layer, head, 0); }
  uint8_t* values(int layer, int head) { return rows(layer, head, 1); }
  size_t row_bytes() const { return row_bytes_; }

  // Adds a position. Its keys and values are written by the forward pass.
  void append(Key key) { keys_.push_back(key); }
  void truncate(int length);
  // Removes positions [begin, end). The caller has to rotate the keys behind them back by
  // end - begin positions.
  void erase(int begin, int end);

 private:
  uint8_t* rows(int layer, int head, int which);

  int layers_, heads_, capacity_;
  bool half_;
  size_t row_bytes_;
  Mapping memory_;
  std::vector<Key> keys_;
};

// Writes the first `length` positions to a prompt cache file. Failure: it cannot be written.
void save_prompt_cache(const std::string& path, const std::string& fingerprint, Cache& cache,
                       const Config& config, int length);
// Fills `cache` from a prompt cache file. Failure: no such file, or one of another model.
void read_prompt_cache(const std::string& path, const std::string& fingerprint, Cache& cache,
                       const Config& config);

}  // namespace rkemu

// The NPU's memory: 16 domains of 4 GiB of addresses. Every buffer lies in one of them, and all
// processes share them, so what others hold is kept in a file (ledger.h).
#pragma once

#include <cstdint>
#include <vector>

#include "file.h"
#include "ledger.h"
#include "model.h"
#include "npu.h"

namespace rkemu {

// A buffer of a model.
struct Block {
  uint64_t bytes = 0;
  int domain = 0;        // counted from base_domain_id
  bool movable = false;  // goes to the next domain with room if this one has none
};

// What a model takes, in the order in which it is asked for. docs/emulator.md says which of it is
// fact.
std::vector<Block> blocks_of(const File& file, const ModelCard& card, int max_context, int batches);

// The blocks of one handle, given back when it ends.
class Reservation {
 public:
  Reservation() = default;
  // Failure: a block does not fit, with the log that a runtime of `release` gives.
  Reservation(const std::vector<Block>& blocks, int base_domain, const Device& device,
              const char* release);

 private:
  Ledger::Entry entry_;
};

}  // namespace rkemu

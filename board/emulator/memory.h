// The NPU's memory: 16 domains with 4 GiB of addresses each. Every buffer lies in one of them. All
// processes share them, so what each holds is recorded in a file (ledger.h).
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

// The buffers of a model, in the order of their allocation. docs/emulator.md says which of this is
// fact.
std::vector<Block> blocks_of(const File& file, const ModelCard& card, int max_context, int batches);

// The blocks of one handle, released by the destructor.
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

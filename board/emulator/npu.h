// The device that is not there: its driver and SoC by name, and its memory.
//
// The NPU addresses memory through 16 IOMMU domains of 4 GiB, which all processes share. A model's
// weights are one block in its base domain; what is larger goes on in the next domains. See
// docs/emulator.md for what is known of this and what is assumed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "file.h"

namespace rkemu {

// RKEMU_DRIVER, 0.9.8 by default.
std::string driver_version();
// RKEMU_PLATFORM, RK3588 by default.
std::string platform();
// "1.2.3" or "1.2.1b1" as a number that grows with the release, 0 if it is none.
int version_number(const std::string& version);
// Warns of a driver that is older than 0.9.7, as runtimes do from 1.1.2 on; they go on after it.
void warn_of_old_driver();
// Drivers 0.8 and older run no int8 job of the runtimes of today.
bool driver_runs_nothing();

// Blocks of NPU memory that a model asks for, in this order, each in a domain.
struct Block {
  int domain;
  uint64_t bytes;
};
std::vector<Block> plan_blocks(const File& file, const std::string& dtype, int base_domain);

// Memory that this process holds, until destruction. Other processes see it in a file that they
// share, RKEMU_NPU or rkemu-npu-UID in $XDG_RUNTIME_DIR or /dev/shm; what a process held that is
// gone is free again.
class NpuMemory {
 public:
  NpuMemory() = default;
  // Failure, with the lines of the real thing: no room in a domain, or a block that the driver
  // refuses.
  explicit NpuMemory(const std::vector<Block>& blocks);
  NpuMemory(NpuMemory&& other) noexcept : serial_(other.serial_) { other.serial_ = 0; }
  NpuMemory& operator=(NpuMemory&& other) noexcept;
  NpuMemory(const NpuMemory&) = delete;
  NpuMemory& operator=(const NpuMemory&) = delete;
  ~NpuMemory();

 private:
  uint32_t serial_ = 0;  // of the records in the shared file; 0 = holds nothing
};

}  // namespace rkemu

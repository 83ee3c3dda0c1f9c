// The emulated device: the driver and SoC that it claims to be, and what that driver can do.
#pragma once

#include <cstdint>
#include <string>

namespace rkemu {

struct Device {
  std::string driver;    // RKEMU_DRIVER, 0.9.8 by default
  std::string platform;  // RKEMU_PLATFORM, RK3588 by default

  // Warns of a driver older than 0.9.7, as runtimes do from 1.1.2 on before they continue.
  void warn_if_old() const;
  // False for drivers before 0.9.0: a model loads, and every matrix product of a run fails.
  bool runs_jobs() const;
  // The number of memory domains: one before 0.9.0.
  int domains() const;
  // The largest block that the driver maps, in bytes.
  uint64_t largest_block() const;
};

Device device_from_environment();
// "1.2.3" or "1.2.1b1" as a number that grows with the release; 0 for any other text.
int version_number(const std::string& version);

}  // namespace rkemu

// The device that is not there: which driver and SoC it claims to be.
#pragma once

#include <string>

namespace rkemu {

// RKEMU_DRIVER, 0.9.8 by default.
std::string driver_version();
// RKEMU_PLATFORM, RK3588 by default.
std::string platform();
// "1.2.3" or "1.2.1b1" as a number that grows with the release, 0 if it is none.
int version_number(const std::string& version);
// Warns of a driver that is older than 0.9.7, as runtimes do from 1.1.2 on; they go on after it.
void warn_of_old_driver();

}  // namespace rkemu

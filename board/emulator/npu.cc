#include "npu.h"

#include <cstdio>

#include "log.h"

namespace rkemu {

namespace {

std::string env_or(const char* name, const char* fallback) {
  const std::string value = env_text(name);
  return value.empty() ? fallback : value;
}

}  // namespace

std::string driver_version() {
  return env_or("RKEMU_DRIVER", "0.9.8");
}

std::string platform() {
  return env_or("RKEMU_PLATFORM", "RK3588");
}

int version_number(const std::string& version) {
  unsigned major = 0, minor = 0, patch = 0;
  if (std::sscanf(version.c_str(), "%2u.%2u.%2u", &major, &minor, &patch) != 3) return 0;
  return static_cast<int>(major * 10000 + minor * 100 + patch);
}

void warn_of_old_driver() {
  if (version_number(driver_version()) < version_number("0.9.7")) {
    warn("Warning: Your rknpu driver version is too low, please upgrade to 0.9.7");
  }
}

}  // namespace rkemu

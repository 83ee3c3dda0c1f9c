#include "npu.h"

#include <cstdio>

#include "ledger.h"
#include "log.h"

namespace rkemu {

namespace {

// Drivers before 0.9.7 were reported to refuse blocks from 3,633,315,840 bytes up and to run models
// of 2 GB; the limit lies somewhere between.
constexpr uint64_t kOldLargestBlock = 3'000'000'000;

bool older(const std::string& driver, const char* than) {
  return version_number(driver) < version_number(than);
}

std::string env_or(const char* name, const char* fallback) {
  const std::string value = env_text(name);
  return value.empty() ? fallback : value;
}

}  // namespace

void Device::warn_if_old() const {
  if (older(driver, "0.9.7")) {
    warn("Warning: Your rknpu driver version is too low, please upgrade to 0.9.7");
  }
}

bool Device::runs_jobs() const {
  return !older(driver, "0.9.0");
}

// On 0.8.2 a runtime says "can not create weight memory for domain1" (rknn-llm issue 62).
int Device::domains() const {
  return older(driver, "0.9.0") ? 1 : kMaxDomains;
}

uint64_t Device::largest_block() const {
  return older(driver, "0.9.7") ? kOldLargestBlock : UINT64_MAX;
}

Device device_from_environment() {
  return {env_or("RKEMU_DRIVER", "0.9.8"), env_or("RKEMU_PLATFORM", "RK3588")};
}

int version_number(const std::string& version) {
  unsigned major = 0, minor = 0, patch = 0;
  if (std::sscanf(version.c_str(), "%2u.%2u.%2u", &major, &minor, &patch) != 3) return 0;
  return static_cast<int>(major * 10000 + minor * 100 + patch);
}

}  // namespace rkemu

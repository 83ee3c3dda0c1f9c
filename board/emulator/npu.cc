#include "npu.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <utility>

#include "faults.h"
#include "log.h"

namespace rkemu {

namespace {

constexpr int kDomains = 16;
constexpr uint64_t kDomainBytes = uint64_t{4} << 30;
// The one other block whose size was seen beside the weights, of a 4B model (93241344 bytes).
constexpr uint64_t kWorkBytes = 93241344;
// Drivers before 0.9.7 refused blocks of 4.02 GB and ran smaller models: the limit is somewhere
// below.
constexpr uint64_t kOldDriverBlock = 3500000000;
constexpr size_t kMaxRecords = 4096;

std::string env_or(const char* name, const std::string& fallback) {
  const std::string value = env_text(name);
  return value.empty() ? fallback : value;
}

struct Record {
  int32_t pid;
  uint32_t serial;
  uint64_t started;  // of the process, in clock ticks: a pid alone is used again
  int32_t domain;
  uint32_t unused;
  uint64_t bytes;
};
static_assert(sizeof(Record) == 32, "shared by processes as it stands");

// Clock ticks since boot at which a process started; 0 if there is no such process.
uint64_t start_of(int32_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  if (!std::getline(file, line)) return 0;
  std::istringstream fields(line.substr(std::min(line.rfind(')') + 1, line.size())));
  std::string field;
  for (int i = 3; i <= 22; ++i) fields >> field;
  return std::strtoull(field.c_str(), nullptr, 10);
}

// The shared file, locked while it is open. A lock ends with its process, so a crash blocks nobody.
class Ledger {
 public:
  Ledger() {
    const std::string runtime = env_or("XDG_RUNTIME_DIR", "/dev/shm");
    const std::string path =
        env_or("RKEMU_NPU", runtime + "/rkemu-npu-" + std::to_string(::getuid()));
    fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd_ < 0 || ::flock(fd_, LOCK_EX) != 0) return;
    Record record;
    while (records_.size() < kMaxRecords && ::read(fd_, &record, sizeof record) == sizeof record) {
      if (record.started && record.started == start_of(record.pid)) records_.push_back(record);
    }
  }

  ~Ledger() {
    if (fd_ >= 0) ::close(fd_);
  }
  Ledger(const Ledger&) = delete;
  Ledger& operator=(const Ledger&) = delete;

  uint64_t used(int domain) const {
    uint64_t sum = 0;
    for (const Record& record : records_) {
      if (record.domain == domain) sum += std::min(record.bytes, kDomainBytes);
    }
    return sum;
  }

  void add(const Record& record) { records_.push_back(record); }

  void remove(int32_t pid, uint32_t serial) {
    const auto mine = [&](const Record& r) { return r.pid == pid && r.serial == serial; };
    records_.erase(std::remove_if(records_.begin(), records_.end(), mine), records_.end());
  }

  void save() {
    if (fd_ < 0) return;
    const size_t size = records_.size() * sizeof(Record);
    const bool written = ::pwrite(fd_, records_.data(), size, 0) == static_cast<ssize_t>(size) &&
                         ::ftruncate(fd_, static_cast<off_t>(size)) == 0;
    if (!written) warn("emulator: the record of NPU memory could not be written");
  }

 private:
  int fd_ = -1;
  std::vector<Record> records_;
};

Failure refused(uint64_t bytes, int number, const char* text) {
  const std::string time = time_of_day();
  return Failure(
      "E RKNN: " + time +
      format(" failed to allocate handle, ret: -1, errno: %d, errstr: %s\n", number, text) +
      "E RKNN: " + time + " failed to malloc npu memory, size: " + std::to_string(bytes) +
      ", flags: 0x2\nE RKNN: " + time + " load model file error!");
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

bool driver_runs_nothing() {
  return version_number(driver_version()) < version_number("0.9.0");
}

// Per-channel types are one block for each domain, as their failures name the size of all weights
// (4022272000 for a 4B model). Grouped types fail at a block of the size of a layer's, and are not
// known to go on in another domain.
std::vector<Block> plan_blocks(const File& file, const std::string& dtype, int base_domain) {
  const bool grouped = dtype.find("_G") != std::string::npos;
  const bool tied = !file.has("output");
  std::map<std::string, uint64_t> layers;  // and the head, by "blk.N" or "head"
  for (const auto& [name, tensor] : file.tensors()) {
    const bool head = name.rfind(tied ? "token_embd" : "output", 0) == 0 && name != "output_norm";
    const bool layer = name.rfind("blk.", 0) == 0 && tensor.shape.size() == 2;
    if (head) layers["head"] += tensor.bytes;
    if (layer) layers[name.substr(0, name.find('.', 4))] += tensor.bytes;
  }
  std::vector<Block> blocks;
  uint64_t in_domain = kWorkBytes;
  for (const auto& [name, bytes] : layers) {
    if (grouped || blocks.empty()) {
      blocks.push_back({base_domain, bytes});
    } else if (in_domain + bytes > kDomainBytes) {
      blocks.push_back({blocks.back().domain + 1, bytes});
      in_domain = 0;
    } else {
      blocks.back().bytes += bytes;
    }
    in_domain += bytes;
  }
  blocks.push_back({base_domain, kWorkBytes});
  return blocks;
}

NpuMemory::NpuMemory(const std::vector<Block>& blocks) {
  static std::atomic<uint32_t> serials{0};
  const bool old_driver = version_number(driver_version()) < version_number("0.9.7");
  const int32_t pid = ::getpid();
  const uint64_t started = start_of(pid);
  const uint32_t serial = ++serials;
  Ledger ledger;
  for (const Block& block : blocks) {
    if (block.domain < 0 || block.domain >= kDomains)
      throw refused(block.bytes, 22, "Invalid argument");
    const uint64_t free = kDomainBytes - std::min(ledger.used(block.domain), kDomainBytes);
    if (block.bytes > free || (old_driver && block.bytes > kOldDriverBlock)) {
      throw refused(block.bytes, 14, "Bad address");
    }
    ledger.add({pid, serial, started, block.domain, 0, block.bytes});
  }
  ledger.save();
  serial_ = serial;
}

NpuMemory& NpuMemory::operator=(NpuMemory&& other) noexcept {
  std::swap(serial_, other.serial_);
  return *this;
}

NpuMemory::~NpuMemory() {
  if (!serial_) return;
  try {
    Ledger ledger;
    ledger.remove(::getpid(), serial_);
    ledger.save();
  } catch (const std::exception&) {
    // Out of memory: the record goes with the process.
  }
}

}  // namespace rkemu

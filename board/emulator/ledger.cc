#include "ledger.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <memory>

#include "log.h"

namespace rkemu {

namespace {

constexpr const char* kTitle = "rkemu-npu 1\n";
constexpr const char* kEnd = "end\n";
constexpr off_t kMostBytes = 1 << 20;

std::string state_file() {
  const std::string chosen = env_text("RKEMU_NPU_STATE");
  if (!chosen.empty()) return chosen;
  const std::string runtime = env_text("XDG_RUNTIME_DIR");
  if (!runtime.empty()) return runtime + "/rkemu-npu";
  const char* folder = ::access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
  return format("%s/rkemu-npu-%u", folder, static_cast<unsigned>(::geteuid()));
}

// When a process began, in ticks since the boot; 0 if there is no such process.
unsigned long long start_of(pid_t pid) {
  const std::string path = format("/proc/%d/stat", static_cast<int>(pid));
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "r"),
                                                             std::fclose);
  char text[1024] = {};
  if (!file || !std::fread(text, 1, sizeof text - 1, file.get())) return 0;
  const char* at = std::strrchr(text, ')');  // the name before it may contain anything
  unsigned long long start = 0;
  const char* form =
      ") %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu";
  return at && std::sscanf(at, form, &start) == 1 ? start : 0;
}

// Opens and locks a regular file of this user; -1 with errno if that fails.
int open_locked(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
  if (fd < 0) return -1;
  struct stat status {};
  int locked = -1;
  if (::fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_uid == ::geteuid()) {
    while ((locked = ::flock(fd, LOCK_EX)) != 0 && errno == EINTR) {
    }
  } else {
    errno = EACCES;
  }
  if (locked == 0) return fd;
  const int reason = errno;
  ::close(fd);
  errno = reason;
  return -1;
}

}  // namespace

Ledger::Ledger() : Ledger(state_file()) {}

Ledger::Ledger(const std::string& path) : path_(path), fd_(open_locked(path)) {
  if (fd_ >= 0) {
    read();
  } else {
    warn("emulator: what other programs hold of the NPU's memory is not known: " + path + ": " +
         std::strerror(errno));
  }
}

Ledger::~Ledger() {
  if (fd_ >= 0) ::close(fd_);
}

void Ledger::read() {
  struct stat status {};
  if (::fstat(fd_, &status) != 0) return;
  std::string text(static_cast<size_t>(std::min(status.st_size, kMostBytes)), '\0');
  const ssize_t got = ::pread(fd_, text.data(), text.size(), 0);
  text.resize(static_cast<size_t>(std::max<ssize_t>(got, 0)));
  if (text.rfind(kTitle, 0) != 0) return;
  size_t at = std::strlen(kTitle);
  while (at < text.size()) {
    const size_t end = std::min(text.find('\n', at), text.size());
    const std::string line = text.substr(at, end - at);
    at = end + 1;
    Record r{};
    int pid = 0;
    if (std::sscanf(line.c_str(), "%d %llu %llu %d %llu", &pid, &r.started, &r.id, &r.domain,
                    &r.bytes) != 5) {
      break;  // the end, or the rest of a longer list
    }
    r.pid = pid;
    const bool sound = r.domain >= 0 && r.domain < kMaxDomains && r.bytes <= kDomainBytes;
    if (sound && r.started && start_of(r.pid) == r.started) records_.push_back(r);
  }
}

// With a single write, so that a process that is killed here leaves the old list or the new one.
void Ledger::write() {
  std::string text = kTitle;
  for (const Record& r : records_) {
    text += format("%d %llu %llu %d %llu\n", static_cast<int>(r.pid), r.started, r.id, r.domain,
                   r.bytes);
  }
  text += kEnd;
  if (fd_ < 0 || ::pwrite(fd_, text.data(), text.size(), 0) != static_cast<ssize_t>(text.size()) ||
      ::ftruncate(fd_, static_cast<off_t>(text.size())) != 0) {
    warn("emulator: the list of the NPU's memory cannot be written");
  }
}

std::vector<uint64_t> Ledger::used() const {
  std::vector<uint64_t> bytes(kMaxDomains);
  for (const Record& r : records_) bytes[static_cast<size_t>(r.domain)] += r.bytes;
  return bytes;
}

Ledger::Entry Ledger::add(const std::vector<uint64_t>& bytes) {
  if (fd_ < 0) return Entry();
  uint64_t id = 1;
  const pid_t pid = ::getpid();
  for (const Record& r : records_) {
    if (r.pid == pid) id = std::max<uint64_t>(id, r.id + 1);
  }
  for (size_t domain = 0; domain < bytes.size(); ++domain) {
    if (bytes[domain]) {
      records_.push_back({pid, start_of(pid), id, static_cast<int>(domain), bytes[domain]});
    }
  }
  write();
  return Entry(path_, id);
}

Ledger::Entry::~Entry() {
  if (!id_) return;
  Ledger ledger(path_);
  const pid_t pid = ::getpid();
  auto& records = ledger.records_;
  records.erase(std::remove_if(records.begin(), records.end(),
                               [&](const Record& r) { return r.pid == pid && r.id == id_; }),
                records.end());
  if (ledger.fd_ >= 0) ledger.write();
}

}  // namespace rkemu

// Who holds how much of each domain of the NPU's memory: a file that all emulators of a user share,
// RKEMU_NPU_STATE, or rkemu-npu in XDG_RUNTIME_DIR, or one in /dev/shm or /tmp. What a process that
// has ended left there does not count.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace rkemu {

// rknpu_drv.h of the drivers 0.9.6 and 0.9.8.
constexpr int kMaxDomains = 16;
constexpr uint64_t kDomainBytes = uint64_t{1} << 32;

// The file, locked against other processes and threads while the object lives. Without a file that
// can be used each handle is alone on the NPU, and a line says so.
class Ledger {
 public:
  // Bytes that a handle holds, taken out of the file at the end.
  class Entry {
   public:
    Entry() = default;
    Entry(Entry&& other) noexcept
        : path_(std::move(other.path_)), id_(std::exchange(other.id_, 0)) {}
    Entry& operator=(Entry&& other) noexcept {
      std::swap(path_, other.path_);
      std::swap(id_, other.id_);
      return *this;
    }
    Entry(const Entry&) = delete;
    Entry& operator=(const Entry&) = delete;
    ~Entry();

   private:
    friend class Ledger;
    Entry(std::string path, uint64_t id) : path_(std::move(path)), id_(id) {}
    std::string path_;
    uint64_t id_ = 0;
  };

  Ledger();
  explicit Ledger(const std::string& path);
  ~Ledger();
  Ledger(const Ledger&) = delete;
  Ledger& operator=(const Ledger&) = delete;

  // Bytes in use, by domain.
  std::vector<uint64_t> used() const;
  Entry add(const std::vector<uint64_t>& bytes);

 private:
  struct Record {
    pid_t pid;
    // Of the process, so that a number that is used again is not taken for it.
    unsigned long long started;
    unsigned long long id;
    int domain;
    unsigned long long bytes;
  };
  void read();
  void write();

  std::string path_;
  int fd_;
  std::vector<Record> records_;
};

}  // namespace rkemu

// The record of who holds how much of each domain of the NPU's memory: a file that all emulators of
// a user share, RKEMU_NPU_STATE, or rkemu-npu in XDG_RUNTIME_DIR, or one in /dev/shm or /tmp.
// Entries of processes that have ended do not count.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace rkemu {

// From rknpu_drv.h of the drivers 0.9.6 and 0.9.8.
constexpr int kMaxDomains = 16;
constexpr uint64_t kDomainBytes = uint64_t{1} << 32;

// The file, locked against other processes and threads while the object lives. If no file can be
// used, each handle acts as if alone on the NPU, and a line says so.
class Ledger {
 public:
  // The bytes that a handle holds; the destructor removes them from the file.
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
    // When the process began, so that another one with the same id is not taken for it.
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

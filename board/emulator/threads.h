// A small pool of threads that belongs to one model handle. The caller's thread takes part in the
// work.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace rkemu {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls job(i, worker) for i in [0, count), each once, in any order; returns when all are done.
  // `worker` is below size() and differs between jobs that run at the same time. Jobs must not
  // throw.
  template <class Job>
  void run(int count, const Job& job) {
    run(
        count, [](const void* f, int i, int worker) { (*static_cast<const Job*>(f))(i, worker); },
        &job);
  }

 private:
  using Call = void (*)(const void* context, int index, int worker);
  void run(int count, Call call, const void* context);
  void work(int worker);
  void serve(int worker);

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable idle_;
  std::atomic<unsigned> generation_{0};
  std::atomic<int> busy_{0};
  std::atomic<int> next_{0};
  std::atomic<bool> stop_{false};
  int count_ = 0;
  Call call_ = nullptr;
  const void* context_ = nullptr;
  std::vector<std::thread> workers_;
};

}  // namespace rkemu

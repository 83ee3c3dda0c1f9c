#include "threads.h"

#include <pthread.h>
#include <signal.h>

#include <system_error>

namespace rkemu {

namespace {

// Keeps signals away from our threads: Ctrl-C must reach the client's thread that waits for it.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

// Iterations to wait actively before sleeping, about as long as a small matrix takes: waking a
// thread costs more than that.
constexpr int kSpins = 4000;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}
}  // namespace

Pool::Pool(int threads) {
  const BlockedSignals blocked;
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
  } catch (const std::system_error&) {
    // The process may not have more threads: those that there are do the work.
  }
}

Pool::~Pool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::work(int worker) {
  for (int i = next_++; i < count_; i = next_++) call_(context_, i, worker);
}

void Pool::run(int count, Call call, const void* context) {
  if (workers_.empty() || count <= 1) {
    for (int i = 0; i < count; ++i) call(context, i, 0);
    return;
  }
  {
    std::lock_guard lock(mutex_);
    count_ = count;
    call_ = call;
    context_ = context;
    next_ = 0;
    busy_ = static_cast<int>(workers_.size());
    ++generation_;
  }
  wake_.notify_all();
  work(0);
  for (int spin = 0; busy_ && spin < kSpins; ++spin) relax();
  if (busy_) {
    std::unique_lock lock(mutex_);
    idle_.wait(lock, [this] { return busy_ == 0; });
  }
}

void Pool::serve(int worker) {
  unsigned seen = 0;
  while (true) {
    for (int spin = 0; generation_ == seen && !stop_ && spin < kSpins; ++spin) relax();
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return generation_ != seen || stop_; });
      if (stop_) return;
      seen = generation_;
    }
    work(worker);
    std::lock_guard lock(mutex_);
    if (--busy_ == 0) idle_.notify_one();
  }
}

}  // namespace rkemu

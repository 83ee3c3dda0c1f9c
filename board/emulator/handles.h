// What an LLMHandle stands for, and which thread may use it when: the part of the API that is the
// same in every layout.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "session.h"

namespace rkemu {

// Calls the client with the userdata of the run and one result per batch. True asks for a pause.
using Deliver = std::function<bool(void* userdata, const std::vector<Result>&, State)>;

// The state that rkllm_abort and rkllm_is_running access. Clients call these in signal handlers,
// where no lock may be taken: the interrupted thread may hold it.
struct Control {
  std::atomic<bool> open{false};  // true until rkllm_destroy
  std::atomic<bool> running{false};
  std::atomic<bool> abort{false};
};
static_assert(std::atomic<bool>::is_always_lock_free && std::atomic<void*>::is_always_lock_free);

class Handle {
 public:
  Handle(Control& control, std::unique_ptr<Session> session, Deliver deliver, void* userdata);
  ~Handle();
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  // Only between begin() and end().
  Session& session() { return *session_; }
  // True once the current run has to end.
  const std::atomic<bool>& aborted() const { return control_.abort; }
  // For runs that do not bring userdata of their own.
  void* userdata() const { return userdata_; }
  const Deliver& deliver() const { return deliver_; }

  // Marks the handle as running; false if it is running already, or closed. Waits for a run that is
  // reporting its end in another thread, as clients start the next run as soon as they hear of it.
  // With Guesses::calls_wait, it waits for any run in another thread.
  bool begin();
  // To be called when the run is about to report its end.
  void ending();
  void end();
  // Calls `work`, which has to call end(), in a thread of the handle. Only after begin().
  void start(std::function<void()> work);
  // Whether the caller is in a callback of this handle's run.
  bool mine();
  // Ends a run and waits for it. If the running thread itself calls this, the run ends after the
  // callback that it is in.
  void close();

 private:
  Control& control_;
  std::unique_ptr<Session> session_;
  Deliver deliver_;
  void* userdata_;
  std::mutex mutex_;
  std::condition_variable idle_;
  bool ending_ = false;
  bool closed_ = false;
  std::thread::id runner_;
  std::thread worker_;
};

// The only global. Clients that destroy a handle twice, or use it afterwards, must get an error:
// handles are numbers that are never given out again. The registry itself is never destroyed, as a
// thread may outlive main().
class Registry {
 public:
  static Registry& get();

  // Failure: this process has had too many handles.
  void* add(std::unique_ptr<Session> session, Deliver deliver, void* userdata);
  std::shared_ptr<Handle> find(void* key);  // nullptr if unknown
  std::shared_ptr<Handle> take(void* key);
  bool empty();

  // Takes no lock, allocates nothing, and returns memory that is never freed; nullptr if unknown.
  static Control* control(void* key);

 private:
  static constexpr size_t kChunk = 256, kChunks = 4096;
  using Chunk = std::array<Control, kChunk>;

  Control& next_control();

  static std::array<std::atomic<Chunk*>, kChunks> controls_;
  std::mutex mutex_;
  std::unordered_map<void*, std::shared_ptr<Handle>> handles_;
  size_t made_ = 0;
};

}  // namespace rkemu

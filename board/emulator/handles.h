// What an LLMHandle stands for, and who may use it when: the part of the API that no layout
// changes.
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

// Calls the client: userdata of the run, one result per batch. True asks for a pause.
using Deliver = std::function<bool(void* userdata, const std::vector<Result>&, State)>;

// What rkllm_abort and rkllm_is_running touch. Clients call these in signal handlers, where no lock
// may be taken: the thread that was interrupted may hold it.
struct Control {
  std::atomic<bool> open{false};  // until rkllm_destroy
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

  // To be used between begin() and end().
  Session& session() { return *session_; }
  // Set to end the run that is going on.
  const std::atomic<bool>& aborted() const { return control_.abort; }
  // What a run without userdata of its own gets.
  void* userdata() const { return userdata_; }
  const Deliver& deliver() const { return deliver_; }

  // Marks the handle as running; false if it is already, or closed. A run that reports its end in
  // another thread is waited for: clients start the next one as soon as they hear of it.
  // Guesses::calls_wait has every run of another thread waited for.
  bool begin();
  // The run is about to report its end.
  void ending();
  void end();
  // Calls `work`, which calls end(), in a thread of the handle. begin() was called.
  void start(std::function<void()> work);
  // True in a callback of this handle's run.
  bool mine();
  // Ends a run and waits for it. When the running thread itself asks, the run ends with its
  // callback.
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

// The only global. Clients destroy twice, or use a handle after that, and must get an error:
// handles are numbers that are never given out again. It is never destroyed itself, as a thread may
// outlive main().
class Registry {
 public:
  static Registry& get();

  // Failure: this process has had too many handles.
  void* add(std::unique_ptr<Session> session, Deliver deliver, void* userdata);
  std::shared_ptr<Handle> find(void* key);  // nullptr if unknown
  std::shared_ptr<Handle> take(void* key);
  bool empty();

  // Takes no lock and allocates nothing, and what it returns is never freed; nullptr if unknown.
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

// What an LLMHandle stands for, and who may use it when: the part of the API that no layout
// changes.
#pragma once

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

class Handle {
 public:
  Handle(std::unique_ptr<Session> session, Deliver deliver, void* userdata);
  ~Handle();
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  // To be used between begin() and end(), except for abort().
  Session& session() { return *session_; }
  // What a run without userdata of its own gets.
  void* userdata() const { return userdata_; }
  const Deliver& deliver() const { return deliver_; }

  // Marks the handle as running; false if it is already, or closed. A run that reports its end in
  // another thread is waited for: clients start the next one as soon as they hear of it.
  bool begin();
  // The run is about to report its end.
  void ending();
  void end();
  // Calls `work`, which calls end(), in a thread of the handle. begin() was called.
  void start(std::function<void()> work);
  bool running();
  // True in a callback of this handle's run.
  bool mine();
  // Ends a run and waits for it. When the running thread itself asks, the run ends with its
  // callback.
  void close();

 private:
  std::unique_ptr<Session> session_;
  Deliver deliver_;
  void* userdata_;
  std::mutex mutex_;
  std::condition_variable idle_;
  bool running_ = false;
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

  void* add(std::shared_ptr<Handle> handle);
  std::shared_ptr<Handle> find(void* key);  // nullptr if unknown
  std::shared_ptr<Handle> take(void* key);
  bool empty();

 private:
  std::mutex mutex_;
  std::unordered_map<void*, std::shared_ptr<Handle>> handles_;
  uintptr_t next_ = 0x52000000;
};

}  // namespace rkemu

#include "handles.h"

#include <chrono>

namespace rkemu {

namespace {

// A client's last callback may itself wait for the thread that starts the next run.
constexpr auto kLastCallback = std::chrono::seconds(1);

}  // namespace

Handle::Handle(std::unique_ptr<Session> session, Deliver deliver, void* userdata)
    : session_(std::move(session)), deliver_(std::move(deliver)), userdata_(userdata) {}

Handle::~Handle() {
  if (worker_.joinable()) worker_.detach();  // only when the worker destroyed its own handle
}

bool Handle::begin() {
  std::unique_lock lock(mutex_);
  if (running_ && ending_ && runner_ != std::this_thread::get_id()) {
    idle_.wait_for(lock, kLastCallback, [this] { return !running_; });
  }
  if (running_ || closed_) return false;
  running_ = true;
  runner_ = std::this_thread::get_id();
  session_->rearm();
  return true;
}

void Handle::ending() {
  const std::lock_guard lock(mutex_);
  ending_ = true;
}

void Handle::end() {
  const std::lock_guard lock(mutex_);
  running_ = false;
  ending_ = false;
  runner_ = {};
  idle_.notify_all();
}

void Handle::start(std::function<void()> work) {
  if (worker_.joinable()) worker_.join();
  const std::lock_guard lock(mutex_);
  worker_ = std::thread([this, work = std::move(work)] {
    {
      const std::lock_guard started(mutex_);
      runner_ = std::this_thread::get_id();
    }
    work();
  });
}

bool Handle::running() {
  const std::lock_guard lock(mutex_);
  return running_;
}

bool Handle::mine() {
  const std::lock_guard lock(mutex_);
  return running_ && runner_ == std::this_thread::get_id();
}

void Handle::close() {
  session_->abort();
  std::unique_lock lock(mutex_);
  closed_ = true;
  if (running_ && runner_ == std::this_thread::get_id()) return;
  idle_.wait(lock, [this] { return !running_; });
  lock.unlock();
  if (worker_.joinable()) worker_.join();
}

Registry& Registry::get() {
  static Registry& registry = *new Registry;
  return registry;
}

void* Registry::add(std::shared_ptr<Handle> handle) {
  const std::lock_guard lock(mutex_);
  next_ += 16;
  void* key = reinterpret_cast<void*>(next_);
  handles_.emplace(key, std::move(handle));
  return key;
}

std::shared_ptr<Handle> Registry::find(void* key) {
  const std::lock_guard lock(mutex_);
  const auto found = handles_.find(key);
  return found == handles_.end() ? nullptr : found->second;
}

std::shared_ptr<Handle> Registry::take(void* key) {
  const std::lock_guard lock(mutex_);
  const auto found = handles_.find(key);
  if (found == handles_.end()) return nullptr;
  auto handle = std::move(found->second);
  handles_.erase(found);
  return handle;
}

bool Registry::empty() {
  const std::lock_guard lock(mutex_);
  return handles_.empty();
}

}  // namespace rkemu

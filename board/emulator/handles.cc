#include "handles.h"

namespace rkemu {

Handle::Handle(std::unique_ptr<Session> session, Deliver deliver, void* userdata)
    : session_(std::move(session)), deliver_(std::move(deliver)), userdata_(userdata) {}

Handle::~Handle() {
  if (worker_.joinable()) worker_.detach();  // only when the worker destroyed its own handle
}

bool Handle::begin() {
  const std::lock_guard lock(mutex_);
  if (running_ || closed_) return false;
  running_ = true;
  runner_ = std::this_thread::get_id();
  session_->rearm();
  return true;
}

void Handle::end() {
  const std::lock_guard lock(mutex_);
  running_ = false;
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

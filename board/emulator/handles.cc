#include "handles.h"

#include <chrono>

#include "log.h"

namespace rkemu {

namespace {

// Longest wait for a last callback, which may itself wait for the thread that starts the next run.
constexpr auto kLastCallback = std::chrono::seconds(1);

// Handles are numbers; a value that a client passes by mistake is unlikely to be one of them.
constexpr uintptr_t kFirstKey = 0x52000010, kKeyStep = 16;

void* key_of(size_t number) {
  return reinterpret_cast<void*>(kFirstKey + number * kKeyStep);
}

}  // namespace

Handle::Handle(Control& control, std::unique_ptr<Session> session, Deliver deliver, void* userdata)
    : control_(control),
      session_(std::move(session)),
      deliver_(std::move(deliver)),
      userdata_(userdata) {}

Handle::~Handle() {
  if (worker_.joinable()) worker_.detach();  // only when the worker destroyed its own handle
}

bool Handle::begin() {
  std::unique_lock lock(mutex_);
  const auto idle = [this] { return !control_.running; };
  if (control_.running && runner_ != std::this_thread::get_id()) {
    if (session_->guesses().calls_wait) {
      idle_.wait(lock, idle);
    } else if (ending_) {
      idle_.wait_for(lock, kLastCallback, idle);
    }
  }
  if (control_.running || closed_) return false;
  runner_ = std::this_thread::get_id();
  control_.abort = false;  // before the run can be seen by other threads
  control_.running = true;
  return true;
}

void Handle::ending() {
  const std::lock_guard lock(mutex_);
  ending_ = true;
}

void Handle::end() {
  const std::lock_guard lock(mutex_);
  control_.running = false;
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

bool Handle::mine() {
  const std::lock_guard lock(mutex_);
  return control_.running && runner_ == std::this_thread::get_id();
}

void Handle::close() {
  std::unique_lock lock(mutex_);
  closed_ = true;  // no run begins from here on
  control_.abort = true;
  if (control_.running && runner_ == std::this_thread::get_id()) return;
  idle_.wait(lock, [this] { return !control_.running; });
  lock.unlock();
  if (worker_.joinable()) worker_.join();
}

Registry& Registry::get() {
  static Registry& registry = *new Registry;
  return registry;
}

std::array<std::atomic<Registry::Chunk*>, Registry::kChunks> Registry::controls_{};

Control* Registry::control(void* key) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(key) - kFirstKey;
  const size_t number = offset / kKeyStep;
  if (offset % kKeyStep || number >= kChunk * kChunks) return nullptr;
  Chunk* chunk = controls_[number / kChunk];
  if (!chunk) return nullptr;
  Control& control = (*chunk)[number % kChunk];
  return control.open ? &control : nullptr;
}

Control& Registry::next_control() {
  if (made_ == kChunk * kChunks) throw failure("emulator: too many handles in one process");
  std::atomic<Chunk*>& chunk = controls_[made_ / kChunk];
  if (!chunk) chunk = new Chunk;
  return (*chunk.load())[made_ % kChunk];
}

void* Registry::add(std::unique_ptr<Session> session, Deliver deliver, void* userdata) {
  const std::lock_guard lock(mutex_);
  Control& control = next_control();
  void* key = key_of(made_++);
  handles_.emplace(
      key, std::make_shared<Handle>(control, std::move(session), std::move(deliver), userdata));
  control.open = true;
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
  control(key)->open = false;
  return handle;
}

bool Registry::empty() {
  const std::lock_guard lock(mutex_);
  return handles_.empty();
}

}  // namespace rkemu

// A C++ client whose callbacks do not return, and whose signal handler calls
// the library. Built for one layout; the first argument names what it does, the
// second is a model. Prints "ok".
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

#include "abi.h"

namespace {

LLMHandle handle = nullptr;
std::atomic<int> tokens{0}, ends{0};
std::string act;

// What the callback of the first token does.
void leave() {
  if (act == "throw")
    throw std::runtime_error("the callback's own reason");
  if (act == "throw-int")
    throw 42;
  if (act == "exit")
    pthread_exit(nullptr);
  if (act == "cancel") {
    pthread_cancel(pthread_self());
    pthread_testcancel();
  }
}

decltype(LLMResultCallback()(nullptr, nullptr, RKLLM_RUN_NORMAL))
on_result(RKLLMResult *, void *, LLMCallState state) {
  if (state == RKLLM_RUN_NORMAL)
    ++tokens;
  if (state == RKLLM_RUN_FINISH)
    ++ends;
  if (state != RKLLM_RUN_FINISH)
    leave();
#if RKEMU_LAYOUT >= RKEMU_1_2_1
  return 0;
#endif
}

void check(bool fact, const char *what) {
  if (fact)
    return;
  std::printf("failed: %s\n", what);
  std::fflush(stdout);
  std::_Exit(1);
}

int run(bool async) {
  RKLLMInput input{};
  int32_t ids[] = {2, 50, 60, 70};
  input.input_type = RKLLM_INPUT_TOKEN;
  input.token_input = {ids, 4};
  RKLLMInferParam infer{};
  return (async ? rkllm_run_async : rkllm_run)(handle, &input, &infer, nullptr);
}

void wait_idle() {
  for (int i = 0; i < 20000 && rkllm_is_running(handle) != 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  check(rkllm_is_running(handle) == 0, "the handle stays busy");
}

// What it was told to do, then an answer as if nothing had been.
void try_unwinding(bool async) {
  const bool ends_thread = act == "exit" || act == "cancel";
  if (async) {
    check(run(true) == 0, "rkllm_run_async");
  } else if (ends_thread) {
    std::thread([] {
      run(false);
      check(false, "rkllm_run returned to a thread that had ended");
    }).join();
  } else {
    check(run(false) == -1, "rkllm_run did not return -1");
  }
  wait_idle();
  check(ends == 0 && tokens > 0, "the run went on");
  act.clear();
  check(run(false) == 0 && ends == 1, "the next answer");
}

void on_signal(int) {
  rkllm_is_running(handle);
  rkllm_abort(handle);
}

// Runs while another thread sends signals to this one, as fast as it takes
// them.
void try_storm() {
  struct sigaction action {};
  action.sa_handler = on_signal;
  sigaction(SIGUSR1, &action, nullptr);
  std::atomic<bool> stop{false};
  const pthread_t main_thread = pthread_self();
  std::thread storm([&] {
    while (!stop) {
      pthread_kill(main_thread, SIGUSR1);
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  });
  const auto end =
      std::chrono::steady_clock::now() + std::chrono::milliseconds(1500);
  int runs = 0;
  for (; std::chrono::steady_clock::now() < end; ++runs) {
    check(run(false) == 0, "rkllm_run");
    run(true);
    wait_idle();
  }
  stop = true;
  storm.join();
  check(runs > 10, "hardly a run");
}

} // namespace

int main(int, char **argv) {
  const std::string wanted = argv[1];
  RKLLMParam param = rkllm_createDefaultParam();
  param.model_path = argv[2];
  param.max_new_tokens = 4;
  param.top_k = 1;
#if RKEMU_LAYOUT >= RKEMU_1_3_0
  RKLLMCallback callback{};
  callback.result_callback = on_result;
  check(rkllm_init(&handle, &param, &callback) == 0, "rkllm_init");
#else
  check(rkllm_init(&handle, &param, on_result) == 0, "rkllm_init");
#endif
  const std::string suffix = "-async";
  const bool async =
      wanted.size() > suffix.size() &&
      wanted.compare(wanted.size() - suffix.size(), suffix.size(), suffix) == 0;
  act = async ? wanted.substr(0, wanted.size() - suffix.size()) : wanted;
  if (act == "storm") {
    try_storm();
  } else {
    try_unwinding(async);
  }
  check(rkllm_destroy(handle) == 0, "rkllm_destroy");
  std::puts("ok");
}

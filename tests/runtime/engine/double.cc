// A librkllmrt.so that computes nothing and misbehaves in the ways that RKDOUBLE names (words with commas between them).
// It says the ids 100, 101, ... 100 + RKDOUBLE_TOKENS - 1, each as the text "<id> ", and then ends.
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "abi.h"

extern "C" __attribute__((used)) const char kSdk[] =
    "RKLLM SDK (version: " RKEMU_RELEASE " | target: Linux | build: test double)";

namespace {

RKLLMInitCallback given;
#if RKEMU_LAYOUT >= RKEMU_1_3_0
RKLLMCallback kept;
#endif
std::atomic<bool> aborted{false}, running{false};
RKLLMParam params;

bool wants(const char* word) {
  const char* text = std::getenv("RKDOUBLE");
  const std::string words = "," + std::string(text ? text : "") + ",";
  return words.find("," + std::string(word) + ",") != std::string::npos;
}

int number(const char* name, int fallback) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : fallback;
}

int call(RKLLMResult* result, void* userdata, LLMCallState state) {
#if RKEMU_LAYOUT >= RKEMU_1_3_0
  return kept.result_callback(result, userdata, state);
#elif RKEMU_LAYOUT >= RKEMU_1_2_1
  return given(result, userdata, state);
#else
  given(result, userdata, state);
  return 0;
#endif
}

// RKDOUBLE_LINE without end.
void flood() {
  const char* line = std::getenv("RKDOUBLE_LINE");
  std::string block;
  while (block.size() < 4096) block += line ? line : "\n";
  for (;;) (void)!write(1, block.data(), block.size());
}

void misbehave(const std::string& where) {
  const auto is = [&](const char* what) { return wants((where + "-" + what).c_str()); };
  if (is("segv")) *reinterpret_cast<volatile int*>(8) = 1;
  if (is("ill")) raise(SIGILL);
  if (is("abort")) std::abort();
  if (is("killed")) raise(SIGKILL);
  if (is("exit")) std::exit(1);
  if (is("exit0")) _exit(0);
  if (is("hang")) {
    for (;;) pause();
  }
  if (is("spin")) {
    for (volatile int i = 0;; i = i + 1) {
    }
  }
  if (is("grandchild")) {  // a process of its own that keeps every descriptor, and then a crash
    if (fork() == 0) {
      for (;;) pause();
    }
    std::abort();
  }
  if (is("daemon")) {  // processes in sessions of their own, a child and its child among them
    for (int i = 0; i < 2; ++i) {
      if (fork() == 0) {
        setsid();
        if (i == 1) fork();
        for (;;) pause();
      }
    }
    usleep(50000);
  }
  if (is("flood-for-ever")) flood();
  if (is("say")) std::fputs(std::getenv("RKDOUBLE_LINE"), stderr);
  if (is("lie")) {  // the end of a run, without its JSON, into the pipe whose number is the worker's last argument
    char line[4096];
    FILE* file = std::fopen("/proc/self/cmdline", "r");
    const size_t size = std::fread(line, 1, sizeof line, file);
    std::fclose(file);
    size_t start = size - 1;
    while (start > 0 && line[start - 1] != 0) --start;
    const char record[] = "\x03\x00\x02\x00\x00\x00\x00\x00\x01\x00\x00\x00{";
    (void)!write(std::atoi(line + start), record, sizeof record - 1);
  }
  if (is("flood-beside")) std::thread(flood).detach();
  if (is("close-output")) {
    close(1);
    close(2);
  }
  if (is("flood")) {
    const std::string line(200, 'x');
    for (int i = 0; i < 300000; ++i) std::printf("%s %d\n", line.c_str(), i);
  }
  if (is("unfinished-line")) std::printf("no line feed at the end");
  if (is("binary")) std::fwrite("\xff\xfe\0\r\n\xf0\x9f", 1, 7, stderr);
}

}  // namespace

extern "C" {

RKLLMParam rkllm_createDefaultParam() {
  RKLLMParam param;
  std::memset(&param, 0, sizeof param);
  param.max_context_len = 512;
  param.max_new_tokens = -1;
  return param;
}

int rkllm_init(LLMHandle* handle, RKLLMParam* param, RKLLMInitCallback callback) {
  std::fprintf(stderr, "I rkllm: rkllm-runtime version: %s, rknpu driver version: 0.9.8, platform: RK3588\n", RKEMU_RELEASE);
  given = callback;
#if RKEMU_LAYOUT >= RKEMU_1_3_0
  kept = *callback;
#endif
  params = *param;
  if (wants("init-lines")) std::printf("a line on stdout\n");
  misbehave("init");
  if (wants("init-npu-memory") || wants("init-logs-and-succeeds")) {
    std::fprintf(stderr,
                 "E RKNN: [12:00:00.000] failed to allocate handle, ret: -1, errno: 14, errstr: Bad address\n"
                 "E RKNN: [12:00:00.000] failed to malloc npu memory, size: 232128512, flags: 0x2\n"
                 "E RKNN: [12:00:00.000] load model file error!\nrknn_init fail! ret=-1\n");
  }
  *handle = wants("init-no-handle") ? nullptr : &params;
  return wants("init-fails") || wants("init-npu-memory") ? -1 : 0;
}

int rkllm_destroy(LLMHandle) {
  misbehave("destroy");
  return 0;
}

int rkllm_run(LLMHandle, RKLLMInput*, RKLLMInferParam*, void* userdata) {
  if (wants("run-refuses")) return -1;
  // A library whose abort comes late sets its flag for the next run, too.
  if (!wants("abort-late")) aborted = false;
  if (wants("no-callback")) return 0;
  running = true;
  RKLLMResult result;
  std::memset(&result, 0, sizeof result);
  for (int i = 0; i < number("RKDOUBLE_TOKENS", 10) && !aborted; ++i) {
    if (i == number("RKDOUBLE_AT", 3)) {
      misbehave("token");
      if (wants("unknown-state")) {
        call(&result, userdata, static_cast<LLMCallState>(number("RKDOUBLE_STATE", 77)));
      }
      if (wants("early-finish")) call(&result, userdata, RKLLM_RUN_FINISH);
      if (wants("token-error")) {
        std::fprintf(stderr, "E rkllm: matmul(w8a8) run failed\n");
        call(&result, userdata, RKLLM_RUN_ERROR);
        running = false;
        return -1;
      }
    }
    const std::string text = std::to_string(100 + i) + " ";
    result.token_id = 100 + i;
    result.text = wants("null-text") ? nullptr : text.c_str();
    usleep(static_cast<useconds_t>(number("RKDOUBLE_US", 0)));
    call(&result, userdata, wants("waiting") && i % 2 ? RKLLM_RUN_WAITING : RKLLM_RUN_NORMAL);
  }
  result.text = nullptr;
  if (!wants("lost-finish")) call(&result, userdata, RKLLM_RUN_FINISH);
  running = false;
  return 0;
}

int rkllm_abort(LLMHandle) {
  if (wants("abort-deaf")) return 0;
  aborted = true;
  if (wants("abort-waits")) {
    while (running) usleep(1000);
  }
  return 0;
}

int rkllm_is_running(LLMHandle) { return running ? 1 : 0; }
int rkllm_run_async(LLMHandle, RKLLMInput*, RKLLMInferParam*, void*) { return -1; }
int rkllm_load_lora(LLMHandle, RKLLMLoraAdapter*) { return wants("lora-fails") ? -1 : 0; }
int rkllm_load_prompt_cache(LLMHandle, const char*) { return 0; }
int rkllm_release_prompt_cache(LLMHandle) { return 0; }
#if RKEMU_LAYOUT >= RKEMU_1_2_1
int rkllm_clear_kv_cache(LLMHandle, int, int*, int*) {
  misbehave("clear");
  return 0;
}
int rkllm_get_kv_cache_size(LLMHandle, int* sizes) {
  sizes[0] = 7;
  return 0;
}
int rkllm_set_function_tools(LLMHandle, const char*, const char*, const char*) { return 0; }
int rkllm_set_cross_attn_params(LLMHandle, RKLLMCrossAttnParam* cross) {
  // What arrived, so that a test can compare it.
  std::printf("cross attention: %d tokens, k %g, v %g, mask %g, position %d\n", cross->num_tokens,
              static_cast<double>(cross->encoder_k_cache[1]), static_cast<double>(cross->encoder_v_cache[1]),
              static_cast<double>(cross->encoder_mask[1]), cross->encoder_pos[1]);
  return 0;
}
#elif RKEMU_LAYOUT >= RKEMU_1_2_0
int rkllm_clear_kv_cache(LLMHandle, int) { return 0; }
#endif
#if RKEMU_LAYOUT >= RKEMU_1_2_0
int rkllm_set_chat_template(LLMHandle, const char*, const char*, const char*) { return 0; }
#endif

}  // extern "C"

// A librkllmrt.so that computes nothing: every prompt gets the same tokens. Layout of release 1.3.0.
//
// RKCANNED names a file that is read at each run: the number of tokens and the microseconds between two on the first line,
// then a token a line (id, space, text), which are said in turn. It sleeps between them, as a thread that waits for the NPU
// does: spinning would take one of a small machine's cores from the server. There is a pause of 20 ms before the end, because
// some servers lose what came last.
#include <sys/prctl.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "abi.h"

namespace {

using Clock = std::chrono::steady_clock;

struct Token {
  int32_t id;
  std::string text;
};

struct Script {
  long count = 0, microseconds = 0;
  std::vector<Token> tokens;
};

// Found in the file, not called.
__attribute__((used)) const char kSdk[] = "RKLLM SDK (version: 1.3.0 | target: Linux | build: benchmark)";
LLMResultCallback callback;
volatile bool stop;
int handle_target;

Script read_script() {
  Script script;
  const char* path = std::getenv("RKCANNED");
  std::ifstream file(path ? path : "");
  std::string line;
  file >> script.count >> script.microseconds;
  std::getline(file, line);
  while (std::getline(file, line)) {
    script.tokens.push_back({static_cast<int32_t>(std::stol(line)), line.substr(line.find(' ') + 1)});
  }
  return script;
}

}  // namespace

extern "C" {

RKLLMParam rkllm_createDefaultParam() {
  RKLLMParam param;
  std::memset(&param, 0, sizeof param);
  param.max_context_len = 512;
  param.top_k = 40;
  param.top_p = 0.9f;
  param.temperature = 0.8f;
  param.repeat_penalty = 1.1f;
  return param;
}

int rkllm_init(LLMHandle* handle, RKLLMParam*, RKLLMCallback* given) {
  callback = given->result_callback;
  *handle = &handle_target;
  return 0;
}

int rkllm_run(LLMHandle, RKLLMInput*, RKLLMInferParam*, void* userdata) {
  const Script script = read_script();
  const std::chrono::microseconds gap(script.microseconds);
  RKLLMResult result;
  std::memset(&result, 0, sizeof result);
  stop = false;
  prctl(PR_SET_TIMERSLACK, 1);
  auto next = Clock::now();
  for (long i = 0; i < script.count && !stop; ++i) {
    next += gap;
    if (gap.count() > 0) std::this_thread::sleep_until(next);
    const Token& token = script.tokens[static_cast<size_t>(i) % script.tokens.size()];
    result.token_id = token.id;
    result.text = token.text.c_str();
    callback(&result, userdata, RKLLM_RUN_NORMAL);
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  result.text = "";
  callback(&result, userdata, RKLLM_RUN_FINISH);
  return 0;
}

int rkllm_run_async(LLMHandle handle, RKLLMInput* input, RKLLMInferParam* infer, void* userdata) {
  return rkllm_run(handle, input, infer, userdata);
}

int rkllm_abort(LLMHandle) {
  stop = true;
  return 0;
}

int rkllm_is_running(LLMHandle) { return 0; }
int rkllm_destroy(LLMHandle) { return 0; }
int rkllm_load_lora(LLMHandle, RKLLMLoraAdapter*) { return -1; }
int rkllm_load_prompt_cache(LLMHandle, const char*) { return -1; }
int rkllm_release_prompt_cache(LLMHandle) { return -1; }
int rkllm_clear_kv_cache(LLMHandle, int, int*, int*) { return 0; }
int rkllm_get_kv_cache_size(LLMHandle, int*) { return -1; }
int rkllm_set_function_tools(LLMHandle, const char*, const char*, const char*) { return -1; }
int rkllm_set_cross_attn_params(LLMHandle, RKLLMCrossAttnParam*) { return -1; }
int rkllm_set_chat_template(LLMHandle, const char*, const char*, const char*) { return 0; }
}

// A librkllmrt.so that computes nothing: each token's text is the time at which its callback was called, in ns.
// Layout of release 1.2.3. RKSTAMP_US is the time between two tokens; the prompt's first id is the number of tokens.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef struct { int64_t words[26]; } Param;                    // 208 bytes
typedef struct { const char *text; int32_t token, pad; int64_t rest[7]; } Result;  // 72 bytes
typedef struct { int64_t head[2]; int32_t *ids; size_t n; } Input;
typedef int (*Callback)(Result *, void *, uint32_t);

const char *sdk = "RKLLM SDK (version: 1.2.3 | target: Linux | build: benchmark)";
static Callback callback;
static volatile int stop;

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

Param rkllm_createDefaultParam(void) {
  Param param;
  memset(&param, 0, sizeof param);
  return param;
}
int rkllm_init(void **handle, Param *param, Callback given) {
  (void)param;
  callback = given;
  *handle = &callback;
  return 0;
}
int rkllm_run(void *handle, Input *input, void *infer, void *userdata) {
  (void)handle, (void)infer;
  const char *us = getenv("RKSTAMP_US");
  const int64_t gap = us ? atoll(us) * 1000 : 0;
  char text[32];
  Result result = {.text = text};
  stop = 0;
  for (int i = 0; i < input->ids[0] && !stop; ++i) {
    const int64_t until = now() + gap;
    if (gap >= 1000000) usleep(gap / 1000);  // as a thread that waits for the NPU
    while (now() < until) {
    }
    result.token = 100 + i % 1000;
    snprintf(text, sizeof text, "%lld", (long long)now());
    callback(&result, userdata, 0);
  }
  result.text = "";
  callback(&result, userdata, 2);
  return 0;
}
int rkllm_abort(void *handle) { (void)handle; stop = 1; return 0; }
int rkllm_destroy(void *handle) { (void)handle; return 0; }
int rkllm_run_async(void) { return -1; }
int rkllm_is_running(void) { return 0; }
int rkllm_load_lora(void) { return -1; }
int rkllm_load_prompt_cache(void) { return -1; }
int rkllm_release_prompt_cache(void) { return -1; }
int rkllm_clear_kv_cache(void) { return 0; }
int rkllm_get_kv_cache_size(void) { return -1; }
int rkllm_set_chat_template(void) { return -1; }
int rkllm_set_function_tools(void) { return -1; }
int rkllm_set_cross_attn_params(void) { return -1; }

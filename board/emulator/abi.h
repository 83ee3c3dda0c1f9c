// The C interface of librkllmrt.so, one layout per build: RKEMU_LAYOUT is its number, which has
// here the name of the release that brought it. Written from measured sizes and offsets, which
// abi_check.h asserts: it is made at build time from the runtime's own declarations.
//
// Callers may pass anything: enums have a fixed underlying type and flags are uint8_t instead of
// bool, so that no bit pattern is undefined behaviour here.
#pragma once

#include <cstddef>
#include <cstdint>

#define RKEMU_1_1_0 3
#define RKEMU_1_2_0 4
#define RKEMU_1_2_1_BETA 5
#define RKEMU_1_2_1 6
#define RKEMU_1_3_0 7

#if !defined(RKEMU_LAYOUT) || RKEMU_LAYOUT < RKEMU_1_1_0 || RKEMU_LAYOUT > RKEMU_1_3_0
#error "RKEMU_LAYOUT must be the number of a layout"
#endif

extern "C" {

typedef void* LLMHandle;
typedef uint8_t RKLLMFlag;

enum LLMCallState : uint32_t {
  RKLLM_RUN_NORMAL = 0,
  RKLLM_RUN_WAITING = 1,
  RKLLM_RUN_FINISH = 2,
  RKLLM_RUN_ERROR = 3,
#if RKEMU_LAYOUT < RKEMU_1_2_0
  RKLLM_RUN_GET_LAST_HIDDEN_LAYER = 4,
#endif
};

enum RKLLMInputType : uint32_t {
  RKLLM_INPUT_PROMPT = 0,
  RKLLM_INPUT_TOKEN = 1,
  RKLLM_INPUT_EMBED = 2,
  RKLLM_INPUT_MULTIMODAL = 3,
};

enum RKLLMInferMode : uint32_t {
  RKLLM_INFER_GENERATE = 0,
  RKLLM_INFER_GET_LAST_HIDDEN_LAYER = 1,
#if RKEMU_LAYOUT >= RKEMU_1_2_0
  RKLLM_INFER_GET_LOGITS = 2,
#endif
};

struct RKLLMExtendParam {
  int32_t base_domain_id;
#if RKEMU_LAYOUT < RKEMU_1_2_0
  uint8_t reserved[112];
#else
  int8_t embed_flash;
  int8_t enabled_cpus_num;
  uint32_t enabled_cpus_mask;
#if RKEMU_LAYOUT >= RKEMU_1_2_1
  uint8_t n_batch;
  int8_t use_cross_attn;
  uint8_t reserved[104];
#else
  uint8_t reserved[106];
#endif
#endif
};

struct RKLLMParam {
  const char* model_path;
  int32_t max_context_len;
  int32_t max_new_tokens;
  int32_t top_k;
#if RKEMU_LAYOUT >= RKEMU_1_2_0
  int32_t n_keep;
#endif
  float top_p;
  float temperature;
  float repeat_penalty;
  float frequency_penalty;
  float presence_penalty;
  int32_t mirostat;
  float mirostat_tau;
  float mirostat_eta;
  RKLLMFlag skip_special_token;
#if RKEMU_LAYOUT >= RKEMU_1_3_0
  RKLLMFlag ignore_eos_token;
#endif
  RKLLMFlag is_async;
#if RKEMU_LAYOUT < RKEMU_1_3_0
  const char* img_start;
  const char* img_end;
  const char* img_content;
#endif
  RKLLMExtendParam extend_param;
};

struct RKLLMLoraAdapter {
  const char* lora_adapter_path;
  const char* lora_adapter_name;
  float scale;
};

struct RKLLMEmbedInput {
  float* embed;
  size_t n_tokens;
};

struct RKLLMTokenInput {
  int32_t* input_ids;
  size_t n_tokens;
};

#if RKEMU_LAYOUT >= RKEMU_1_3_0
struct RKLLMImageInput {
  float* image_embed;
  size_t n_image_tokens;
  size_t n_image;
  const char* image_start;
  const char* image_end;
  const char* image_content;
  size_t image_width;
  size_t image_height;
};

struct RKLLMVideoInput {
  float* video_embed;
  size_t n_frame_tokens;
  size_t n_frame_per_video;
  size_t n_video;
  const char* video_start;
  const char* video_end;
  const char* video_content;
  size_t frame_width;
  size_t frame_height;
};

struct RKLLMMultiModalInput {
  char* prompt;
  RKLLMImageInput image;
  RKLLMVideoInput video;
};
#else
struct RKLLMMultiModalInput {
  char* prompt;
  float* image_embed;
  size_t n_image_tokens;
#if RKEMU_LAYOUT >= RKEMU_1_2_1_BETA
  size_t n_image;
  size_t image_width;
  size_t image_height;
#endif
};
#endif

struct RKLLMInput {
#if RKEMU_LAYOUT >= RKEMU_1_2_1
  const char* role;
  RKLLMFlag enable_thinking;
#endif
  RKLLMInputType input_type;
  union {
    const char* prompt_input;
    RKLLMEmbedInput embed_input;
    RKLLMTokenInput token_input;
    RKLLMMultiModalInput multimodal_input;
  };
};

struct RKLLMLoraParam {
  const char* lora_adapter_name;
};

struct RKLLMPromptCacheParam {
  int save_prompt_cache;
  const char* prompt_cache_path;
};

#if RKEMU_LAYOUT >= RKEMU_1_2_1
struct RKLLMCrossAttnParam {
  float* encoder_k_cache;
  float* encoder_v_cache;
  float* encoder_mask;
  int32_t* encoder_pos;
  int num_tokens;
};
#endif

#if RKEMU_LAYOUT >= RKEMU_1_3_0
struct RKLLMSamplingParam {
  int32_t top_k;
  float top_p;
  float temperature;
  float repeat_penalty;
  float frequency_penalty;
  float presence_penalty;
  int32_t mirostat;
  float mirostat_tau;
  float mirostat_eta;
};
#endif

struct RKLLMInferParam {
  RKLLMInferMode mode;
  RKLLMLoraParam* lora_params;
  RKLLMPromptCacheParam* prompt_cache_params;
#if RKEMU_LAYOUT >= RKEMU_1_3_0
  RKLLMSamplingParam* sampling_params;
#endif
#if RKEMU_LAYOUT >= RKEMU_1_2_0
  int keep_history;
#endif
#if RKEMU_LAYOUT >= RKEMU_1_3_0
  int32_t max_new_tokens;
#endif
};

struct RKLLMResultLastHiddenLayer {
  const float* hidden_states;
  int embd_size;
  int num_tokens;
};

#if RKEMU_LAYOUT >= RKEMU_1_2_0
struct RKLLMResultLogits {
  const float* logits;
  int vocab_size;
  int num_tokens;
};
#endif

#if RKEMU_LAYOUT >= RKEMU_1_2_1
struct RKLLMPerfStat {
  float prefill_time_ms;
  int prefill_tokens;
  float generate_time_ms;
  int generate_tokens;
  float memory_usage_mb;
};
#endif

struct RKLLMResult {
  const char* text;
  int32_t token_id;
  RKLLMResultLastHiddenLayer last_hidden_layer;
#if RKEMU_LAYOUT >= RKEMU_1_2_0
  RKLLMResultLogits logits;
#endif
#if RKEMU_LAYOUT >= RKEMU_1_2_1
  RKLLMPerfStat perf;
#endif
};

#if RKEMU_LAYOUT >= RKEMU_1_2_1
typedef int (*LLMResultCallback)(RKLLMResult* result, void* userdata, LLMCallState state);
#else
typedef void (*LLMResultCallback)(RKLLMResult* result, void* userdata, LLMCallState state);
#endif

#if RKEMU_LAYOUT >= RKEMU_1_3_0
typedef int (*LLMTokenizerCallback)(void* userdata, const char* text, int32_t text_len,
                                    int32_t* tokens, int32_t n_tokens_max);
typedef int (*LLMGetEmbedCallback)(void* userdata, int32_t* tokens, uint64_t num_tokens,
                                   void* embed, uint64_t len);

struct RKLLMCallback {
  LLMResultCallback result_callback;
  void* result_userdata;
  LLMTokenizerCallback tokenizer_callback;
  void* tokenizer_userdata;
  LLMGetEmbedCallback embed_callback;
  void* embed_userdata;
};
typedef RKLLMCallback* RKLLMInitCallback;
#else
typedef LLMResultCallback RKLLMInitCallback;
#endif

#define RKLLM_API __attribute__((visibility("default")))

RKLLM_API RKLLMParam rkllm_createDefaultParam();
RKLLM_API int rkllm_init(LLMHandle* handle, RKLLMParam* param, RKLLMInitCallback callback);
RKLLM_API int rkllm_load_lora(LLMHandle handle, RKLLMLoraAdapter* lora_adapter);
RKLLM_API int rkllm_load_prompt_cache(LLMHandle handle, const char* prompt_cache_path);
RKLLM_API int rkllm_release_prompt_cache(LLMHandle handle);
RKLLM_API int rkllm_destroy(LLMHandle handle);
RKLLM_API int rkllm_run(LLMHandle handle, RKLLMInput* input, RKLLMInferParam* infer_params,
                        void* userdata);
RKLLM_API int rkllm_run_async(LLMHandle handle, RKLLMInput* input, RKLLMInferParam* infer_params,
                              void* userdata);
RKLLM_API int rkllm_abort(LLMHandle handle);
RKLLM_API int rkllm_is_running(LLMHandle handle);
#if RKEMU_LAYOUT >= RKEMU_1_2_1
RKLLM_API int rkllm_clear_kv_cache(LLMHandle handle, int keep_system_prompt, int* start_pos,
                                   int* end_pos);
RKLLM_API int rkllm_get_kv_cache_size(LLMHandle handle, int* cache_sizes);
RKLLM_API int rkllm_set_function_tools(LLMHandle handle, const char* system_prompt,
                                       const char* tools, const char* tool_response_str);
RKLLM_API int rkllm_set_cross_attn_params(LLMHandle handle, RKLLMCrossAttnParam* cross_attn_params);
#elif RKEMU_LAYOUT >= RKEMU_1_2_0
RKLLM_API int rkllm_clear_kv_cache(LLMHandle handle, int keep_system_prompt);
#endif
#if RKEMU_LAYOUT >= RKEMU_1_2_0
RKLLM_API int rkllm_set_chat_template(LLMHandle handle, const char* system_prompt,
                                      const char* prompt_prefix, const char* prompt_postfix);
#endif

}  // extern "C"

#include "convert.h"

#include <algorithm>
#include <bitset>
#include <cmath>

#include "log.h"

namespace rkemu {

namespace {

[[maybe_unused]] constexpr int kPause = 1;
[[maybe_unused]] constexpr int kMaxBatch = 16;
constexpr size_t kMaxPrompt = 1u << 20;
[[maybe_unused]] constexpr int kDefaultCpus = 4;
[[maybe_unused]] constexpr uint32_t kBigCores = 0xF0;
[[maybe_unused]] constexpr uint32_t kStackBytes = 0xCDCDCDCD;  // stands for uninitialized memory

constexpr Rules rules_of(const char* release, int number, int layout) {
  Rules rules{};
  rules.release = release;
  rules.chat_template = layout >= RKEMU_1_2_0;
  rules.prefix_reuse = layout >= RKEMU_1_2_0;
  rules.embedding_reuse = number >= 10203;
  rules.names_platform = layout >= RKEMU_1_2_0;
  rules.names_dtype = layout >= RKEMU_1_2_1;
  rules.pause = layout >= RKEMU_1_2_1;
  rules.all_eos = layout >= RKEMU_1_3_0;
  return rules;
}

constexpr Rules kRules = rules_of(RKEMU_RELEASE, RKEMU_RELEASE_NUMBER, RKEMU_LAYOUT);

std::string text_of(const char* text) {
  return text ? text : "";
}

// Ignores a name that is not in the table, which rkllm_init reports.
Guesses guesses_or_none() {
  try {
    return Guesses::from_environment();
  } catch (const Failure&) {
    return {};
  }
}

Sampling sampling_of(const RKLLMParam& p) {
  return {p.top_k,
          p.top_p,
          p.temperature,
          p.repeat_penalty,
          p.frequency_penalty,
          p.presence_penalty,
          p.mirostat,
          p.mirostat_tau,
          p.mirostat_eta};
}

void check_cpus([[maybe_unused]] const RKLLMExtendParam& extend,
                [[maybe_unused]] Settings& settings) {
#if RKEMU_LAYOUT >= RKEMU_1_2_0
  const int count = extend.enabled_cpus_num > 0 ? extend.enabled_cpus_num : kDefaultCpus;
  const auto in_mask = std::bitset<32>(extend.enabled_cpus_mask).count();
  if (extend.enabled_cpus_num > 0 && in_mask && in_mask != static_cast<size_t>(count)) {
    const char* mismatch = "Mismatch between enabled CPUs mask and expected count";
    if (settings.guesses.defaults_unset) throw failure(mismatch);
    warn(mismatch);
  }
  settings.cpus = count;
#endif
}

size_t checked_count(const void* data, size_t count, const char* what) {
  if (!data || count == 0) throw failure(std::string(what) + " input is empty");
  if (count > kMaxPrompt) throw failure(format("%s input of %zu is too long", what, count));
  return count;
}

Input input_of(const RKLLMInput& from, int hidden_size) {
  Input input;
#if RKEMU_LAYOUT >= RKEMU_1_2_1
  input.tool = text_of(from.role) == "tool";
#endif
  switch (from.input_type) {
    case RKLLM_INPUT_PROMPT:
      if (!from.prompt_input) throw failure("prompt input is NULL");
      input.text = from.prompt_input;
      return input;
    case RKLLM_INPUT_TOKEN: {
      const size_t count =
          checked_count(from.token_input.input_ids, from.token_input.n_tokens, "token");
      input.kind = Input::Kind::tokens;
      input.tokens.assign(from.token_input.input_ids, from.token_input.input_ids + count);
      if (std::any_of(input.tokens.begin(), input.tokens.end(),
                      [](int32_t id) { return id < 0; })) {
        throw failure("token input holds an id below zero");
      }
      return input;
    }
    case RKLLM_INPUT_EMBED: {
      const size_t count =
          checked_count(from.embed_input.embed, from.embed_input.n_tokens, "embedding");
      input.kind = Input::Kind::embeddings;
      input.rows.assign(from.embed_input.embed,
                        from.embed_input.embed + count * static_cast<size_t>(hidden_size));
      if (!std::all_of(input.rows.begin(), input.rows.end(),
                       [](float value) { return std::isfinite(value); })) {
        throw failure("embedding input holds a value that is not a number");
      }
      return input;
    }
    case RKLLM_INPUT_MULTIMODAL:
      throw failure("multimodal input: Gemma 2 is a text model and has no vision encoder");
  }
  throw failure(format("unknown input type %u", static_cast<unsigned>(from.input_type)));
}

#if RKEMU_LAYOUT >= RKEMU_1_3_0
void add_callbacks(const RKLLMCallback& callback, Settings& settings) {
  if (callback.tokenizer_callback) {
    settings.tokenize = [callback](const std::string& text) {
      std::vector<int32_t> ids(text.size() + 16);
      const int count = callback.tokenizer_callback(callback.tokenizer_userdata, text.c_str(),
                                                    static_cast<int32_t>(text.size()), ids.data(),
                                                    static_cast<int32_t>(ids.size()));
      if (count < 0 || static_cast<size_t>(count) > ids.size())
        throw failure("the tokenizer callback failed");
      ids.resize(static_cast<size_t>(count));
      return ids;
    };
  }
  if (callback.embed_callback) {
    settings.embed = [callback](int32_t token, float* row, size_t bytes) {
      return callback.embed_callback(callback.embed_userdata, &token, 1, row, bytes) == 0;
    };
  }
}
#endif

RKLLMResult result_of(const Result& from) {
  RKLLMResult result{};
  result.text = from.text;
  result.token_id = from.token;
  if (from.hidden) result.last_hidden_layer = {from.hidden, from.width, from.rows};
#if RKEMU_LAYOUT >= RKEMU_1_2_0
  if (from.logits) result.logits = {from.logits, from.width, from.rows};
#endif
#if RKEMU_LAYOUT >= RKEMU_1_2_1
  result.perf = {from.perf.prefill_ms, from.perf.prefill_tokens, from.perf.generate_ms,
                 from.perf.generated_tokens, from.perf.memory_mb};
#endif
  return result;
}

LLMCallState state_of(State state) {
  switch (state) {
    case State::normal:
      return RKLLM_RUN_NORMAL;
    case State::waiting:
      return RKLLM_RUN_WAITING;
    case State::finish:
      return RKLLM_RUN_FINISH;
    case State::error:
      return RKLLM_RUN_ERROR;
    case State::last_hidden:
      break;
  }
#if RKEMU_LAYOUT < RKEMU_1_2_0
  return RKLLM_RUN_GET_LAST_HIDDEN_LAYER;
#else
  return RKLLM_RUN_NORMAL;
#endif
}

bool call(LLMResultCallback callback, void* userdata, const std::vector<Result>& from,
          State state) {
  std::vector<RKLLMResult> results;
  for (const Result& result : from) results.push_back(result_of(result));
#if RKEMU_LAYOUT >= RKEMU_1_2_1
  return callback(results.data(), userdata, state_of(state)) == kPause;
#else
  callback(results.data(), userdata, state_of(state));
  return false;
#endif
}

}  // namespace

const Rules& rules() {
  return kRules;
}

RKLLMParam default_param() {
  RKLLMParam param{};
  const Settings settings;
  const Guesses guesses = guesses_or_none();
  param.skip_special_token = guesses.special_hidden;
  param.max_context_len = settings.max_context;
  param.max_new_tokens = settings.max_new_tokens;
  param.top_k = settings.sampling.top_k;
  param.top_p = settings.sampling.top_p;
  param.temperature = settings.sampling.temperature;
  param.repeat_penalty = settings.sampling.repeat_penalty;
  param.frequency_penalty = settings.sampling.frequency_penalty;
  param.presence_penalty = settings.sampling.presence_penalty;
  param.mirostat = settings.sampling.mirostat;
  param.mirostat_tau = settings.sampling.mirostat_tau;
  param.mirostat_eta = settings.sampling.mirostat_eta;
#if RKEMU_LAYOUT >= RKEMU_1_2_0
  param.n_keep = settings.n_keep;
  param.extend_param.enabled_cpus_num = kDefaultCpus;
  param.extend_param.enabled_cpus_mask = guesses.defaults_unset ? kStackBytes : kBigCores;
#endif
#if RKEMU_LAYOUT >= RKEMU_1_2_1
  param.extend_param.n_batch = guesses.defaults_unset ? 0 : 1;
#endif
  return param;
}

Settings settings_of(const RKLLMParam& param) {
  Settings settings;
  settings.guesses = Guesses::from_environment();
  settings.model_path = text_of(param.model_path);
  settings.max_context = param.max_context_len;
  settings.max_new_tokens = param.max_new_tokens;
  settings.sampling = sampling_of(param);
  settings.skip_special_token = param.skip_special_token != 0;
  settings.domain = param.extend_param.base_domain_id;
#if RKEMU_LAYOUT >= RKEMU_1_2_0
  settings.n_keep = param.n_keep;
#endif
#if RKEMU_LAYOUT >= RKEMU_1_2_1
  if (settings.guesses.defaults_unset && param.extend_param.n_batch == 0)
    throw failure("n_batch must be between 1 and 100, but got 0");
  settings.n_batch = std::max<int>(1, param.extend_param.n_batch);
  if (settings.n_batch > kMaxBatch) {
    throw failure(format("n_batch[%d] must be at most %d", settings.n_batch, kMaxBatch));
  }
#endif
#if RKEMU_LAYOUT >= RKEMU_1_3_0
  settings.ignore_eos_token = param.ignore_eos_token != 0;
#endif
  check_cpus(param.extend_param, settings);
  return settings;
}

Request request_of(const RKLLMInput* input, const RKLLMInferParam* infer, const Session& session) {
  Request request;
  if (!input) throw failure("rkllm_input is NULL");
  for (int i = 0; i < session.batches(); ++i)
    request.inputs.push_back(input_of(input[i], session.hidden_size()));
  if (!infer) return request;
  switch (infer->mode) {
    case RKLLM_INFER_GENERATE:
      break;
    case RKLLM_INFER_GET_LAST_HIDDEN_LAYER:
      request.mode = Mode::last_hidden;
      break;
#if RKEMU_LAYOUT >= RKEMU_1_2_0
    case RKLLM_INFER_GET_LOGITS:
      request.mode = Mode::logits;
      break;
#endif
    default:
      throw failure(format("unknown infer mode %u", static_cast<unsigned>(infer->mode)));
  }
  if (infer->lora_params && infer->lora_params->lora_adapter_name) {
    request.lora = infer->lora_params->lora_adapter_name;
  }
  if (infer->prompt_cache_params && infer->prompt_cache_params->save_prompt_cache) {
    const char* path = infer->prompt_cache_params->prompt_cache_path;
    request.save_prompt_cache = path && *path ? path : "./prompt_cache.bin";
  }
#if RKEMU_LAYOUT >= RKEMU_1_2_0
  request.keep_history = infer->keep_history != 0;
#endif
#if RKEMU_LAYOUT >= RKEMU_1_3_0
  request.max_new_tokens = infer->max_new_tokens;
  if (const RKLLMSamplingParam* s = infer->sampling_params) {
    request.sampling = Sampling{s->top_k,
                                s->top_p,
                                s->temperature,
                                s->repeat_penalty,
                                s->frequency_penalty,
                                s->presence_penalty,
                                s->mirostat,
                                s->mirostat_tau,
                                s->mirostat_eta};
  }
#endif
  return request;
}

Client client_of(RKLLMInitCallback callback, [[maybe_unused]] Settings& settings) {
  Client client;
#if RKEMU_LAYOUT >= RKEMU_1_3_0
  LLMResultCallback result_callback = callback ? callback->result_callback : nullptr;
  if (callback) {
    client.userdata = callback->result_userdata;
    add_callbacks(*callback, settings);
  }
#else
  LLMResultCallback result_callback = callback;
#endif
  if (!result_callback) throw failure("the result callback is NULL");
  client.deliver = [result_callback](void* userdata, const std::vector<Result>& results,
                                     State state) {
    return call(result_callback, userdata, results, state);
  };
  return client;
}

}  // namespace rkemu

// The exported functions: structures of one layout in, Session calls, results out. No exception
// leaves this file.
#include <algorithm>
#include <bitset>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "abi.h"
#include "abi_check.h"
#include "log.h"
#include "npu.h"
#include "session.h"

#ifndef RKEMU_RELEASE
#error "RKEMU_RELEASE must be the release's name, such as \"1.2.3\""
#endif
#ifndef RKEMU_RELEASE_NUMBER
#error "RKEMU_RELEASE_NUMBER must be its number, such as 10203"
#endif

namespace {

using rkemu::Failure;
using rkemu::failure;
using rkemu::Session;

// Programs find a library's release by this text, as in the vendor's file.
__attribute__((used)) const char kSdk[] =
    "RKLLM SDK (version: " RKEMU_RELEASE " | target: Linux | build: emulator, no NPU is used)";

constexpr int kOk = 0, kError = -1;
constexpr int kPause = 1;
constexpr int kMaxBatch = 16;
constexpr size_t kMaxPrompt = 1u << 20;
constexpr int kDefaultCpus = 4;
constexpr uint32_t kBigCores = 0xF0;

constexpr rkemu::Rules kRules{
    RKEMU_RELEASE,     RKEMU_LAYOUT >= 4, RKEMU_LAYOUT >= 4, RKEMU_RELEASE_NUMBER >= 10203,
    RKEMU_LAYOUT >= 4, RKEMU_LAYOUT >= 6, RKEMU_LAYOUT >= 6, RKEMU_LAYOUT >= 7};

// What an LLMHandle stands for: a session, and who is running it.
class Handle {
 public:
  Handle(std::unique_ptr<Session> session, LLMResultCallback callback, void* userdata)
      : session_(std::move(session)), callback_(callback), userdata_(userdata) {}

  ~Handle() {
    if (worker_.joinable()) worker_.detach();  // only when the worker itself destroyed its handle
  }

  Session& session() { return *session_; }
  LLMResultCallback callback() const { return callback_; }
  void* userdata() const { return userdata_; }

  // Marks the handle as running; false if it is already.
  bool begin() {
    const std::lock_guard lock(mutex_);
    if (running_ || closed_) return false;
    running_ = true;
    runner_ = std::this_thread::get_id();
    session_->rearm();
    return true;
  }

  void end() {
    const std::lock_guard lock(mutex_);
    running_ = false;
    runner_ = {};
    idle_.notify_all();
  }

  // Runs `work` in a thread; begin() was called, the thread calls end().
  template <class Work>
  void start(Work work) {
    if (worker_.joinable()) worker_.join();
    worker_ = std::thread([this, work] {
      {
        const std::lock_guard lock(mutex_);
        runner_ = std::this_thread::get_id();
      }
      work();
    });
  }

  bool running() {
    const std::lock_guard lock(mutex_);
    return running_;
  }

  // Ends a run and waits for it, unless it is the running thread that asks: then it ends when its
  // callback returns.
  void close() {
    session_->abort();
    std::unique_lock lock(mutex_);
    closed_ = true;
    if (running_ && runner_ == std::this_thread::get_id()) return;
    idle_.wait(lock, [this] { return !running_; });
    lock.unlock();
    if (worker_.joinable() && worker_.get_id() != std::this_thread::get_id()) worker_.join();
  }

 private:
  std::unique_ptr<Session> session_;
  LLMResultCallback callback_;
  void* userdata_;
  std::mutex mutex_;
  std::condition_variable idle_;
  bool running_ = false;
  bool closed_ = false;
  std::thread::id runner_;
  std::thread worker_;
};

// The only global: clients destroy twice, or use handles after that, and must get -1. Handles are
// numbers that are never given out again. It is never destroyed itself, as a thread may outlive
// main().
class Registry {
 public:
  static Registry& get() {
    static Registry& registry = *new Registry;
    return registry;
  }

  LLMHandle add(std::shared_ptr<Handle> handle) {
    const std::lock_guard lock(mutex_);
    next_ += 16;
    auto* key = reinterpret_cast<LLMHandle>(next_);
    handles_.emplace(key, std::move(handle));
    return key;
  }

  std::shared_ptr<Handle> find(LLMHandle key) {
    const std::lock_guard lock(mutex_);
    const auto found = handles_.find(key);
    return found == handles_.end() ? nullptr : found->second;
  }

  std::shared_ptr<Handle> take(LLMHandle key) {
    const std::lock_guard lock(mutex_);
    const auto found = handles_.find(key);
    if (found == handles_.end()) return nullptr;
    auto handle = std::move(found->second);
    handles_.erase(found);
    return handle;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<LLMHandle, std::shared_ptr<Handle>> handles_;
  uintptr_t next_ = 0x52000000;
};

// Runs `work`, and turns what it throws into a line and -1.
template <class Work>
int guarded(const Work& work) {
  try {
    work();
    return kOk;
  } catch (const Failure& error) {
    rkemu::raw(error.what());
  } catch (const std::bad_alloc&) {
    rkemu::error("emulator: out of memory");
  } catch (const std::exception& error) {
    rkemu::error(std::string("emulator: ") + error.what());
  } catch (...) {
    rkemu::error("emulator: the client's callback threw an exception");
  }
  return kError;
}

std::shared_ptr<Handle> known(LLMHandle key) {
  auto handle = Registry::get().find(key);
  if (!handle) throw failure("invalid handle");
  return handle;
}

// Runs `work(session)` on a handle that is not running.
template <class Work>
int on_idle(LLMHandle key, const Work& work) {
  return guarded([&] {
    const auto handle = known(key);
    if (!handle->begin()) throw failure("the handle is running");
    const std::unique_ptr<Handle, void (*)(Handle*)> ending(handle.get(),
                                                            [](Handle* h) { h->end(); });
    work(handle->session());
  });
}

std::string text_of(const char* text) {
  return text ? text : "";
}

rkemu::Sampling sampling_of(const RKLLMParam& p) {
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

void check_cpus([[maybe_unused]] const RKLLMExtendParam& extend, rkemu::Settings& settings) {
#if RKEMU_LAYOUT >= 4
  const int count = extend.enabled_cpus_num > 0 ? extend.enabled_cpus_num : kDefaultCpus;
  const auto in_mask = std::bitset<32>(extend.enabled_cpus_mask).count();
  if (extend.enabled_cpus_num > 0 && in_mask && in_mask != static_cast<size_t>(count)) {
    rkemu::warn("Mismatch between enabled CPUs mask and expected count");
  }
  settings.cpus = count;
#endif
}

rkemu::Settings settings_of(const RKLLMParam& param) {
  rkemu::Settings settings;
  settings.model_path = text_of(param.model_path);
  settings.max_context = param.max_context_len;
  settings.max_new_tokens = param.max_new_tokens;
  settings.sampling = sampling_of(param);
  settings.skip_special_token = param.skip_special_token != 0;
  settings.domain = param.extend_param.base_domain_id;
#if RKEMU_LAYOUT >= 4
  settings.n_keep = param.n_keep;
#endif
#if RKEMU_LAYOUT >= 6
  settings.n_batch = std::max<int>(1, param.extend_param.n_batch);
  if (settings.n_batch > kMaxBatch) {
    throw failure(rkemu::format("n_batch[%d] must be at most %d", settings.n_batch, kMaxBatch));
  }
#endif
#if RKEMU_LAYOUT >= 7
  settings.ignore_eos_token = param.ignore_eos_token != 0;
#endif
  check_cpus(param.extend_param, settings);
  return settings;
}

#if RKEMU_LAYOUT >= 7
void add_callbacks(const RKLLMCallback& callback, rkemu::Settings& settings) {
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

std::shared_ptr<Handle> load(const RKLLMParam& param, RKLLMInitCallback callback) {
  rkemu::warn_of_old_driver();
  rkemu::info("rkllm-runtime version: " RKEMU_RELEASE ", rknpu driver version: " +
              rkemu::driver_version() + ", platform: " + rkemu::platform());
  rkemu::Settings settings = settings_of(param);
  rkemu::info("loading rkllm model from " + settings.model_path);
#if RKEMU_LAYOUT >= 7
  if (!callback || !callback->result_callback) throw failure("the result callback is NULL");
  add_callbacks(*callback, settings);
  return std::make_shared<Handle>(std::make_unique<Session>(kRules, settings),
                                  callback->result_callback, callback->result_userdata);
#else
  if (!callback) throw failure("the result callback is NULL");
  return std::make_shared<Handle>(std::make_unique<Session>(kRules, settings), callback, nullptr);
#endif
}

size_t checked_count(const void* data, size_t count, const char* what) {
  if (!data || count == 0) throw failure(std::string(what) + " input is empty");
  if (count > kMaxPrompt) throw failure(rkemu::format("%s input of %zu is too long", what, count));
  return count;
}

rkemu::Input input_of(const RKLLMInput& from, int hidden_size) {
  rkemu::Input input;
#if RKEMU_LAYOUT >= 6
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
      input.kind = rkemu::Input::Kind::tokens;
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
      input.kind = rkemu::Input::Kind::embeddings;
      input.rows.assign(from.embed_input.embed,
                        from.embed_input.embed + count * static_cast<size_t>(hidden_size));
      return input;
    }
    case RKLLM_INPUT_MULTIMODAL:
      throw failure("multimodal input: Gemma 2 is a text model and has no vision encoder");
  }
  throw failure(rkemu::format("unknown input type %u", static_cast<unsigned>(from.input_type)));
}

rkemu::Request request_of(const RKLLMInput* input, const RKLLMInferParam* infer, Session& session) {
  rkemu::Request request;
  if (!input) throw failure("rkllm_input is NULL");
  for (int i = 0; i < session.batches(); ++i)
    request.inputs.push_back(input_of(input[i], session.hidden_size()));
  if (!infer) return request;
  switch (infer->mode) {
    case RKLLM_INFER_GENERATE:
      break;
    case RKLLM_INFER_GET_LAST_HIDDEN_LAYER:
      request.mode = rkemu::Mode::last_hidden;
      break;
#if RKEMU_LAYOUT >= 4
    case RKLLM_INFER_GET_LOGITS:
      request.mode = rkemu::Mode::logits;
      break;
#endif
    default:
      throw failure(rkemu::format("unknown infer mode %u", static_cast<unsigned>(infer->mode)));
  }
  if (infer->lora_params && infer->lora_params->lora_adapter_name) {
    request.lora = infer->lora_params->lora_adapter_name;
  }
  if (infer->prompt_cache_params && infer->prompt_cache_params->save_prompt_cache) {
    const char* path = infer->prompt_cache_params->prompt_cache_path;
    request.save_prompt_cache = path && *path ? path : "./prompt_cache.bin";
  }
#if RKEMU_LAYOUT >= 4
  request.keep_history = infer->keep_history != 0;
#endif
#if RKEMU_LAYOUT >= 7
  request.max_new_tokens = infer->max_new_tokens;
  if (const RKLLMSamplingParam* s = infer->sampling_params) {
    request.sampling = rkemu::Sampling{s->top_k,
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

RKLLMResult result_of(const rkemu::Result& from) {
  RKLLMResult result{};
  result.text = from.text;
  result.token_id = from.token;
  if (from.hidden) result.last_hidden_layer = {from.hidden, from.width, from.rows};
#if RKEMU_LAYOUT >= 4
  if (from.logits) result.logits = {from.logits, from.width, from.rows};
#endif
#if RKEMU_LAYOUT >= 6
  result.perf = {from.perf.prefill_ms, from.perf.prefill_tokens, from.perf.generate_ms,
                 from.perf.generated_tokens, from.perf.memory_mb};
#endif
  return result;
}

LLMCallState state_of(rkemu::State state) {
  switch (state) {
    case rkemu::State::normal:
      return RKLLM_RUN_NORMAL;
    case rkemu::State::waiting:
      return RKLLM_RUN_WAITING;
    case rkemu::State::finish:
      return RKLLM_RUN_FINISH;
    case rkemu::State::error:
      return RKLLM_RUN_ERROR;
    case rkemu::State::last_hidden:
      break;
  }
#if RKEMU_LAYOUT == 3
  return RKLLM_RUN_GET_LAST_HIDDEN_LAYER;
#else
  return RKLLM_RUN_NORMAL;
#endif
}

bool call(LLMResultCallback callback, void* userdata, const std::vector<rkemu::Result>& from,
          rkemu::State state) {
  std::vector<RKLLMResult> results;
  for (const rkemu::Result& result : from) results.push_back(result_of(result));
#if RKEMU_LAYOUT >= 6
  return callback(results.data(), userdata, state_of(state)) == kPause;
#else
  callback(results.data(), userdata, state_of(state));
  return false;
#endif
}

// A run that can start: the handle is marked as running, and the client's memory is no longer
// needed.
struct Run {
  std::shared_ptr<Handle> handle;
  rkemu::Request request;
  void* userdata;

  int operator()() const {
    const int status = guarded([&] {
      handle->session().run(request,
                            [&](const std::vector<rkemu::Result>& results, rkemu::State state) {
                              return call(handle->callback(), userdata, results, state);
                            });
    });
    handle->end();
    return status;
  }
};

int start_run(LLMHandle key, RKLLMInput* input, RKLLMInferParam* infer, void* userdata,
              bool async) {
  int status = kOk;
  const int started = guarded([&] {
    const auto handle = known(key);
    if (!handle->begin()) throw failure("the handle is running");
    try {
      const Run run{handle, request_of(input, infer, handle->session()),
                    userdata ? userdata : handle->userdata()};
      if (async) {
        handle->start(run);
      } else {
        status = run();
      }
    } catch (...) {
      handle->end();
      throw;
    }
  });
  return started == kOk ? status : started;
}

}  // namespace

extern "C" {

RKLLMParam rkllm_createDefaultParam() {
  RKLLMParam param{};
  const rkemu::Settings settings;
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
#if RKEMU_LAYOUT >= 4
  param.n_keep = settings.n_keep;
  param.extend_param.enabled_cpus_num = kDefaultCpus;
  param.extend_param.enabled_cpus_mask = kBigCores;
#endif
#if RKEMU_LAYOUT >= 6
  param.extend_param.n_batch = 1;
#endif
  return param;
}

int rkllm_init(LLMHandle* handle, RKLLMParam* param, RKLLMInitCallback callback) {
  const int status = guarded([&] {
    if (!handle || !param) throw failure("rkllm_init: handle or param is NULL");
    *handle = nullptr;
    *handle = Registry::get().add(load(*param, callback));
  });
  if (status != kOk) rkemu::error("rkllm_init failed");
  return status;
}

int rkllm_destroy(LLMHandle handle) {
  return guarded([&] {
    const auto taken = Registry::get().take(handle);
    if (!taken) throw failure("invalid handle");
    taken->close();
  });
}

int rkllm_run(LLMHandle handle, RKLLMInput* input, RKLLMInferParam* infer_params, void* userdata) {
  return start_run(handle, input, infer_params, userdata, false);
}

int rkllm_run_async(LLMHandle handle, RKLLMInput* input, RKLLMInferParam* infer_params,
                    void* userdata) {
  return start_run(handle, input, infer_params, userdata, true);
}

int rkllm_abort(LLMHandle handle) {
  return guarded([&] { known(handle)->session().abort(); });
}

// 1 while a run works, as users measured on every release (rknn-llm issue 502), whatever the older
// headers say.
int rkllm_is_running(LLMHandle handle) {
  const auto found = Registry::get().find(handle);
  return found ? (found->running() ? 1 : 0) : kError;
}

int rkllm_load_lora(LLMHandle handle, RKLLMLoraAdapter* lora_adapter) {
  return on_idle(handle, [&](Session& session) {
    if (!lora_adapter || !lora_adapter->lora_adapter_path || !lora_adapter->lora_adapter_name) {
      throw failure("lora adapter: path or name is NULL");
    }
    session.load_lora(lora_adapter->lora_adapter_name, lora_adapter->lora_adapter_path,
                      lora_adapter->scale);
  });
}

int rkllm_load_prompt_cache(LLMHandle handle, const char* prompt_cache_path) {
  return on_idle(handle,
                 [&](Session& session) { session.load_prompt_cache(text_of(prompt_cache_path)); });
}

int rkllm_release_prompt_cache(LLMHandle handle) {
  return on_idle(handle, [](Session& session) { session.release_prompt_cache(); });
}

#if RKEMU_LAYOUT >= 6
int rkllm_clear_kv_cache(LLMHandle handle, int keep_system_prompt, int* start_pos, int* end_pos) {
  return on_idle(handle, [&](Session& session) {
    if (!start_pos || !end_pos) {
      session.clear_cache(keep_system_prompt != 0);
      return;
    }
    for (int i = 0; i < session.batches(); ++i) session.clear_range(i, start_pos[i], end_pos[i]);
  });
}

int rkllm_get_kv_cache_size(LLMHandle handle, int* cache_sizes) {
  return on_idle(handle, [&](Session& session) {
    if (!cache_sizes) throw failure("cache_sizes is NULL");
    for (int i = 0; i < session.batches(); ++i) cache_sizes[i] = session.cache_length(i);
  });
}

int rkllm_set_function_tools(LLMHandle handle, const char* system_prompt, const char* tools,
                             const char* tool_response_str) {
  return on_idle(handle, [&](Session& session) {
    if (!tools || !*tools) throw failure("function tools are empty");
    session.set_function_tools(text_of(system_prompt), tools, text_of(tool_response_str));
  });
}

int rkllm_set_cross_attn_params(LLMHandle handle, RKLLMCrossAttnParam*) {
  return on_idle(handle, [](Session&) { throw failure("Gemma 2 has no cross attention"); });
}
#elif RKEMU_LAYOUT >= 4
int rkllm_clear_kv_cache(LLMHandle handle, int keep_system_prompt) {
  return on_idle(handle, [&](Session& session) { session.clear_cache(keep_system_prompt != 0); });
}
#endif

#if RKEMU_LAYOUT >= 4
int rkllm_set_chat_template(LLMHandle handle, const char* system_prompt, const char* prompt_prefix,
                            const char* prompt_postfix) {
  return on_idle(handle, [&](Session& session) {
    session.set_chat_template(
        {text_of(system_prompt), text_of(prompt_prefix), text_of(prompt_postfix)});
  });
}
#endif

}  // extern "C"

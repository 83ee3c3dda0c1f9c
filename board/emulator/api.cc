// The exported functions. No exception leaves this file, except for the unwinding of a thread that
// the client ends in its own callback.
#include <cxxabi.h>
#include <pthread.h>
#include <unistd.h>

#include <memory>
#include <string>

#include "abi.h"
#include "convert.h"
#include "faults.h"
#include "handles.h"
#include "log.h"
#include "session.h"

namespace {

using rkemu::failure;
using rkemu::Failure;
using rkemu::Handle;
using rkemu::Registry;
using rkemu::Session;

// The text by which programs find a library's release, as in the vendor's file.
__attribute__((used)) const char kSdk[] =
    "RKLLM SDK (version: " RKEMU_RELEASE " | target: Linux | build: emulator, no NPU is used)";

constexpr int kOk = 0, kError = -1;

std::string text_of(const char* text) {
  return text ? text : "";
}

// Sets whether the thread may be cancelled: in the client's callbacks it may, but not where our
// threads wait for each other.
class Cancellable {
 public:
  explicit Cancellable(int state) { pthread_setcancelstate(state, &before_); }
  ~Cancellable() { pthread_setcancelstate(before_, nullptr); }
  Cancellable(const Cancellable&) = delete;
  Cancellable& operator=(const Cancellable&) = delete;

 private:
  int before_ = PTHREAD_CANCEL_ENABLE;
};

// Runs `work`, and turns an exception into a line on stderr and -1.
template <class Work>
int guarded(const Work& work) {
  const Cancellable not_here(PTHREAD_CANCEL_DISABLE);
  try {
    work();
    return kOk;
  } catch (abi::__forced_unwind&) {
    throw;
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

// A handle that was not running, and is marked as running until the last copy of this is gone.
std::shared_ptr<Handle> taken(LLMHandle key) {
  const auto handle = known(key);
  if (!handle->begin()) throw failure("the handle is running");
  return {handle.get(), [handle](Handle* running) { running->end(); }};
}

// Runs `work(session)` on a handle that is not running.
template <class Work>
int on_idle(LLMHandle key, const Work& work) {
  return guarded([&] { work(taken(key)->session()); });
}

LLMHandle load(const RKLLMParam& param, RKLLMInitCallback callback) {
  rkemu::Faults faults = rkemu::Faults::from_environment();
  rkemu::Settings settings = rkemu::settings_of(param);
  settings.device = faults.device();
  faults.strike(rkemu::Stage::device, settings.model_path);
  settings.device.warn_if_old();
  rkemu::info(std::string("rkllm-runtime version: ") + rkemu::rules().release +
              ", rknpu driver version: " + settings.device.driver +
              ", platform: " + settings.device.platform);
  rkemu::Client client = rkemu::client_of(callback, settings);
  rkemu::info("loading rkllm model from " + settings.model_path);
  if (!Registry::get().empty()) faults.strike(rkemu::Stage::second_init, settings.model_path);
  const bool pretend = faults.strike(rkemu::Stage::open, settings.model_path);
  return Registry::get().add(
      std::make_unique<Session>(rkemu::rules(), settings, std::move(faults), pretend),
      std::move(client.deliver), client.userdata);
}

// A run that is ready to start, without pointers into the client's memory.
struct Run {
  std::shared_ptr<Handle> handle;  // taken
  rkemu::Request request;
  void* userdata;
  bool async;

  int operator()() const {
    const auto& guesses = handle->session().guesses();
    const int status = guarded([&] {
      handle->session().run(request, handle->aborted(),
                            [&](const std::vector<rkemu::Result>& results, rkemu::State state) {
                              using rkemu::State;
                              if (state == State::finish || state == State::error) handle->ending();
                              if (state == State::error && guesses.error_status_only && !async)
                                return false;
                              const Cancellable here(PTHREAD_CANCEL_ENABLE);
                              return handle->deliver()(userdata, results, state);
                            });
    });
    return guesses.abort_fails && handle->aborted() ? kError : status;
  }
};

int start_run(LLMHandle key, RKLLMInput* input, RKLLMInferParam* infer, void* userdata,
              bool async) {
  int status = kOk;
  const int started = guarded([&] {
    const auto handle = taken(key);
    if (async && handle->session().loses_runs()) return;
    const Run run{handle, rkemu::request_of(input, infer, handle->session()),
                  userdata ? userdata : handle->userdata(), async};
    if (async) {
      handle->start([run] { run(); });
    } else {
      status = run();
    }
  });
  return started == kOk ? status : started;
}

}  // namespace

extern "C" {

RKLLMParam rkllm_createDefaultParam() {
  return rkemu::default_param();
}

int rkllm_init(LLMHandle* handle, RKLLMParam* param, RKLLMInitCallback callback) {
  const int status = guarded([&] {
    if (!handle || !param) throw failure("rkllm_init: handle or param is NULL");
    *handle = nullptr;
    *handle = load(*param, callback);
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

// Clients call this and rkllm_is_running in signal handlers: see Control.
int rkllm_abort(LLMHandle handle) {
  if (rkemu::Control* control = Registry::control(handle)) {
    control->abort = true;
    return kOk;
  }
  constexpr char kLine[] = "E rkllm: invalid handle\n";
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, kLine, sizeof kLine - 1);
  return kError;
}

// 1 during a run, as users measured on every release (rknn-llm issue 502), although the older
// headers say otherwise.
int rkllm_is_running(LLMHandle handle) {
  const rkemu::Control* control = Registry::control(handle);
  return control ? (control->running ? 1 : 0) : kError;
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

#if RKEMU_LAYOUT >= RKEMU_1_2_1
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
  const auto report = [&](Session& session) {
    if (!cache_sizes) throw failure("cache_sizes is NULL");
    for (int i = 0; i < session.batches(); ++i) cache_sizes[i] = session.cache_length(i);
  };
  const auto found = Registry::get().find(handle);
  if (found && found->mine()) return guarded([&] { report(found->session()); });
  return on_idle(handle, report);
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
#elif RKEMU_LAYOUT >= RKEMU_1_2_0
int rkllm_clear_kv_cache(LLMHandle handle, int keep_system_prompt) {
  return on_idle(handle, [&](Session& session) { session.clear_cache(keep_system_prompt != 0); });
}
#endif

#if RKEMU_LAYOUT >= RKEMU_1_2_0
int rkllm_set_chat_template(LLMHandle handle, const char* system_prompt, const char* prompt_prefix,
                            const char* prompt_postfix) {
  return on_idle(handle, [&](Session& session) {
    session.set_chat_template(
        {text_of(system_prompt), text_of(prompt_prefix), text_of(prompt_postfix)});
  });
}
#endif

}  // extern "C"

#include "session.h"

#include <cxxabi.h>

#include <cmath>
#include <utility>

#include "log.h"

namespace rkemu {

namespace {

constexpr uint64_t kSeed = 20240731;

}  // namespace

Session::Session(const Rules& rules, const Settings& settings, Faults faults, bool pretend)
    : loaded_(rules, settings, std::move(faults), pretend) {
  conversations_ = empty_conversations();
  loaded_.faults.strike(Stage::loaded, loaded_.settings.model_path);
}

std::vector<Conversation> Session::empty_conversations() const {
  const auto seed = static_cast<uint64_t>(env_number("RKEMU_SEED", kSeed, 0, INT64_MAX));
  const Engine* weights = loaded_.weights.get();
  std::vector<Conversation> made;
  for (int i = 0; i < loaded_.settings.n_batch; ++i) {
    made.emplace_back(Cache(loaded_.card.config, weights ? loaded_.settings.max_context : 1,
                            weights && weights->model.quantized()),
                      Sampler(seed + static_cast<uint64_t>(i)));
  }
  return made;
}

const Adapter* Session::adapter(const std::optional<std::string>& name) const {
  if (!name) return nullptr;
  const auto found = adapters_.find(*name);
  if (found == adapters_.end()) throw failure("lora adapter '" + *name + "' is not loaded");
  return found->second.get();
}

void Session::run(const Request& request, const std::atomic<bool>& abort, const Sink& sink) {
  const bool null_text = loaded_.faults.with(Act::null_text) != nullptr;
  const Sink told = [&](std::vector<Result> results, State state) {
    for (Result& result : results) {
      if (null_text) result.text = nullptr;
    }
    return sink(results, state);
  };
  Run run(loaded_, request, abort, told);
  try {
    loaded_.faults.strike(Stage::run, loaded_.settings.model_path);
    compute(run, request);
  } catch (abi::__forced_unwind&) {  // the client's callback ends its thread
    clear_cache(false);
    throw;
  } catch (...) {
    clear_cache(false);
    told(std::vector<Result>(conversations_.size()), State::error);
    throw;
  }
  aborted_ = abort;
  if (!run.paused()) run.finish();
}

void Session::compute(Run& run, const Request& request) {
  loaded_.engine();
  if (paused() && guesses().pause_resumes) {
    const std::string& name = conversations_[0].adapter;  // which may have been loaded again
    run.resume(std::exchange(paused_, {}),
               adapter(name.empty() ? std::nullopt : std::optional(name)));
  } else {
    const Adapter* lora = adapter(request.lora);
    const bool continues = request.keep_history && !guesses().history_ignored;
    const bool history = continues || paused() || (aborted_ && guesses().abort_lingers);
    paused_.clear();
    const bool apart = request.mode == Mode::logits && guesses().logits_apart;
    if (apart) aside_ = empty_conversations();
    run.compute(apart ? aside_ : conversations_,
                prompt_cache_loaded_ ? Run::Past::prompt_cache
                : history            ? Run::Past::history
                                     : Run::Past::prefix,
                lora);
  }
  if (!run.paused()) return;
  paused_ = run.take();
  if (guesses().pause_drops) clear_cache(false);
}

void Session::clear_cache(bool keep_system_prompt) {
  for (Conversation& conversation : conversations_) {
    conversation.cache.truncate(keep_system_prompt ? conversation.system_length : 0);
    conversation.pending.reset();
  }
  paused_.clear();
}

void Session::clear_range(int batch, int begin, int end) {
  Conversation& conversation = conversations_[static_cast<size_t>(batch)];
  const int length = conversation.cache.length();
  if (begin < 0 || begin >= end || end > length) {
    throw failure(
        format("cannot clear positions %d to %d of a KV cache of %d", begin, end, length));
  }
  if (!paused()) warn("KV cache ranges are documented for paused runs with keep_history 0 only");
  if (end == length) conversation.pending.reset();
  loaded_.engine().forward.erase(conversation.cache, begin, end);
}

void Session::load_lora(const std::string& name, const std::string& path, float scale) {
  if (!std::isfinite(scale))
    throw failure("the scale of lora adapter '" + name + "' is not a number");
  adapters_[name] =
      std::make_unique<Adapter>(path, loaded_.engine().model, loaded_.file.fingerprint(), scale);
}

void Session::load_prompt_cache(const std::string& path) {
  clear_cache(false);
  read_prompt_cache(path, loaded_.file.fingerprint(), conversations_[0].cache, loaded_.card.config);
  prompt_cache_loaded_ = true;
}

void Session::release_prompt_cache() {
  if (prompt_cache_loaded_) clear_cache(false);
  prompt_cache_loaded_ = false;
}

void Session::set_chat_template(const ChatTemplate& chat_template) {
  warn(
      "Calling rkllm_set_chat_template will disable the internal automatic chat template parsing, "
      "including "
      "enable_thinking. Make sure your custom prompt is complete and valid.");
  loaded_.chat_template = chat_template;
  clear_cache(false);
  info("reset chat template:\nsystem_prompt: " + loaded_.chat_template.system +
       "\nprompt_prefix: " + loaded_.chat_template.prefix +
       "\nprompt_postfix: " + loaded_.chat_template.suffix);
}

void Session::set_function_tools(const std::string& system, const std::string& tools,
                                 const std::string& tag) {
  loaded_.chat_template.system = system + "\n" + tools + "\n";
  if (!tag.empty()) loaded_.tool_tag = tag;
  clear_cache(false);
}

}  // namespace rkemu

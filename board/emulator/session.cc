#include "session.h"

#include <algorithm>
#include <cmath>
#include <thread>

#include "log.h"
#include "npu.h"

namespace rkemu {

namespace {

// A prompt may fill the context but for these (seen: "max context: 1020" for a context of 1024,
// rkllama issue 25).
constexpr int kReserved = 4;
constexpr long kMaxPause = 10'000'000;
constexpr uint64_t kSeed = 20240731;

// FNV-1a over a row's bytes, below zero so that it is no token id.
Key key_of_row(const float* row, int width) {
  uint64_t hash = 14695981039346656037u;
  const auto* bytes = reinterpret_cast<const uint8_t*>(row);
  for (size_t i = 0; i < static_cast<size_t>(width) * sizeof(float); ++i) {
    hash = (hash ^ bytes[i]) * 1099511628211u;
  }
  return static_cast<Key>(hash | (uint64_t{1} << 63));
}

int threads_for(int cpus) {
  const auto hardware = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return std::clamp(cpus, 1, hardware);
}

}  // namespace

Engine::Engine(const File& file, const Config& config, int threads)
    : model(file, config),
      tokenizer(file, static_cast<size_t>(config.vocab_size)),
      pool(threads),
      forward(model, pool, choose_kernels()) {}

Session::Session(const Rules& rules, const Settings& settings, Faults faults, bool pretend)
    : rules_(rules),
      settings_(settings),
      faults_(std::move(faults)),
      token_us_(env_number("RKEMU_TOKEN_US", 0, 0, kMaxPause)),
      prompt_token_us_(env_number("RKEMU_PROMPT_TOKEN_US", 0, 0, kMaxPause)) {
  if (!pretend) {
    file_ = File::open(settings_.model_path);
    card_ = read_card(file_);
    template_ = card_.chat_template;
    report_load();
    check_load();
    faults_.strike(Stage::memory, settings_.model_path);
    memory_ = Reservation(blocks_of(file_, card_, settings_.max_context, settings_.n_batch),
                          settings_.domain, settings_.device, rules_.release);
    if (!file_.sizes_only()) {
      engine_ = std::make_unique<Engine>(file_, card_.config, threads_for(settings_.cpus));
    }
  }
  const auto seed = static_cast<uint64_t>(env_number("RKEMU_SEED", kSeed, 0, INT64_MAX));
  const bool half = engine_ && engine_->model.quantized();
  for (int i = 0; i < settings_.n_batch; ++i) {
    sequences_.emplace_back(Cache(card_.config, engine_ ? settings_.max_context : 1, half),
                            Sampler(seed + static_cast<uint64_t>(i)));
  }
  if (!settings_.device.runs_jobs()) rubbish_ = "E rkllm: matmul(w8a8) run failed";
  if (const Fault* fault = faults_.with(Act::rubbish)) rubbish_ = fault->lines;
  if (faults_.with(Act::no_template)) template_ = {};
  faults_.strike(Stage::loaded, settings_.model_path);
}

void Session::report_load() const {
  std::string line =
      "rkllm-toolkit version: " + card_.toolkit_version +
      format(", max_context_limit: %d, npu_core_num: %d", card_.max_context, card_.npu_cores);
  if (rules_.names_platform) line += ", target_platform: " + card_.target_platform;
  if (rules_.names_dtype) line += ", model_dtype: " + card_.dtype;
  info(line);
  info(format("emulator: no NPU is used, %s kernels, %d threads", choose_kernels().name,
              threads_for(settings_.cpus)));
}

void Session::check_load() {
  if (settings_.max_context <= 0) settings_.max_context = std::min(512, card_.max_context);
  if (settings_.max_context > card_.max_context) {
    throw failure(format("max_context[%d] must be less than the model's max_context_limit[%d]",
                         settings_.max_context, card_.max_context));
  }
  if (card_.target_platform != settings_.device.platform) {
    throw failure("model's target_platform does not match the real platform (" +
                  card_.target_platform + ", " + settings_.device.platform + ")");
  }
  if (version_number(card_.toolkit_version) > version_number(rules_.release)) {
    warn("runtime version is lower than the toolkit version, update to " + card_.toolkit_version);
  }
  if (settings_.cpus < card_.npu_cores) {
    throw failure(
        "The number of enabled CPUs must be greater than or equal to the number of NPU cores.");
  }
}

std::vector<int32_t> Session::tokenize(const std::string& text) {
  if (!engine().tokenizer.has_tables() && settings_.tokenize) return settings_.tokenize(text);
  return engine().tokenizer.encode(text, true);
}

Engine& Session::engine() const {
  if (!engine_) throw failure("there are no weights to compute with");
  return *engine_;
}

// Text gets the template around it, and the system prompt and <bos> in front of a conversation's
// first turn.
void Session::start_text(Sequence& sequence, const Input& input, bool first) {
  std::string head, body = input.text;
  if (rules_.chat_template) {
    if (input.tool) body = "<" + tool_tag_ + ">\n" + body + "\n</" + tool_tag_ + ">";
    head = first ? template_.system : "";
    body = template_.prefix + body + template_.suffix;
  }
  const auto add = [&](const std::vector<int32_t>& ids) {
    sequence.keys.insert(sequence.keys.end(), ids.begin(), ids.end());
  };
  if (first && engine().tokenizer.add_bos()) sequence.keys.push_back(engine().tokenizer.bos());
  // The system prompt's length is that of its own tokens: the cache of the whole text may merge
  // across the border.
  if (!head.empty())
    sequence.system_length = static_cast<int>(sequence.keys.size() + tokenize(head).size());
  add(tokenize(head + body));
  if (log_level() >= 2) info("prompt: " + head + body);
}

void Session::prepare(Sequence& sequence, const Input& input, const Request& request) {
  const bool goes_on =
      (request.keep_history || paused_) && !prompt_cache_loaded_ && sequence.cache.length() > 0;
  sequence.keys.clear();
  sequence.rows.clear();
  sequence.collected.clear();
  sequence.bytes.clear();
  sequence.done = false;
  sequence.token = -1;
  if (goes_on && sequence.pending) sequence.keys.push_back(*sequence.pending);
  sequence.pending.reset();
  switch (input.kind) {
    case Input::Kind::text:
      start_text(sequence, input, !goes_on);
      break;
    case Input::Kind::tokens:
      sequence.keys.insert(sequence.keys.end(), input.tokens.begin(), input.tokens.end());
      break;
    case Input::Kind::embeddings:
      sequence.rows = input.rows;
      for (size_t i = 0; i < input.rows.size(); i += static_cast<size_t>(hidden_size())) {
        sequence.keys.push_back(key_of_row(input.rows.data() + i, hidden_size()));
      }
      break;
  }
  if (sequence.keys.empty()) throw failure("the prompt is empty");
  for (const Key key : sequence.keys) {
    if (key >= card_.config.vocab_size) {
      throw failure(format("token %lld is not in the vocabulary of %d", static_cast<long long>(key),
                           card_.config.vocab_size));
    }
  }
  const bool whole = request.mode != Mode::generate;
  const bool same_adapter = sequence.adapter == request.lora.value_or("");
  const bool may_reuse =
      input.kind == Input::Kind::embeddings ? rules_.embedding_reuse : rules_.prefix_reuse;
  if (!goes_on)
    reuse_prefix(sequence, same_adapter && !whole && (may_reuse || prompt_cache_loaded_));
  sequence.adapter = request.lora.value_or("");
  make_room(sequence, sequence.keys.size());
  sequence.prompt_length = sequence.cache.length() + static_cast<int>(sequence.keys.size());

  sequence.sampler.start(request.sampling.value_or(settings_.sampling));
  for (const Key key : sequence.keys) {
    if (key >= 0) sequence.sampler.accept(static_cast<int32_t>(key));
  }
}

void Session::reuse_prefix(Sequence& sequence, bool allowed) {
  const auto& have = sequence.cache.contents();
  size_t common = 0;
  while (allowed && common + 1 < sequence.keys.size() && common < have.size() &&
         have[common] == sequence.keys[common]) {
    ++common;
  }
  sequence.cache.truncate(static_cast<int>(common));
  const auto known = sequence.keys.begin() + static_cast<std::ptrdiff_t>(common);
  const auto rows = std::count_if(sequence.keys.begin(), known, [](Key key) { return key < 0; });
  sequence.rows.erase(sequence.rows.begin(), sequence.rows.begin() + rows * hidden_size());
  sequence.keys.erase(sequence.keys.begin(), known);
}

// When a conversation is full, its oldest half goes, behind n_keep positions (all of the system
// prompt if it is -1).
void Session::make_room(Sequence& sequence, size_t needed) {
  const int limit = settings_.max_context - kReserved;
  Cache& cache = sequence.cache;
  const int want = cache.length() + static_cast<int>(std::min<size_t>(needed, 1u << 30));
  if (want <= limit) return;
  const int kept =
      std::min(settings_.n_keep < 0 ? sequence.system_length : settings_.n_keep, cache.length());
  if (kept + static_cast<int>(std::min<size_t>(needed, 1u << 30)) > limit) {
    throw Failure(
        format("E rkllm: prompt gather than max context (prompt: %zu tokens, max context: %d)",
               needed, limit));
  }
  const int gone =
      std::min(std::max(want - limit, (cache.length() - kept) / 2), cache.length() - kept);
  engine().forward.erase(cache, kept, kept + gone);
}

void Session::clear_cache(bool keep_system_prompt) {
  for (Sequence& sequence : sequences_) {
    sequence.cache.truncate(keep_system_prompt ? sequence.system_length : 0);
    sequence.pending.reset();
  }
  paused_ = false;
}

void Session::clear_range(int batch, int begin, int end) {
  Sequence& sequence = sequences_[static_cast<size_t>(batch)];
  const int length = sequence.cache.length();
  if (begin < 0 || begin >= end || end > length) {
    throw failure(
        format("cannot clear positions %d to %d of a KV cache of %d", begin, end, length));
  }
  if (!paused_) warn("KV cache ranges are documented for paused runs with keep_history 0 only");
  if (end == length) sequence.pending.reset();
  engine().forward.erase(sequence.cache, begin, end);
}

void Session::load_lora(const std::string& name, const std::string& path, float scale) {
  if (!std::isfinite(scale))
    throw failure("the scale of lora adapter '" + name + "' is not a number");
  adapters_[name] = std::make_unique<Adapter>(path, engine().model, file_.fingerprint(), scale);
}

void Session::load_prompt_cache(const std::string& path) {
  clear_cache(false);
  read_prompt_cache(path, file_.fingerprint(), sequences_[0].cache, card_.config);
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
  template_ = chat_template;
  clear_cache(false);
  info("reset chat template:\nsystem_prompt: " + template_.system +
       "\nprompt_prefix: " + template_.prefix + "\nprompt_postfix: " + template_.suffix);
}

void Session::set_function_tools(const std::string& system, const std::string& tools,
                                 const std::string& tag) {
  template_.system = system + "\n" + tools + "\n";
  if (!tag.empty()) tool_tag_ = tag;
  clear_cache(false);
}

}  // namespace rkemu

#include "session.h"

#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <numeric>
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

float milliseconds(std::chrono::steady_clock::duration time) {
  return std::chrono::duration<float, std::milli>(time).count();
}

float peak_memory_mb() {
  struct rusage usage {};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<float>(usage.ru_maxrss) / 1024.0f;
}

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

Session::Session(const Rules& rules, const Settings& settings)
    : rules_(rules),
      settings_(settings),
      file_(File::open(settings.model_path)),
      card_(read_card(file_)),
      model_(file_, card_.config),
      tokenizer_(file_, static_cast<size_t>(card_.config.vocab_size)),
      pool_(threads_for(settings.cpus)),
      forward_(model_, pool_, choose_kernels()),
      template_(card_.chat_template),
      token_us_(env_number("RKEMU_TOKEN_US", 0, 0, kMaxPause)),
      prompt_token_us_(env_number("RKEMU_PROMPT_TOKEN_US", 0, 0, kMaxPause)) {
  report_load();
  check_load();
  if (settings_.max_context <= 0) settings_.max_context = std::min(512, card_.max_context);
  if (settings_.max_context > card_.max_context) {
    throw failure(format("max_context[%d] must be less than the model's max_context_limit[%d]",
                         settings_.max_context, card_.max_context));
  }
  const auto seed = static_cast<uint64_t>(env_number("RKEMU_SEED", kSeed, 0, INT64_MAX));
  for (int i = 0; i < settings_.n_batch; ++i) {
    sequences_.push_back({Cache(card_.config, settings_.max_context, model_.quantized()),
                          Sampler(seed + static_cast<uint64_t>(i)),
                          {},
                          0,
                          0,
                          "",
                          {},
                          {},
                          {},
                          {},
                          "",
                          "",
                          -1,
                          false});
  }
}

void Session::report_load() const {
  std::string line =
      "rkllm-toolkit version: " + card_.toolkit_version +
      format(", max_context_limit: %d, npu_core_num: %d", card_.max_context, card_.npu_cores);
  if (rules_.names_platform) line += ", target_platform: " + card_.target_platform;
  if (rules_.names_dtype) line += ", model_dtype: " + card_.dtype;
  info(line);
  info(format("emulator: no NPU is used, %s kernels, %d threads", choose_kernels().name,
              pool_.size()));
}

void Session::check_load() const {
  if (card_.target_platform != platform()) {
    throw failure("model's target_platform does not match the real platform (" +
                  card_.target_platform + ", " + platform() + ")");
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
  if (!tokenizer_.has_tables() && settings_.tokenize) return settings_.tokenize(text);
  return tokenizer_.encode(text, true);
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
  if (first && tokenizer_.add_bos()) sequence.keys.push_back(tokenizer_.bos());
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
  forward_.erase(cache, kept, kept + gone);
}

void Session::embed(Key key, const float*& row, float* out) const {
  const auto width = static_cast<size_t>(hidden_size());
  if (key < 0) {
    std::copy_n(row, width, out);
    row += width;
  } else if (model_.has_embedding()) {
    model_.embed(static_cast<int32_t>(key), out);
  } else if (!settings_.embed) {
    throw failure("the model has no embedding table and there is no embedding callback");
  } else if (!settings_.embed(static_cast<int32_t>(key), out, width * sizeof(float))) {
    throw failure("the embedding callback failed");
  }
  forward_.scale_embedding(out);
}

// Computes the prompt in chunks.
void Session::prefill(Sequence& sequence, Mode mode) {
  std::vector<float>& collected = sequence.collected;
  const auto width = static_cast<size_t>(hidden_size());
  const auto vocab = static_cast<size_t>(card_.config.vocab_size);
  const float* row = sequence.rows.data();
  std::vector<float> x;
  for (size_t start = 0; start < sequence.keys.size() && !abort_; start += Forward::kChunk) {
    const size_t n = std::min<size_t>(Forward::kChunk, sequence.keys.size() - start);
    const auto began = Clock::now();
    std::vector<Row> rows;
    x.resize(n * width);
    for (size_t i = 0; i < n; ++i) embed(sequence.keys[start + i], row, x.data() + i * width);
    for (size_t i = 0; i < n; ++i) {
      rows.push_back({&sequence.cache, sequence.cache.length()});
      sequence.cache.append(sequence.keys[start + i]);
    }
    forward_.run(rows, x.data(), adapter_);
    if (mode == Mode::last_hidden) {
      collected.insert(collected.end(), x.begin(), x.end());
    } else if (mode == Mode::logits) {
      collected.resize(collected.size() + n * vocab);
      forward_.logits(x.data(), static_cast<int>(n),
                      collected.data() + collected.size() - n * vocab);
    }
    perf_.prefill_tokens += static_cast<int>(n);
    pace(began, prompt_token_us_ * static_cast<long>(n));
  }
  if (abort_ || mode == Mode::last_hidden) return;
  sequence.logits.resize(vocab);
  if (mode == Mode::logits) {
    std::copy(collected.end() - static_cast<std::ptrdiff_t>(vocab), collected.end(),
              sequence.logits.begin());
  } else {
    forward_.logits(x.data() + x.size() - width, 1, sequence.logits.data());
  }
}

bool Session::ends(int32_t token) const {
  const auto& eos = tokenizer_.eos();
  if (settings_.ignore_eos_token || eos.empty()) return false;
  return rules_.all_eos ? std::find(eos.begin(), eos.end(), token) != eos.end()
                        : token == eos.front();
}

// Takes the next token of a sequence and what of its text is complete; false if the answer ended.
bool Session::choose(Sequence& sequence) {
  sequence.token = sequence.sampler.pick(sequence.logits);
  sequence.sampler.accept(sequence.token);
  sequence.pending = sequence.token;
  sequence.text.clear();
  if (ends(sequence.token)) return false;
  const bool hidden =
      settings_.skip_special_token && tokenizer_.kind(sequence.token) == TokenKind::control;
  sequence.bytes += hidden ? "" : tokenizer_.decode(sequence.token);
  const size_t complete = sequence.bytes.size() - utf8_unfinished(sequence.bytes);
  sequence.text = sequence.bytes.substr(0, complete);
  sequence.bytes.erase(0, complete);
  return true;
}

// Tells the client of the tokens just chosen; true if it wants a pause.
bool Session::report_tokens(const Sink& sink, Mode mode, bool first) {
  std::vector<Result> results;
  bool waiting = true;
  for (Sequence& sequence : sequences_) {
    Result result;
    if (sequence.done) {
      result.text = nullptr;
    } else {
      const bool unfinished = sequence.text.empty() && !sequence.bytes.empty();
      waiting = waiting && unfinished;
      result.text = sequence.text.c_str();
      result.token = sequence.token;
      if (mode == Mode::logits) {
        const std::vector<float>& logits = first ? sequence.collected : sequence.logits;
        result.logits = logits.data();
        result.width = card_.config.vocab_size;
        result.rows = static_cast<int>(logits.size() / static_cast<size_t>(result.width));
      }
    }
    results.push_back(result);
  }
  return sink(results, waiting ? State::waiting : State::normal) && rules_.pause;
}

// Computes the chosen token of every sequence that goes on.
void Session::step() {
  const auto width = static_cast<size_t>(hidden_size());
  const auto vocab = static_cast<size_t>(card_.config.vocab_size);
  std::vector<Row> rows;
  std::vector<float> x;
  for (Sequence& sequence : sequences_) {
    if (sequence.done) continue;
    x.resize(x.size() + width);
    const float* none = nullptr;
    embed(sequence.token, none, x.data() + x.size() - width);
    rows.push_back({&sequence.cache, sequence.cache.length()});
    sequence.cache.append(sequence.token);
    sequence.pending.reset();
  }
  forward_.run(rows, x.data(), adapter_);
  std::vector<float> logits(rows.size() * vocab);
  forward_.logits(x.data(), static_cast<int>(rows.size()), logits.data());
  const float* from = logits.data();
  for (Sequence& sequence : sequences_) {
    if (sequence.done) continue;
    sequence.logits.assign(from, from + vocab);
    from += vocab;
  }
}

void Session::answer(const Request& request, const Sink& sink) {
  const int wanted = request.max_new_tokens > 0 ? request.max_new_tokens : settings_.max_new_tokens;
  const bool logits_mode = request.mode == Mode::logits;
  for (bool first = true; !abort_; first = false) {
    const auto began = Clock::now();
    bool any = false;
    for (Sequence& sequence : sequences_) {
      if (sequence.done) continue;
      const std::vector<float> kept = logits_mode ? sequence.logits : std::vector<float>();
      sequence.done = !choose(sequence);
      if (logits_mode) sequence.logits = kept;
      any = any || !sequence.done;
    }
    if (!any) return;
    ++perf_.generated_tokens;
    if (report_tokens(sink, request.mode, first)) {
      paused_ = true;
      return;
    }
    if (abort_ || (wanted > 0 && perf_.generated_tokens >= wanted)) return;
    for (Sequence& sequence : sequences_) {
      if (sequence.done || sequence.cache.length() < settings_.max_context) continue;
      if (wanted > 0) {
        make_room(sequence, 1);
      } else {
        sequence.done = true;
      }
    }
    if (std::all_of(sequences_.begin(), sequences_.end(), [](const Sequence& s) { return s.done; }))
      return;
    step();
    pace(began, token_us_);
  }
}

void Session::run(const Request& request, const Sink& sink) {
  perf_ = Perf();
  try {
    adapter_ = nullptr;
    if (request.lora) {
      const auto found = adapters_.find(*request.lora);
      if (found == adapters_.end())
        throw failure("lora adapter '" + *request.lora + "' is not loaded");
      adapter_ = found->second.get();
    }
    for (size_t i = 0; i < sequences_.size(); ++i)
      prepare(sequences_[i], request.inputs[i], request);
    paused_ = false;
    const auto began = Clock::now();
    for (Sequence& sequence : sequences_) prefill(sequence, request.mode);
    perf_.prefill_ms = milliseconds(Clock::now() - began);
    if (request.save_prompt_cache && !abort_) {
      save_prompt_cache(*request.save_prompt_cache, file_.fingerprint(), sequences_[0].cache,
                        card_.config, sequences_[0].prompt_length);
    }
  } catch (...) {
    clear_cache(false);
    sink(std::vector<Result>(sequences_.size()), State::error);
    throw;
  }
  const auto began = Clock::now();
  if (request.mode == Mode::last_hidden) {
    if (!abort_) report_hidden(sink);
  } else {
    answer(request, sink);
  }
  perf_.generate_ms = milliseconds(Clock::now() - began);
  if (!paused_) finish(sink);
}

void Session::report_hidden(const Sink& sink) {
  std::vector<Result> results;
  for (const Sequence& sequence : sequences_) {
    Result result;
    result.hidden = sequence.collected.data();
    result.width = hidden_size();
    result.rows = static_cast<int>(sequence.collected.size() / static_cast<size_t>(result.width));
    results.push_back(result);
  }
  sink(results, State::last_hidden);
}

void Session::finish(const Sink& sink) {
  perf_.memory_mb = peak_memory_mb();
  std::vector<Result> results(sequences_.size());
  for (size_t i = 0; i < results.size(); ++i) {
    results[i].token = sequences_[i].token;
    results[i].perf = perf_;
  }
  if (log_level() >= 1) {
    const auto row = [](const char* stage, float ms, int tokens) {
      const float each = tokens ? ms / static_cast<float>(tokens) : 0;
      info(format(" %-13s %-16.2f %-9d %-24.2f %.2f", stage, ms, tokens, each,
                  each > 0 ? 1000 / each : 0));
    };
    info(" Stage         Total Time (ms)  Tokens    Time per Token (ms)      Tokens per Second");
    row("Prefill", perf_.prefill_ms, perf_.prefill_tokens);
    row("Generate", perf_.generate_ms, perf_.generated_tokens);
    info(format(" Peak Memory Usage (GB): %.2f (emulator)", perf_.memory_mb / 1024));
  }
  sink(results, State::finish);
}

void Session::pace(Clock::time_point since, long microseconds) const {
  if (microseconds > 0)
    std::this_thread::sleep_until(since + std::chrono::microseconds(microseconds));
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
  forward_.erase(sequence.cache, begin, end);
}

void Session::load_lora(const std::string& name, const std::string& path, float scale) {
  if (!std::isfinite(scale))
    throw failure("the scale of lora adapter '" + name + "' is not a number");
  adapters_[name] = std::make_unique<Adapter>(path, model_, file_.fingerprint(), scale);
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

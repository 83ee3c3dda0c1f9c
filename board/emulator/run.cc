// A run, from the prompt's tokens to the last callback.
#include <cxxabi.h>
#include <sys/resource.h>

#include <algorithm>
#include <thread>

#include "log.h"
#include "session.h"

namespace rkemu {

namespace {

float milliseconds(std::chrono::steady_clock::duration time) {
  return std::chrono::duration<float, std::milli>(time).count();
}

float peak_memory_mb() {
  struct rusage usage {};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<float>(usage.ru_maxrss) / 1024.0f;
}

}  // namespace

void Session::embed(Key key, const float*& row, float* out) const {
  const auto width = static_cast<size_t>(hidden_size());
  if (key < 0) {
    std::copy_n(row, width, out);
    row += width;
  } else if (engine().model.has_embedding()) {
    engine().model.embed(static_cast<int32_t>(key), out);
  } else if (!settings_.embed) {
    throw failure("the model has no embedding table and there is no embedding callback");
  } else if (!settings_.embed(static_cast<int32_t>(key), out, width * sizeof(float))) {
    throw failure("the embedding callback failed");
  }
  engine().forward.scale_embedding(out);
}

// Computes the prompt in chunks.
void Session::prefill(Sequence& sequence, Mode mode) {
  std::vector<float>& collected = sequence.collected;
  const auto width = static_cast<size_t>(hidden_size());
  const auto vocab = static_cast<size_t>(card_.config.vocab_size);
  const float* row = sequence.rows.data();
  std::vector<float> x;
  for (size_t start = 0; start < sequence.keys.size() && !aborted(); start += Forward::kChunk) {
    const size_t n = std::min<size_t>(Forward::kChunk, sequence.keys.size() - start);
    const auto began = Clock::now();
    std::vector<Row> rows;
    x.resize(n * width);
    for (size_t i = 0; i < n; ++i) embed(sequence.keys[start + i], row, x.data() + i * width);
    for (size_t i = 0; i < n; ++i) {
      rows.push_back({&sequence.cache, sequence.cache.length()});
      sequence.cache.append(sequence.keys[start + i]);
    }
    engine().forward.run(rows, x.data(), adapter_);
    if (mode == Mode::last_hidden) {
      collected.insert(collected.end(), x.begin(), x.end());
    } else if (mode == Mode::logits) {
      collected.resize(collected.size() + n * vocab);
      engine().forward.logits(x.data(), static_cast<int>(n),
                              collected.data() + collected.size() - n * vocab);
    }
    perf_.prefill_tokens += static_cast<int>(n);
    pace(began, prompt_token_us_ * static_cast<long>(n));
  }
  if (aborted() || mode == Mode::last_hidden) return;
  sequence.logits.resize(vocab);
  if (mode == Mode::logits) {
    std::copy(collected.end() - static_cast<std::ptrdiff_t>(vocab), collected.end(),
              sequence.logits.begin());
  } else {
    engine().forward.logits(x.data() + x.size() - width, 1, sequence.logits.data());
  }
  complain();
}

// What an NPU says of each step whose jobs fail.
void Session::complain() const {
  if (rubbish_) raw(rubbish_);
}

bool Session::ends(int32_t token) const {
  const auto& eos = engine().tokenizer.eos();
  if (settings_.ignore_eos_token || eos.empty()) return false;
  if (faults_.with(Act::endless) || faults_.with(Act::padding)) return false;
  return rules_.all_eos ? std::find(eos.begin(), eos.end(), token) != eos.end()
                        : token == eos.front();
}

// Takes the next token of a sequence and what of its text is complete; false if the answer ended.
bool Session::choose(Sequence& sequence) {
  sequence.token = sequence.sampler.pick(sequence.logits);
  if (rubbish_) sequence.token = engine().tokenizer.encode("!", false).back();
  sequence.sampler.accept(sequence.token);
  sequence.pending = sequence.token;
  sequence.text.clear();
  if (ends(sequence.token)) return false;
  const bool hidden =
      settings_.skip_special_token && engine().tokenizer.kind(sequence.token) == TokenKind::control;
  sequence.bytes += hidden ? "" : engine().tokenizer.decode(sequence.token);
  const size_t unfinished = faults_.with(Act::cut_text) ? 0 : utf8_unfinished(sequence.bytes);
  const size_t complete = sequence.bytes.size() - unfinished;
  sequence.text = sequence.bytes.substr(0, complete);
  sequence.bytes.erase(0, complete);
  return true;
}

bool Session::tell(const Sink& sink, std::vector<Result> results, State state) const {
  if (faults_.with(Act::null_text)) {
    for (Result& result : results) result.text = nullptr;
  }
  return sink(results, state);
}

// Tells the client of the tokens just chosen; true if it wants a pause.
bool Session::report_tokens(const Sink& sink, Mode mode, bool first) {
  const Fault* padding = faults_.with(Act::padding);
  std::vector<Result> results;
  bool any = false, waiting = true;
  for (Sequence& sequence : sequences_) {
    Result result;
    if (sequence.done) {
      result.text = nullptr;
    } else {
      any = true;
      waiting = waiting && sequence.text.empty() && !sequence.bytes.empty();
      result.text = padding ? padding->lines : sequence.text.c_str();
      result.token = sequence.token;
    }
    // The prompt's logits come also where the answer is empty.
    if (mode == Mode::logits && (first || !sequence.done)) {
      const std::vector<float>& logits = first ? sequence.collected : sequence.logits;
      result.logits = logits.data();
      result.width = card_.config.vocab_size;
      result.rows = static_cast<int>(logits.size() / static_cast<size_t>(result.width));
    }
    results.push_back(result);
  }
  faults_.strike(Stage::token, settings_.model_path, perf_.generated_tokens);
  return tell(sink, std::move(results), any && waiting ? State::waiting : State::normal) &&
         rules_.pause;
}

// Computes the chosen token of every sequence that goes on; false if none does. A full cache ends a
// sequence, or loses its oldest positions.
bool Session::step(bool may_forget) {
  for (Sequence& sequence : sequences_) {
    if (sequence.done || sequence.cache.length() < settings_.max_context) continue;
    if (may_forget) {
      make_room(sequence, 1);
    } else {
      sequence.done = true;
    }
  }
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
  if (rows.empty()) return false;
  engine().forward.run(rows, x.data(), adapter_);
  std::vector<float> logits(rows.size() * vocab);
  engine().forward.logits(x.data(), static_cast<int>(rows.size()), logits.data());
  complain();
  const float* from = logits.data();
  for (Sequence& sequence : sequences_) {
    if (sequence.done) continue;
    sequence.logits.assign(from, from + vocab);
    from += vocab;
  }
  return true;
}

int Session::wanted_tokens(const Request& request) const {
  return request.max_new_tokens > 0 ? request.max_new_tokens : settings_.max_new_tokens;
}

void Session::answer(const Request& request, const Sink& sink) {
  const int wanted = wanted_tokens(request);
  const bool logits_mode = request.mode == Mode::logits;
  for (bool first = true; !aborted(); first = false) {
    const auto began = Clock::now();
    bool any = false;
    for (Sequence& sequence : sequences_) {
      if (sequence.done) continue;
      const std::vector<float> kept = logits_mode ? sequence.logits : std::vector<float>();
      sequence.done = !choose(sequence);
      if (logits_mode) sequence.logits = kept;
      any = any || !sequence.done;
    }
    if (any) {
      ++perf_.generated_tokens;
    } else if (!first || !logits_mode) {
      return;
    }
    const bool pause = report_tokens(sink, request.mode, first);
    if (!any) return;
    if (pause) {
      paused_ = true;
      return;
    }
    if (aborted() || (wanted > 0 && perf_.generated_tokens >= wanted)) return;
    if (!step(wanted > 0)) return;
    pace(began, token_us_);
  }
}

void Session::run(const Request& request, const std::atomic<bool>& abort, const Sink& sink) {
  perf_ = Perf();
  abort_ = &abort;
  try {
    faults_.strike(Stage::run, settings_.model_path);
    compute(request, sink);
  } catch (abi::__forced_unwind&) {  // the client's callback ends its thread
    clear_cache(false);
    throw;
  } catch (...) {
    clear_cache(false);
    tell(sink, std::vector<Result>(sequences_.size()), State::error);
    throw;
  }
  if (!paused_) finish(request.mode, sink);
}

void Session::use_adapter(const std::optional<std::string>& name) {
  adapter_ = nullptr;
  if (!name) return;
  const auto found = adapters_.find(*name);
  if (found == adapters_.end()) throw failure("lora adapter '" + *name + "' is not loaded");
  adapter_ = found->second.get();
}

void Session::compute(const Request& request, const Sink& sink) {
  engine();
  if (paused_ && guesses().pause_resumes) {
    resume(request, sink);
    return;
  }
  use_adapter(request.lora);
  for (size_t i = 0; i < sequences_.size(); ++i) prepare(sequences_[i], request.inputs[i], request);
  paused_ = false;
  auto began = Clock::now();
  for (Sequence& sequence : sequences_) prefill(sequence, request.mode);
  perf_.prefill_ms = milliseconds(Clock::now() - began);
  if (request.save_prompt_cache && !aborted() &&
      !faults_.strike(Stage::save, settings_.model_path)) {
    save_prompt_cache(*request.save_prompt_cache, file_.fingerprint(), sequences_[0].cache,
                      card_.config, sequences_[0].prompt_length);
  }
  began = Clock::now();
  if (request.mode == Mode::last_hidden) {
    if (!aborted() && !guesses().hidden_at_finish)
      tell(sink, rows_of(request.mode), State::last_hidden);
  } else if (request.mode == Mode::logits && guesses().logits_once) {
    if (!aborted()) tell(sink, rows_of(request.mode), State::normal);
  } else {
    answer(request, sink);
  }
  perf_.generate_ms = milliseconds(Clock::now() - began);
}

// The paused answer goes on, whatever the new run's input is.
void Session::resume(Request request, const Sink& sink) {
  const auto began = Clock::now();
  request.mode = Mode::generate;
  paused_ = false;
  const std::string& adapter = sequences_[0].adapter;  // it may have been loaded again
  use_adapter(adapter.empty() ? std::nullopt : std::optional(adapter));
  for (Sequence& sequence : sequences_) sequence.collected.clear();
  if (step(wanted_tokens(request) > 0)) answer(request, sink);
  perf_.generate_ms = milliseconds(Clock::now() - began);
}

// The prompt's hidden states or logits.
std::vector<Result> Session::rows_of(Mode mode) const {
  std::vector<Result> results;
  for (const Sequence& sequence : sequences_) {
    Result result;
    const bool hidden = mode == Mode::last_hidden;
    (hidden ? result.hidden : result.logits) = sequence.collected.data();
    result.width = hidden ? hidden_size() : card_.config.vocab_size;
    result.rows = static_cast<int>(sequence.collected.size() / static_cast<size_t>(result.width));
    results.push_back(result);
  }
  return results;
}

void Session::finish(Mode mode, const Sink& sink) {
  perf_.memory_mb = peak_memory_mb();
  const bool with_hidden = mode == Mode::last_hidden && guesses().hidden_at_finish && !aborted();
  std::vector<Result> results =
      with_hidden ? rows_of(mode) : std::vector<Result>(sequences_.size());
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
  if (!faults_.with(Act::lose_finish)) tell(sink, std::move(results), State::finish);
}

void Session::pace(Clock::time_point since, long microseconds) const {
  if (microseconds > 0)
    std::this_thread::sleep_until(since + std::chrono::microseconds(microseconds));
}

}  // namespace rkemu

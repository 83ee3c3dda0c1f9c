// A run, from the prompt's tokens to the last callback.
#include "run.h"

#include <cxxabi.h>
#include <sys/resource.h>

#include <algorithm>
#include <thread>

#include "log.h"

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

void pace(std::chrono::steady_clock::time_point since, long microseconds) {
  if (microseconds > 0)
    std::this_thread::sleep_until(since + std::chrono::microseconds(microseconds));
}

}  // namespace

Run::Run(Loaded& loaded, const Request& request, const std::atomic<bool>& abort, const Sink& sink)
    : loaded_(loaded),
      request_(request),
      abort_(abort),
      sink_(sink),
      mode_(request.mode),
      wanted_(request.max_new_tokens > 0 ? request.max_new_tokens
                                         : loaded.settings.max_new_tokens) {}

// Writes the scaled embedding of a token.
void Run::embed(int32_t token, float* out) const {
  const Model& model = engine().model;
  if (model.has_embedding()) {
    model.embed(token, out);
  } else if (!loaded_.settings.embed) {
    throw failure("the model has no embedding table and there is no embedding callback");
  } else if (!loaded_.settings.embed(token, out,
                                     static_cast<size_t>(config().hidden_size) * sizeof(float))) {
    throw failure("the embedding callback failed");
  }
  engine().forward.scale_embedding(out);
}

// Computes the prompt in chunks.
void Run::prefill(Batch& batch) {
  Cache& cache = batch.conversation->cache;
  std::vector<float>& collected = batch.collected;
  const auto width = static_cast<size_t>(config().hidden_size);
  const auto vocab = static_cast<size_t>(config().vocab_size);
  const float* row = batch.rows.data();
  std::vector<float> x;
  for (size_t start = 0; start < batch.keys.size() && !aborted(); start += Forward::kChunk) {
    const size_t n = std::min<size_t>(Forward::kChunk, batch.keys.size() - start);
    const auto began = Clock::now();
    std::vector<Row> rows;
    x.resize(n * width);
    for (size_t i = 0; i < n; ++i) {
      const Key key = batch.keys[start + i];
      float* out = x.data() + i * width;
      if (key < 0) {
        std::copy_n(row, width, out);
        row += width;
        engine().forward.scale_embedding(out);
      } else {
        embed(static_cast<int32_t>(key), out);
      }
    }
    for (size_t i = 0; i < n; ++i) {
      rows.push_back({&cache, cache.length()});
      cache.append(batch.keys[start + i]);
    }
    engine().forward.run(rows, x.data(), adapter_);
    if (mode_ == Mode::last_hidden) {
      collected.insert(collected.end(), x.begin(), x.end());
    } else if (mode_ == Mode::logits) {
      collected.resize(collected.size() + n * vocab);
      engine().forward.logits(x.data(), static_cast<int>(n),
                              collected.data() + collected.size() - n * vocab);
    }
    perf_.prefill_tokens += static_cast<int>(n);
    pace(began, loaded_.prompt_token_us * static_cast<long>(n));
  }
  if (aborted() || mode_ == Mode::last_hidden) return;
  batch.logits.resize(vocab);
  if (mode_ == Mode::logits) {
    std::copy(collected.end() - static_cast<std::ptrdiff_t>(vocab), collected.end(),
              batch.logits.begin());
  } else {
    engine().forward.logits(x.data() + x.size() - width, 1, batch.logits.data());
  }
  complain();
}

// Prints the lines of an NPU whose jobs fail, once per step.
void Run::complain() const {
  if (loaded_.rubbish) raw(loaded_.rubbish);
}

bool Run::ends(int32_t token) const {
  const auto& eos = engine().tokenizer.eos();
  if (loaded_.settings.ignore_eos_token || eos.empty()) return false;
  if (loaded_.faults.with(Act::endless) || loaded_.faults.with(Act::padding)) return false;
  return loaded_.rules.all_eos ? std::find(eos.begin(), eos.end(), token) != eos.end()
                               : token == eos.front();
}

// Picks the next token of a sequence, and its text as far as characters are complete; false if the
// answer has ended.
bool Run::choose(Batch& batch) {
  batch.token = batch.conversation->sampler.pick(batch.logits);
  if (loaded_.rubbish) batch.token = engine().tokenizer.encode("!", false).back();
  batch.conversation->sampler.accept(batch.token);
  batch.conversation->pending = batch.token;
  batch.text.clear();
  if (ends(batch.token)) return false;
  batch.skipped = loaded_.settings.skip_special_token &&
                  engine().tokenizer.kind(batch.token) == TokenKind::control;
  batch.bytes += batch.skipped ? "" : engine().tokenizer.decode(batch.token);
  const size_t unfinished = loaded_.faults.with(Act::cut_text) ? 0 : utf8_unfinished(batch.bytes);
  const size_t complete = batch.bytes.size() - unfinished;
  batch.text = batch.bytes.substr(0, complete);
  batch.bytes.erase(0, complete);
  return true;
}

// Tells the client of the tokens just picked; true if it wants a pause.
bool Run::report_tokens(bool first) {
  const Fault* padding = loaded_.faults.with(Act::padding);
  std::vector<Result> results;
  bool any = false, waiting = true;
  for (Batch& batch : batches_) {
    Result result;
    if (batch.done) {
      result.text = nullptr;
    } else {
      any = true;
      waiting = waiting && batch.text.empty() && !batch.bytes.empty();
      result.text = padding ? padding->lines : batch.text.c_str();
      result.token = batch.token;
    }
    // The prompt's logits are reported even if the answer is empty.
    if (mode_ == Mode::logits && (first || !batch.done)) {
      const bool last = !first || loaded_.settings.guesses.logits_last;
      const std::vector<float>& logits = last ? batch.logits : batch.collected;
      result.logits = logits.data();
      result.width = config().vocab_size;
      result.rows = static_cast<int>(logits.size() / static_cast<size_t>(result.width));
    }
    results.push_back(result);
  }
  loaded_.faults.strike(Stage::token, loaded_.settings.model_path, perf_.generated_tokens);
  if (loaded_.settings.guesses.special_hidden && batches_.size() == 1 && batches_[0].skipped)
    return false;
  return sink_(results, any && waiting ? State::waiting : State::normal) && loaded_.rules.pause;
}

// Computes the picked token of every sequence that goes on; false if none does. A full cache ends
// the sequence or loses its oldest positions.
bool Run::step() {
  for (Batch& batch : batches_) {
    if (batch.done || batch.conversation->cache.length() < loaded_.settings.max_context) continue;
    if (wanted_ > 0 || loaded_.settings.guesses.context_shifts) {
      make_room(*batch.conversation, 1);
    } else {
      batch.done = true;
    }
  }
  const auto width = static_cast<size_t>(config().hidden_size);
  const auto vocab = static_cast<size_t>(config().vocab_size);
  std::vector<Row> rows;
  std::vector<float> x;
  for (Batch& batch : batches_) {
    if (batch.done) continue;
    x.resize(x.size() + width);
    embed(batch.token, x.data() + x.size() - width);
    Cache& cache = batch.conversation->cache;
    rows.push_back({&cache, cache.length()});
    cache.append(batch.token);
    batch.conversation->pending.reset();
  }
  if (rows.empty()) return false;
  engine().forward.run(rows, x.data(), adapter_);
  std::vector<float> logits(rows.size() * vocab);
  engine().forward.logits(x.data(), static_cast<int>(rows.size()), logits.data());
  complain();
  const float* from = logits.data();
  for (Batch& batch : batches_) {
    if (batch.done) continue;
    batch.logits.assign(from, from + vocab);
    from += vocab;
  }
  return true;
}

void Run::answer() {
  for (bool first = true; !aborted(); first = false) {
    const auto began = Clock::now();
    bool any = false;
    for (Batch& batch : batches_) {
      if (batch.done) continue;
      batch.done = !choose(batch);
      any = any || !batch.done;
    }
    if (any) {
      ++perf_.generated_tokens;
    } else if (!first || mode_ != Mode::logits) {
      return;
    }
    const bool pause = report_tokens(first);
    if (!any) return;
    if (pause) {
      paused_ = true;
      return;
    }
    if (aborted() || (wanted_ > 0 && perf_.generated_tokens >= wanted_)) return;
    if (!step()) return;
    pace(began, loaded_.token_us);
  }
}

void Run::compute(std::vector<Conversation>& conversations, Past past, const Adapter* adapter) {
  adapter_ = adapter;
  for (size_t i = 0; i < conversations.size(); ++i) {
    batches_.emplace_back(conversations[i]);
    prepare(batches_.back(), request_.inputs[i], past);
  }
  auto began = Clock::now();
  for (Batch& batch : batches_) prefill(batch);
  perf_.prefill_ms = milliseconds(Clock::now() - began);
  if (request_.save_prompt_cache && !aborted() &&
      !loaded_.faults.strike(Stage::save, loaded_.settings.model_path)) {
    save_prompt_cache(*request_.save_prompt_cache, loaded_.file.fingerprint(),
                      conversations[0].cache, config(), batches_[0].prompt_length);
  }
  began = Clock::now();
  const Guesses& guesses = loaded_.settings.guesses;
  if (mode_ == Mode::last_hidden) {
    if (!aborted() && !guesses.hidden_at_finish) sink_(collected(), State::last_hidden);
  } else if (mode_ == Mode::logits && guesses.logits_once) {
    if (!aborted()) sink_(collected(), State::normal);
  } else {
    answer();
  }
  perf_.generate_ms = milliseconds(Clock::now() - began);
}

void Run::resume(std::vector<Batch> paused, const Adapter* adapter) {
  const auto began = Clock::now();
  batches_ = std::move(paused);
  adapter_ = adapter;
  mode_ = Mode::generate;
  if (step()) answer();
  perf_.generate_ms = milliseconds(Clock::now() - began);
}

// The prompt's hidden states or logits.
std::vector<Result> Run::collected() const {
  std::vector<Result> results;
  for (const Batch& batch : batches_) {
    Result result;
    const bool hidden = mode_ == Mode::last_hidden;
    (hidden ? result.hidden : result.logits) = batch.collected.data();
    result.width = hidden ? config().hidden_size : config().vocab_size;
    result.rows = static_cast<int>(batch.collected.size() / static_cast<size_t>(result.width));
    results.push_back(result);
  }
  return results;
}

void Run::finish() {
  perf_.memory_mb = peak_memory_mb();
  const bool with_hidden =
      mode_ == Mode::last_hidden && loaded_.settings.guesses.hidden_at_finish && !aborted();
  std::vector<Result> results = with_hidden ? collected() : std::vector<Result>(batches_.size());
  for (size_t i = 0; i < results.size(); ++i) {
    results[i].token = batches_[i].token;
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
  if (!loaded_.faults.with(Act::lose_finish)) sink_(results, State::finish);
}

}  // namespace rkemu

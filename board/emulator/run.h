// A run on a loaded model, from its prompt to the last callback, free of any ABI layout.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "cache.h"
#include "loaded.h"
#include "sampler.h"

namespace rkemu {

struct Input {
  enum class Kind { text, tokens, embeddings };
  Kind kind = Kind::text;
  std::string text;
  bool tool = false;  // role "tool"
  std::vector<int32_t> tokens;
  std::vector<float> rows;  // [n][hidden], as they stand in the embedding table
};

enum class Mode { generate, last_hidden, logits };

struct Request {
  std::vector<Input> inputs;  // one per batch
  Mode mode = Mode::generate;
  std::optional<std::string> lora;
  std::optional<std::string> save_prompt_cache;
  std::optional<Sampling> sampling;
  bool keep_history = false;
  int max_new_tokens = 0;  // <= 0 keeps the setting
};

struct Perf {
  float prefill_ms = 0, generate_ms = 0, memory_mb = 0;
  int prefill_tokens = 0, generated_tokens = 0;
};

// What a callback gets for one batch. Pointers are valid during the callback.
struct Result {
  const char* text = "";
  int32_t token = -1;
  const float* hidden = nullptr;
  const float* logits = nullptr;
  int rows = 0;   // of hidden or logits
  int width = 0;  // hidden size or vocabulary
  Perf perf;
};

enum class State { normal, waiting, finish, error, last_hidden };
// Gets one result per batch; true pauses the run.
using Sink = std::function<bool(const std::vector<Result>& results, State state)>;

// What lasts of a batch from run to run.
struct Conversation {
  Conversation(Cache kv, Sampler choice) : cache(std::move(kv)), sampler(std::move(choice)) {}
  Cache cache;
  Sampler sampler;
  // Chosen, not yet in the cache.
  std::optional<int32_t> pending;
  // Positions of <bos> and system prompt.
  int system_length = 0;
  // With which the cache was computed.
  std::string adapter;
};

// What a run knows of a batch.
struct Batch {
  explicit Batch(Conversation& of) : conversation(&of) {}
  Conversation* conversation;
  // Still to be computed, and the embeddings of those below zero, in order.
  std::vector<Key> keys;
  std::vector<float> rows;
  int prompt_length = 0;
  std::vector<float> logits;
  // Hidden states or logits of all prompt rows, if the mode wants them.
  std::vector<float> collected;
  // Not yet a character; what the callback gets.
  std::string bytes, text;
  int32_t token = -1;
  bool done = false;
  bool skipped = false;  // a special token whose text is left out
};

class Run {
 public:
  // All must outlive the run; setting `abort` ends it after the step that is being computed.
  Run(Loaded& loaded, const Request& request, const std::atomic<bool>& abort, const Sink& sink);

  // What of the cache a prompt uses: a beginning that both share, as the release does it; that of
  // a prompt cache file, on every release; or all of it, and the prompt goes on behind it.
  enum class Past { prefix, prompt_cache, history };
  // Reads the prompts, computes them and the answers. `adapter` may be null.
  void compute(std::vector<Conversation>& conversations, Past past, const Adapter* adapter);
  // A paused answer goes on, whatever this run's input is.
  void resume(std::vector<Batch> paused, const Adapter* adapter);
  // The last callback.
  void finish();

  // A callback wanted a pause; take() gives what resume() needs.
  bool paused() const { return paused_; }
  std::vector<Batch> take() { return std::move(batches_); }

 private:
  using Clock = std::chrono::steady_clock;

  Engine& engine() const { return loaded_.engine(); }
  const Config& config() const { return loaded_.card.config; }
  bool aborted() const { return abort_; }
  void prepare(Batch& batch, const Input& input, Past past);
  void start_text(Batch& batch, const Input& input, bool first);
  void start_tokens(Batch& batch, const Input& input, bool first);
  std::vector<int32_t> tokenize(const std::string& text) const;
  void reuse_prefix(Batch& batch, bool allowed);
  void make_room(Conversation& conversation, size_t needed);
  void prefill(Batch& batch);
  void embed(int32_t token, float* out) const;
  std::vector<Result> collected() const;
  void answer();
  bool choose(Batch& batch);
  bool report_tokens(bool first);
  void complain() const;
  bool step();
  bool ends(int32_t token) const;

  Loaded& loaded_;
  const Request& request_;
  const std::atomic<bool>& abort_;
  const Sink& sink_;
  Mode mode_;
  // Tokens of the answer; none or less: as many as the context holds.
  int wanted_;
  const Adapter* adapter_ = nullptr;
  std::vector<Batch> batches_;
  bool paused_ = false;
  Perf perf_;
};

}  // namespace rkemu

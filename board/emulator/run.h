// A run on a loaded model, from its prompt to the last callback, independent of the ABI layout.
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
  std::vector<float> rows;  // [n][hidden], as in the embedding table
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

// What a callback gets for one batch. Pointers are valid only during the callback.
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

// The state of a batch that lasts from run to run.
struct Conversation {
  Conversation(Cache kv, Sampler choice) : cache(std::move(kv)), sampler(std::move(choice)) {}
  Cache cache;
  Sampler sampler;
  // The token that was chosen but is not in the cache yet.
  std::optional<int32_t> pending;
  // The number of positions of <bos> and the system prompt.
  int system_length = 0;
  // The name of the adapter with which the cache was computed.
  std::string adapter;
};

// The state of a batch during a run.
struct Batch {
  explicit Batch(Conversation& of) : conversation(&of) {}
  Conversation* conversation;
  // The prompt that is still to be computed, and the embeddings of its negative keys, in order.
  std::vector<Key> keys;
  std::vector<float> rows;
  int prompt_length = 0;
  std::vector<float> logits;
  // Hidden states or logits of all prompt rows, in the modes that return them.
  std::vector<float> collected;
  // Bytes that are not a whole character yet, and the text for the callback.
  std::string bytes, text;
  int32_t token = -1;
  bool done = false;
  bool skipped = false;  // a special token whose text is left out
};

class Run {
 public:
  // All arguments must outlive the run. Setting `abort` ends it after the current step.
  Run(Loaded& loaded, const Request& request, const std::atomic<bool>& abort, const Sink& sink);

  // How much of the cache a prompt uses: a common beginning, if the release reuses it; a common
  // beginning with a prompt cache file, on every release; or all of it, which the prompt continues.
  enum class Past { prefix, prompt_cache, history };
  // Computes the prompts and the answers. `adapter` may be null.
  void compute(std::vector<Conversation>& conversations, Past past, const Adapter* adapter);
  // Continues a paused answer, whatever the input of this run is.
  void resume(std::vector<Batch> paused, const Adapter* adapter);
  // Makes the last callback.
  void finish();

  // Whether a callback asked for a pause; take() then gives what resume() needs.
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
  // The most tokens of the answer; 0 or less for as many as the context holds.
  int wanted_;
  const Adapter* adapter_ = nullptr;
  std::vector<Batch> batches_;
  bool paused_ = false;
  Perf perf_;
};

}  // namespace rkemu

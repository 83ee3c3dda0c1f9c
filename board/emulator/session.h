// One loaded model and its conversations: what stands behind an LLMHandle, free of any ABI layout.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cache.h"
#include "faults.h"
#include "file.h"
#include "forward.h"
#include "guesses.h"
#include "kernels.h"
#include "memory.h"
#include "model.h"
#include "npu.h"
#include "sampler.h"
#include "threads.h"
#include "tokenizer.h"

namespace rkemu {

// What releases do differently, apart from their structures.
struct Rules {
  const char* release;
  bool chat_template;  // 1.2.0: put around text prompts
  bool prefix_reuse;   // 1.2.0: what the cache holds of a prompt's beginning is not computed again
  bool embedding_reuse;  // 1.2.3: also for embedding input
  bool names_platform;   // 1.2.0: the load log names target_platform
  bool names_dtype;      // 1.2.1: ... and model_dtype
  bool pause;            // 1.2.1: a callback can return 1
  bool all_eos;          // 1.3.0: every eos id ends an answer, not the first one only
};

struct Settings {
  std::string model_path;
  int max_context = 512;
  int max_new_tokens = -1;
  int n_keep = -1;
  int n_batch = 1;
  int cpus = 4;
  int domain = 0;
  Device device;
  Guesses guesses;
  bool skip_special_token = false;
  bool ignore_eos_token = false;
  Sampling sampling;
  // 1.3.0: for files without a tokenizer or an embedding table.
  std::function<std::vector<int32_t>(const std::string& text)> tokenize;
  std::function<bool(int32_t token, float* row, size_t bytes)> embed;
};

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

// What computes: the tables of a model file, and the threads that work on them.
struct Engine {
  Engine(const File& file, const Config& config, int threads);
  Model model;
  Tokenizer tokenizer;
  Pool pool;
  Forward forward;
};

class Session {
 public:
  // Failure: the model cannot be loaded. With `pretend`, nothing is loaded and no run works.
  Session(const Rules& rules, const Settings& settings, Faults faults, bool pretend);

  // The fault that an asynchronous run never begins.
  bool loses_runs() const { return faults_.with(Act::lose_run) != nullptr; }
  const Guesses& guesses() const { return settings_.guesses; }
  int hidden_size() const { return card_.config.hidden_size; }
  int batches() const { return static_cast<int>(sequences_.size()); }

  // One run. Reports through the sink; Failure after it has reported State::error. Setting `abort`
  // ends it after the step that is being computed.
  void run(const Request& request, const std::atomic<bool>& abort, const Sink& sink);

  void clear_cache(bool keep_system_prompt);
  // Takes positions [begin, end) of one batch out. Failure: there are none such.
  void clear_range(int batch, int begin, int end);
  int cache_length(int batch) const { return at(batch).cache.length(); }
  void load_lora(const std::string& name, const std::string& path, float scale);
  void load_prompt_cache(const std::string& path);
  void release_prompt_cache();
  void set_chat_template(const ChatTemplate& chat_template);
  void set_function_tools(const std::string& system, const std::string& tools,
                          const std::string& tag);

 private:
  using Clock = std::chrono::steady_clock;

  struct Sequence {
    Sequence(Cache kv, Sampler choice) : cache(std::move(kv)), sampler(std::move(choice)) {}
    Cache cache;
    Sampler sampler;
    std::optional<int32_t> pending;  // chosen, not yet in the cache
    int system_length = 0;           // positions of <bos> and system prompt
    int prompt_length = 0;
    std::string adapter;  // with which the cache was computed
    // Of the run:
    std::vector<Key> keys;    // still to be computed
    std::vector<float> rows;  // embeddings of the keys below zero, in order
    std::vector<float> logits;
    std::vector<float>
        collected;            // hidden states or logits of all prompt rows, if the mode wants them
    std::string bytes, text;  // not yet a character; what the callback gets
    int32_t token = -1;
    bool done = false;
  };

  const Sequence& at(int batch) const { return sequences_[static_cast<size_t>(batch)]; }
  Engine& engine() const;
  void report_load() const;
  void check_load();
  bool aborted() const { return *abort_; }
  void prepare(Sequence& sequence, const Input& input, const Request& request);
  void start_text(Sequence& sequence, const Input& input, bool first);
  std::vector<int32_t> tokenize(const std::string& text);
  void reuse_prefix(Sequence& sequence, bool allowed);
  void make_room(Sequence& sequence, size_t needed);
  void compute(const Request& request, const Sink& sink);
  void resume(Request request, const Sink& sink);
  void use_adapter(const std::optional<std::string>& name);
  int wanted_tokens(const Request& request) const;
  void prefill(Sequence& sequence, Mode mode);
  void embed(Key key, const float*& row, float* out) const;
  std::vector<Result> rows_of(Mode mode) const;
  void answer(const Request& request, const Sink& sink);
  bool choose(Sequence& sequence);
  bool tell(const Sink& sink, std::vector<Result> results, State state) const;
  bool report_tokens(const Sink& sink, Mode mode, bool first);
  void complain() const;
  bool step(bool may_forget);
  bool ends(int32_t token) const;
  void pace(Clock::time_point since, long microseconds) const;
  void finish(Mode mode, const Sink& sink);

  Rules rules_;
  Settings settings_;
  Faults faults_;
  File file_;
  ModelCard card_{};
  Reservation memory_;
  std::unique_ptr<Engine> engine_;  // nullptr: there are no weights to compute with
  ChatTemplate template_;
  std::string tool_tag_ = "tool_response";
  std::map<std::string, std::unique_ptr<Adapter>> adapters_;
  const Adapter* adapter_ = nullptr;
  std::vector<Sequence> sequences_;
  const std::atomic<bool>* abort_ = nullptr;  // of the run
  bool paused_ = false;
  bool prompt_cache_loaded_ = false;
  const char* rubbish_ = nullptr;  // what an NPU says whose jobs fail
  long token_us_, prompt_token_us_;
  Perf perf_;
};

// The prompt cache file of a sequence's first `length` positions.
void save_prompt_cache(const std::string& path, const std::string& fingerprint, Cache& cache,
                       const Config& config, int length);
// Fills `cache`. Failure: no such file, or made with another model.
void read_prompt_cache(const std::string& path, const std::string& fingerprint, Cache& cache,
                       const Config& config);

}  // namespace rkemu

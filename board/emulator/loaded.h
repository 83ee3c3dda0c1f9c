// What rkllm_init makes of a model file and its parameters.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "faults.h"
#include "file.h"
#include "forward.h"
#include "guesses.h"
#include "memory.h"
#include "model.h"
#include "npu.h"
#include "sampler.h"
#include "threads.h"
#include "tokenizer.h"

namespace rkemu {

// The differences between releases, apart from their structures.
struct Rules {
  const char* release;
  // 1.2.0: a template is put around text prompts.
  bool chat_template;
  // 1.2.0: the beginning of a prompt that is in the cache is not computed again.
  bool prefix_reuse;
  // 1.2.3: also for embedding input.
  bool embedding_reuse;
  // 1.2.0: the load log names target_platform.
  bool names_platform;
  // 1.2.1: ... and model_dtype.
  bool names_dtype;
  // 1.2.1: a callback can return 1.
  bool pause;
  // 1.3.0: every eos id ends an answer, not the first one only.
  bool all_eos;
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

// The parts that compute: the model and tokenizer of a file, and the threads that work on them.
struct Engine {
  Engine(const File& file, const Config& config, int threads);
  Model model;
  Tokenizer tokenizer;
  Pool pool;
  Forward forward;
};

// Everything that a handle has loaded, as its runs see it.
struct Loaded {
  // Failure: the model cannot be loaded. With `pretend`, nothing is loaded and no run works.
  Loaded(const Rules& release_rules, const Settings& given, Faults wanted, bool pretend);

  // Failure: there are no weights to compute with.
  Engine& engine() const;

  Rules rules;
  Settings settings;
  Faults faults;
  // The least time per generated token and per prompt token, in microseconds.
  long token_us, prompt_token_us;
  File file;
  ModelCard card{};
  Reservation memory;
  std::unique_ptr<Engine> weights;  // nullptr if there are no weights to compute with
  ChatTemplate chat_template;
  std::string tool_tag = "tool_response";
  const char* rubbish = nullptr;  // log lines of an NPU whose jobs fail; nullptr if they do not

 private:
  void report() const;
  void check();
};

}  // namespace rkemu

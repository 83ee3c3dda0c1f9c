// One loaded model and its conversations, as behind an LLMHandle, independent of the ABI layout.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "run.h"

namespace rkemu {

class Session {
 public:
  // Failure: the model cannot be loaded. With `pretend`, nothing is loaded and no run works.
  Session(const Rules& rules, const Settings& settings, Faults faults, bool pretend);

  // Whether a fault keeps asynchronous runs from ever beginning.
  bool loses_runs() const { return loaded_.faults.with(Act::lose_run) != nullptr; }
  const Guesses& guesses() const { return loaded_.settings.guesses; }
  int hidden_size() const { return loaded_.card.config.hidden_size; }
  int batches() const { return static_cast<int>(conversations_.size()); }

  // Does one run, which reports through the sink. Failure: after it has reported State::error.
  // Setting `abort` ends it after the current step.
  void run(const Request& request, const std::atomic<bool>& abort, const Sink& sink);

  void clear_cache(bool keep_system_prompt);
  // Removes positions [begin, end) of one batch. Failure: there are no such positions.
  void clear_range(int batch, int begin, int end);
  int cache_length(int batch) const {
    return conversations_[static_cast<size_t>(batch)].cache.length();
  }
  void load_lora(const std::string& name, const std::string& path, float scale);
  void load_prompt_cache(const std::string& path);
  void release_prompt_cache();
  void set_chat_template(const ChatTemplate& chat_template);
  void set_function_tools(const std::string& system, const std::string& tools,
                          const std::string& tag);

 private:
  bool paused() const { return !paused_.empty(); }
  void compute(Run& run, const Request& request);
  std::vector<Conversation> empty_conversations() const;
  const Adapter* adapter(const std::optional<std::string>& name) const;

  Loaded loaded_;
  std::map<std::string, std::unique_ptr<Adapter>> adapters_;
  std::vector<Conversation> conversations_;
  // The conversations of runs in logits mode, if those have a cache of their own.
  std::vector<Conversation> aside_;
  // The batches of a paused run; empty if there is none.
  std::vector<Batch> paused_;
  bool prompt_cache_loaded_ = false;
  // Whether the previous run was aborted.
  bool aborted_ = false;
};

}  // namespace rkemu

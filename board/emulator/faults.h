// Faults on demand: RKEMU_FAULT=NAME[=VALUE][,NAME...] makes the library fail as real ones were
// seen to. Names, texts and sources stand in the table of faults.cc and in docs/emulator.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace rkemu {

// Where a fault strikes.
enum class Stage {
  open,         // rkllm_init, after the versions are printed
  second_init,  // there, if this process has a handle already
  memory,       // rkllm_init, where NPU memory is allocated
  run,          // the beginning of a run
  token,        // before the VALUE-th token of a run is reported
  none,         // not at a place, see Fault::has
};

// What a fault does there, after its lines are printed.
enum class Act {
  fail,     // the call returns -1; a run reports RKLLM_RUN_ERROR first
  pretend,  // rkllm_init returns 0, and no run of that handle will work
  segv,     // the process ends by this signal
  bus,
  ill,
  abort,
  exit,         // the process exits with status 1
  hang,         // the call never returns
  sleep,        // the call takes VALUE ms longer
  rubbish,      // every token is "!", as with an old driver
  lose_finish,  // no RKLLM_RUN_FINISH
  null_text,    // text is NULL in every callback
  cut_text,     // text ends inside of characters, with state NORMAL
  lose_run,     // rkllm_run_async returns 0 and nothing happens
};

struct Fault {
  const char* name;
  Stage stage;
  Act act;
  int64_t value;      // unless RKEMU_FAULT gives one
  const char* lines;  // %T time of day, %V value, %M model path
};

class Faults {
 public:
  // Reads RKEMU_FAULT. Failure: a name that is not in the table.
  static Faults from_environment();

  bool has(Act act) const;
  // Strikes if a fault is due here: prints, and throws Failure, ends the process, or waits. `token`
  // is the number of the token, from 1. True if rkllm_init shall pretend that all is well.
  bool strike(Stage stage, const std::string& model_path, int64_t token = 0) const;

 private:
  std::vector<Fault> faults_;
};

const std::vector<Fault>& fault_table();
// "[14:28:07.010]", as RKNN lines begin.
std::string time_of_day();

}  // namespace rkemu

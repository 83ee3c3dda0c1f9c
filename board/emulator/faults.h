// Faults on demand: RKEMU_FAULT=NAME[=VALUE][,NAME...] makes the library fail as real ones were
// seen to. The table is made from rkboard/emulator/faults.yaml when the library is built;
// `rkedge emulator info --faults` and docs/emulator.md list it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "file.h"
#include "npu.h"

namespace rkemu {

// Where a fault strikes.
enum class Stage {
  device,       // rkllm_init, before the versions are printed
  open,         // after it
  second_init,  // there, if this process has a handle already
  memory,       // rkllm_init, where NPU memory is allocated
  loaded,       // rkllm_init, where it would return 0
  run,          // the beginning of a run
  token,        // before the VALUE-th token of a run is reported
  save,         // where a prompt cache is written
  none,         // not at a place, see Faults::with
};

// What a fault does there, after its lines are printed.
enum class Act {
  say,   // nothing more
  fail,  // the call returns -1; a run reports RKLLM_RUN_ERROR first
  segv,  // the process ends by this signal
  bus,
  ill,
  abort,
  kill,
  exit,     // the process exits with status 1
  hang,     // the call never returns
  sleep,    // the call takes VALUE ms longer
  stall,    // the call waits as long as the driver does for a job, and fails; so do all later runs
  skip,     // what it stands before is left out: a load that still returns 0, a file
  leak,     // VALUE MiB are kept until the handle is destroyed
  noise,    // its lines go to stdout
  rubbish,  // every token is "!"; its lines are said for each
  padding,  // every token's text is its lines
  endless,  // no token ends the answer
  no_template,  // the model's chat template is not used
  lose_finish,  // no RKLLM_RUN_FINISH
  null_text,    // text is NULL in every callback
  cut_text,     // text ends inside of characters, with state NORMAL
  lose_run,     // rkllm_run_async returns 0 and nothing happens
};

struct Fault {
  const char* name;
  Stage stage;
  Act act;
  const char* meant;   // what VALUE is; "" for a fault without one
  int64_t value;       // unless RKEMU_FAULT gives one
  const char* lines;   // %T time of day, %V value, %M model path
  const char* kernel;  // what the driver says in the kernel log; "" for nothing
  const char* driver;  // the driver that is claimed with it; "" for the usual one
};

class Faults {
 public:
  // Reads RKEMU_FAULT. Failure: a name that is not in the table, or a value that is not a number.
  static Faults from_environment();

  // The device as the faults leave it.
  Device device() const;
  // The fault that acts so, nullptr if there is none.
  const Fault* with(Act act) const;
  // Strikes if a fault is due here: prints, and throws Failure, ends the process, or waits. `token`
  // is the number of the token, from 1. True if what the fault stands before is to be left out.
  bool strike(Stage stage, const std::string& model_path, int64_t token = 0);

 private:
  bool act(const Fault& fault, const std::string& model_path);

  std::vector<Fault> faults_;
  bool stalled_ = false;
  std::vector<Mapping> leaked_;
};

}  // namespace rkemu

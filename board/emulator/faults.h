// Faults on demand: RKEMU_FAULT=NAME[=VALUE][,NAME...] makes the library fail as real libraries
// were seen to fail. The table is made from rkboard/emulator/faults.yaml when the library is built;
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
  open,         // rkllm_init, after the versions are printed
  second_init,  // the same place, if this process has a handle already
  memory,       // rkllm_init, where NPU memory is allocated
  loaded,       // rkllm_init, where it would return 0
  run,          // the beginning of a run
  token,        // before the VALUE-th token of a run is reported
  save,         // where a prompt cache is written
  none,         // at no fixed place, see Faults::with
};

// What a fault does where it strikes, after its lines are printed.
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
  skip,     // the step it strikes before is left out: a load, which still returns 0, or a file
  leak,     // VALUE MiB are kept until the handle is destroyed
  noise,    // its lines go to stdout
  rubbish,  // every token is "!"; its lines are printed for each
  padding,  // every token's text is its lines
  endless,  // no token ends the answer
  no_template,  // the model's chat template is not used
  lose_finish,  // no RKLLM_RUN_FINISH
  null_text,    // text is NULL in every callback
  cut_text,     // text ends in the middle of characters, with state NORMAL
  lose_run,     // rkllm_run_async returns 0 and nothing happens
};

struct Fault {
  const char* name;
  Stage stage;
  Act act;
  const char* meant;   // what VALUE means; "" for a fault without one
  int64_t value;       // the default of VALUE
  const char* lines;   // %T time of day, %V value, %M model path
  const char* kernel;  // the driver's lines in the kernel log; "" for none
  const char* driver;  // the driver version to claim; "" for the usual one
};

class Faults {
 public:
  // Reads RKEMU_FAULT. Failure: a name that is not in the table, or a value that is not a number.
  static Faults from_environment();

  // The device, as changed by the faults.
  Device device() const;
  // The fault with this action; nullptr if there is none.
  const Fault* with(Act act) const;
  // Lets a fault that is due here strike: prints its lines, and throws Failure, ends the process,
  // or waits. `token` is the number of the token, from 1. True if the caller has to skip its next
  // step.
  bool strike(Stage stage, const std::string& model_path, int64_t token = 0);

 private:
  bool act(const Fault& fault, const std::string& model_path);

  std::vector<Fault> faults_;
  bool stalled_ = false;
  std::vector<Mapping> leaked_;
};

}  // namespace rkemu

// Behavior of boards that is unknown, or that reports disagree on: the emulator does the likelier
// thing, and RKEMU_GUESS=NAME[,NAME...] makes it do the other one, so that a program can be tried
// with both. `rkedge emulator info --guesses` and docs/emulator.md list the names.
#pragma once

namespace rkemu {

struct Guesses {
  bool error_status_only = false;
  bool hidden_at_finish = false;
  bool logits_once = false;
  bool pause_resumes = false;
  bool abort_fails = false;
  bool calls_wait = false;
  bool arrays_whole = false;
  bool tokens_wrapped = false;
  bool special_hidden = false;
  bool context_shifts = false;
  bool defaults_unset = false;
  bool window_ignored = false;
  bool attention_uncapped = false;
  bool logits_uncapped = false;
  bool bos_doubled = false;
  bool logits_last = false;
  bool logits_apart = false;
  bool pause_drops = false;
  bool prefix_read = false;
  bool history_ignored = false;
  bool abort_lingers = false;

  // Reads RKEMU_GUESS. Failure: a name that is not in the table.
  static Guesses from_environment();
};

// A row of the table, which is made from rkboard/emulator/faults.yaml when the library is built.
struct Guess {
  const char* name;
  bool Guesses::*flag;
};

}  // namespace rkemu

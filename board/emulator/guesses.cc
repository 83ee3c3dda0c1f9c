#include "guesses.h"

#include <algorithm>
#include <string>

#include "log.h"

namespace rkemu {

namespace {

struct Row {
  const char* name;
  bool Guesses::*flag;
  const char* usual;
  const char* other;
};

// "reported" is one board or program; its source is beside it.
const Row kTable[] = {
    // ORKLLM frees its context in both places, so its author saw no callback with -1
    {"error-status-only", &Guesses::error_status_only,
     "a run that fails after it began calls `RKLLM_RUN_ERROR` and returns -1",
     "`rkllm_run` returns -1 without that callback"},
    // the vendor's demos read it in NORMAL, a public embedding program in FINISH
    {"hidden-at-finish", &Guesses::hidden_at_finish,
     "hidden states come in a callback of their own, `RKLLM_RUN_NORMAL` (state 4 in 1.1.x)",
     "hidden states come with `RKLLM_RUN_FINISH`"},
    // a public reranker takes the last NORMAL callback for the prompt's logits
    {"logits-once", &Guesses::logits_once,
     "`RKLLM_INFER_GET_LOGITS` gives the prompt's logits, and an answer with a row for each token",
     "`RKLLM_INFER_GET_LOGITS` gives the prompt's logits once, and no answer"},
    // github.com/noc7c9/rkllm-eos-repro, on an RK3588
    {"pause-resumes", &Guesses::pause_resumes, "a run after a paused one reads its prompt",
     "a run after a paused one goes on with the paused answer and ignores its prompt"},
    {"abort-fails", &Guesses::abort_fails, "`rkllm_run` returns 0 after `rkllm_abort`",
     "`rkllm_run` returns -1 after `rkllm_abort`"},
    {"calls-wait", &Guesses::calls_wait,
     "`rkllm_clear_kv_cache` and all other calls that need an idle handle return -1 while another "
     "thread runs it",
     "they wait for the run's end"},
};

std::string as_json() {
  std::string rows;
  for (const Row& row : kTable) {
    rows += rows.empty() ? "[" : ",\n ";
    rows += "{\"name\": " + json_text(row.name) + ", \"usual\": " + json_text(row.usual) +
            ", \"other\": " + json_text(row.other) + "}";
  }
  return rows + "]";
}

}  // namespace

Guesses Guesses::from_environment() {
  Guesses guesses;
  const std::string wanted = env_text("RKEMU_GUESS");
  if (wanted == "list") throw Failure(as_json());
  for (const std::string& name : comma_separated(wanted)) {
    const auto found = std::find_if(std::begin(kTable), std::end(kTable),
                                    [&](const Row& row) { return name == row.name; });
    if (found == std::end(kTable)) {
      throw failure("emulator: there is no RKEMU_GUESS " + name + "; RKEMU_GUESS=list shows all");
    }
    guesses.*found->flag = true;
  }
  return guesses;
}

}  // namespace rkemu

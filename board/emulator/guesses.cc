#include "guesses.h"

#include <algorithm>
#include <string>

#include "log.h"

namespace rkemu {

namespace {

constexpr Guess kGuesses[] = {
#include "guesses.inc"
};

}  // namespace

Guesses Guesses::from_environment() {
  Guesses guesses;
  for (const std::string& name : comma_separated(env_text("RKEMU_GUESS"))) {
    const auto found = std::find_if(std::begin(kGuesses), std::end(kGuesses),
                                    [&](const Guess& row) { return name == row.name; });
    if (found == std::end(kGuesses)) {
      throw failure("emulator: there is no RKEMU_GUESS " + name +
                    "; `rkedge emulator info --guesses` lists all");
    }
    guesses.*found->flag = true;
  }
  return guesses;
}

}  // namespace rkemu

#include "faults.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "log.h"

namespace rkemu {

namespace {

constexpr long kJobLimit = 6000;  // how long the driver waits for a job, in ms
constexpr size_t kMiB = 1u << 20;

constexpr Fault kFaults[] = {
#include "faults.inc"
};

std::string filled(const char* lines, int64_t value, const std::string& model_path) {
  std::string text;
  for (const char* at = lines; *at; ++at) {
    if (*at != '%') {
      text += *at;
      continue;
    }
    ++at;
    text += *at == 'T' ? time_of_day() : *at == 'V' ? std::to_string(value) : model_path;
  }
  return text;
}

// Crashes as a real library does: without the client's signal handlers and without unwinding.
[[noreturn]] void die(int signal) {
  std::signal(signal, SIG_DFL);
  std::raise(signal);
  ::_exit(128 + signal);
}

// Faults without a place are looked up with Faults::with() wherever they matter.
bool strikes_nowhere(const Fault& fault) {
  return fault.stage == Stage::none;
}

bool at_every_token(const Fault& fault) {
  return fault.act == Act::sleep || fault.act == Act::noise;
}

Fault chosen(const std::string& entry) {
  const size_t mark = std::min(entry.find_first_of("=:"), entry.size());
  const std::string name = entry.substr(0, mark);
  const auto found = std::find_if(std::begin(kFaults), std::end(kFaults),
                                  [&](const Fault& fault) { return name == fault.name; });
  if (found == std::end(kFaults)) {
    throw failure("emulator: there is no RKEMU_FAULT " + name +
                  "; `rkedge emulator info --faults` lists all");
  }
  Fault fault = *found;
  if (mark < entry.size()) {
    char* end = nullptr;
    errno = 0;
    fault.value = std::strtoll(entry.c_str() + mark + 1, &end, 10);
    // Tokens are counted from 1, so a token 0 would never come.
    const int64_t least = fault.stage == Stage::token && !at_every_token(fault) ? 1 : 0;
    if (!*fault.meant || mark + 1 == entry.size() || *end || errno || fault.value < least) {
      throw failure("emulator: RKEMU_FAULT " + name + " takes " +
                    (*fault.meant ? "a number from " + std::to_string(least) + ": " + fault.meant
                                  : "no value"));
    }
  }
  return fault;
}

}  // namespace

Faults Faults::from_environment() {
  Faults faults;
  for (const std::string& entry : comma_separated(env_text("RKEMU_FAULT")))
    faults.faults_.push_back(chosen(entry));
  return faults;
}

Device Faults::device() const {
  Device device = device_from_environment();
  for (const Fault& fault : faults_) {
    if (*fault.driver) device.driver = fault.driver;
  }
  return device;
}

const Fault* Faults::with(Act act) const {
  const auto found = std::find_if(faults_.begin(), faults_.end(),
                                  [act](const Fault& fault) { return fault.act == act; });
  return found == faults_.end() ? nullptr : &*found;
}

bool Faults::strike(Stage stage, const std::string& model_path, int64_t token) {
  bool asked = false;
  for (const Fault& fault : faults_) {
    const bool dead = stalled_ && fault.act == Act::stall && stage == Stage::run;
    const bool due = stage != Stage::token || at_every_token(fault) || fault.value == token;
    if (dead || (fault.stage == stage && due && !strikes_nowhere(fault))) {
      asked = act(fault, model_path) || asked;
    }
  }
  return asked;
}

bool Faults::act(const Fault& fault, const std::string& model_path) {
  const std::string kernel = filled(fault.kernel, fault.value, model_path);
  if (!kernel.empty() && !kernel_log(kernel)) raw(kernel);
  const std::string lines = filled(fault.lines, fault.value, model_path);
  if (fault.act == Act::fail) throw Failure(lines);
  if (fault.act == Act::noise) {
    std::printf("%s\n", lines.c_str());
    std::fflush(stdout);
    return false;
  }
  if (!lines.empty()) raw(lines);
  switch (fault.act) {
    case Act::segv:
      die(SIGSEGV);
    case Act::bus:
      die(SIGBUS);
    case Act::ill:
      die(SIGILL);
    case Act::abort:
      die(SIGABRT);
    case Act::kill:
      die(SIGKILL);
    case Act::exit:
      ::_exit(1);
    case Act::hang:
      while (true) ::pause();
    case Act::sleep:
      std::this_thread::sleep_for(std::chrono::milliseconds(fault.value));
      return false;
    case Act::stall:
      stalled_ = true;
      std::this_thread::sleep_for(
          std::chrono::milliseconds(env_number("RKEMU_JOB_LIMIT_MS", kJobLimit, 0, 600'000)));
      throw Failure("E RKNN: " + time_of_day() +
                    " failed to sync memory, ret: -1, errno: 22, errstr: Invalid argument");
    case Act::leak:
      leaked_.push_back(Mapping::anonymous(static_cast<size_t>(fault.value) * kMiB));
      std::memset(leaked_.back().data(), 1, leaked_.back().size());
      return false;
    default:
      return fault.act == Act::skip;
  }
}

}  // namespace rkemu

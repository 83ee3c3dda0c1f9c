// The library's lines on stderr, in the form of the vendor's ("I rkllm: ..."), and its errors.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace rkemu {

// An error that ends an API call: the lines that a real runtime prints for it, each with its own
// prefix.
class Failure : public std::runtime_error {
 public:
  explicit Failure(const std::string& lines) : std::runtime_error(lines) {}
};

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));

// RKLLM_LOG_LEVEL: 0 by default, 1 adds the times of a run, 2 the tokens of a prompt.
int log_level();
void info(const std::string& line);
void warn(const std::string& line);
void error(const std::string& line);
void raw(const std::string& lines);  // without a prefix, for lines of other parts of the runtime
// Such as "[14:28:07.010]", with which lines of RKNN begin.
std::string time_of_day();
// Appends the driver's lines to the file that RKEMU_KERNEL_LOG names, as dmesg shows them; false if
// it names none.
bool kernel_log(const std::string& lines);

// An "E rkllm: ..." line as a Failure.
Failure failure(const std::string& line);

// An environment variable as an integer in [low, high], or `fallback` when it is unset or not a
// number.
long env_number(const char* name, long fallback, long low, long high);
std::string env_text(const char* name);
// Splits "a,b" into "a" and "b", as an environment variable names several things.
std::vector<std::string> comma_separated(const std::string& text);

}  // namespace rkemu

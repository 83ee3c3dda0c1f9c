#include "log.h"

#include <algorithm>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace rkemu {

std::string format(const char* text, ...) {
  va_list args;
  va_start(args, text);
  va_list again;
  va_copy(again, args);
  const int size = std::vsnprintf(nullptr, 0, text, args);
  va_end(args);
  std::vector<char> buffer(static_cast<size_t>(std::max(size, 0)) + 1);
  std::vsnprintf(buffer.data(), buffer.size(), text, again);
  va_end(again);
  return std::string(buffer.data());
}

// One write per line, so that lines of several threads and processes do not mix.
void raw(const std::string& lines) {
  const std::string whole = lines + "\n";
  std::fwrite(whole.data(), 1, whole.size(), stderr);
  std::fflush(stderr);
}

void info(const std::string& line) {
  raw("I rkllm: " + line);
}
void warn(const std::string& line) {
  raw("W rkllm: " + line);
}
void error(const std::string& line) {
  raw("E rkllm: " + line);
}

Failure failure(const std::string& line) {
  return Failure("E rkllm: " + line);
}

std::string env_text(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

long env_number(const char* name, long fallback, long low, long high) {
  const std::string value = env_text(name);
  char* end = nullptr;
  errno = 0;
  const long number = std::strtol(value.c_str(), &end, 10);
  if (value.empty() || *end || errno) return fallback;
  return std::clamp(number, low, high);
}

int log_level() {
  return static_cast<int>(env_number("RKLLM_LOG_LEVEL", 0, 0, 2));
}

}  // namespace rkemu

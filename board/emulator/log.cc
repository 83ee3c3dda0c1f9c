#include "log.h"

#include <algorithm>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <sstream>
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

std::string time_of_day() {
  struct timespec now {};
  ::clock_gettime(CLOCK_REALTIME, &now);
  struct tm local {};
  ::localtime_r(&now.tv_sec, &local);
  return format("[%02d:%02d:%02d.%03d]", local.tm_hour, local.tm_min, local.tm_sec,
                static_cast<int>(now.tv_nsec / 1'000'000));
}

bool kernel_log(const std::string& lines) {
  const std::string path = env_text("RKEMU_KERNEL_LOG");
  if (path.empty()) return false;
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "a"),
                                                             std::fclose);
  if (!file) return false;
  struct timespec now {};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  std::istringstream all(lines);
  for (std::string line; std::getline(all, line);) {
    std::fprintf(file.get(), "[%5lld.%06ld] %s\n", static_cast<long long>(now.tv_sec),
                 now.tv_nsec / 1000, line.c_str());
  }
  return true;
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

std::vector<std::string> comma_separated(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    parts.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return parts;
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

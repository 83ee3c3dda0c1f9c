// What the machine reads from memory, for the emulator's benchmark: maps the file that it is given and reads all of it in
// two threads, again for each line on stdin; prints {"rate": bytes a second}.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <thread>

namespace {

uint64_t sum(const uint64_t* from, size_t n) {
  uint64_t lanes[32] = {};
  for (size_t i = 0; i + 32 <= n; i += 32) {
    for (int l = 0; l < 32; ++l) lanes[l] += from[i + static_cast<size_t>(l)];
  }
  uint64_t total = 0;
  for (const uint64_t lane : lanes) total += lane;
  return total;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const int file = open(argv[1], O_RDONLY);
  struct stat status {};
  if (file < 0 || fstat(file, &status) != 0) return 1;
  const auto size = static_cast<size_t>(status.st_size);
  void* mapped = mmap(nullptr, size, PROT_READ, MAP_SHARED, file, 0);
  if (mapped == MAP_FAILED) return 1;
  const auto* words = static_cast<const uint64_t*>(mapped);
  const size_t half = size / sizeof *words / 2;
  for (int c = std::getchar(); c != EOF; c = std::getchar()) {
    if (c != '\n') continue;
    const auto began = std::chrono::steady_clock::now();
    volatile uint64_t first = 0, second = 0;
    constexpr int kTimes = 4;
    for (int i = 0; i < kTimes; ++i) {
      std::thread other([&] { second = second + sum(words + half, half); });
      first = first + sum(words, half);
      other.join();
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
    std::printf("{\"rate\": %.0f}\n", kTimes * static_cast<double>(size) / took.count());
    std::fflush(stdout);
  }
}

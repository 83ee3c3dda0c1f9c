// Prompt cache files: the KV cache of a prompt, with the fingerprint of the model that computed it.
//
// Little-endian: magic, fingerprint (8 bytes), u32 half, layers, kv_heads, head_dim, length, then
// i64 keys [length], then per layer and KV head keys and values [length][head_dim], then the CRC-32
// of everything before it.
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <memory>

#include "cache.h"
#include "log.h"

namespace rkemu {

namespace {

constexpr char kMagic[8] = {'R', 'K', 'E', 'M', 'U', 'K', 'V', '1'};

struct Header {
  char magic[8];
  char fingerprint[8];
  uint32_t half, layers, kv_heads, head_dim, length;
};
static_assert(sizeof(Header) == 36, "written as it stands");

Header header_for(const std::string& fingerprint, const Cache& cache, const Config& config,
                  int length) {
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  std::memcpy(header.fingerprint, fingerprint.data(), sizeof header.fingerprint);
  header.half = cache.half();
  header.layers = static_cast<uint32_t>(config.layers);
  header.kv_heads = static_cast<uint32_t>(config.kv_heads);
  header.head_dim = static_cast<uint32_t>(config.head_dim);
  header.length = static_cast<uint32_t>(length);
  return header;
}

// Calls part(data, size) for the rows of each layer and KV head.
template <class Part>
void each_part(Cache& cache, const Config& config, int length, const Part& part) {
  const size_t size = static_cast<size_t>(length) * cache.row_bytes();
  for (int layer = 0; layer < config.layers; ++layer) {
    for (int head = 0; head < config.kv_heads; ++head) {
      part(cache.keys(layer, head), size);
      part(cache.values(layer, head), size);
    }
  }
}

}  // namespace

void save_prompt_cache(const std::string& path, const std::string& fingerprint, Cache& cache,
                       const Config& config, int length) {
  const std::string partial = path + format(".partial-%d", static_cast<int>(::getpid()));
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(partial.c_str(), "wb"),
                                                             std::fclose);
  if (!file) throw failure("failed to open '" + path + "'");
  uint32_t crc = 0;
  bool written = true;
  const auto write = [&](const void* data, size_t size) {
    crc = crc32(crc, static_cast<const uint8_t*>(data), size);
    written = written && std::fwrite(data, 1, size, file.get()) == size;
  };
  const Header header = header_for(fingerprint, cache, config, length);
  write(&header, sizeof header);
  write(cache.contents().data(), static_cast<size_t>(length) * sizeof(Key));
  each_part(cache, config, length, write);
  written = std::fwrite(&crc, 1, sizeof crc, file.get()) == sizeof crc && written;
  written = std::fflush(file.get()) == 0 && written;
  if (!written || std::rename(partial.c_str(), path.c_str()) != 0) {
    std::remove(partial.c_str());
    throw failure("failed to write prompt cache file '" + path + "'");
  }
  info("prompt cache saved to " + path);
}

void read_prompt_cache(const std::string& path, const std::string& fingerprint, Cache& cache,
                       const Config& config) {
  if (::access(path.c_str(), R_OK) != 0) throw failure("prompt cache file does not exist: " + path);
  const Mapping file = Mapping::file(path);
  if (file.size() == 0) throw failure("prompt cache file is empty: " + path);
  const Failure mismatch = failure("prompt cache file does not match the current model: " + path);
  Header header{};
  if (file.size() < sizeof header + sizeof(uint32_t)) throw mismatch;
  std::memcpy(&header, file.data(), sizeof header);
  if (header.length > static_cast<uint32_t>(cache.capacity())) throw mismatch;
  const auto length = static_cast<int>(header.length);
  const Header expected = header_for(fingerprint, cache, config, length);
  if (std::memcmp(&header, &expected, sizeof header) != 0) throw mismatch;

  const size_t rows = static_cast<size_t>(config.layers) * static_cast<size_t>(config.kv_heads) * 2;
  const size_t body = sizeof header + header.length * (sizeof(Key) + rows * cache.row_bytes());
  uint32_t crc = 0;
  if (file.size() != body + sizeof crc) throw mismatch;
  std::memcpy(&crc, file.data() + body, sizeof crc);
  if (crc32(0, file.data(), body) != crc) throw failure("prompt cache file is damaged: " + path);

  const uint8_t* at = file.data() + sizeof header;
  cache.truncate(0);
  for (int i = 0; i < length; ++i, at += sizeof(Key)) {
    Key key;
    std::memcpy(&key, at, sizeof key);
    cache.append(key);
  }
  each_part(cache, config, length, [&](uint8_t* to, size_t size) {
    std::memcpy(to, at, size);
    at += size;
  });
  info(format("prompt cache of %d tokens loaded from %s", length, path.c_str()));
}

}  // namespace rkemu

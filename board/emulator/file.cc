#include "file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "log.h"

namespace rkemu {

namespace {

constexpr uint8_t kMagic[8] = {'R', 'K', 'E', 'M', 'U', '\r', '\n', 0x1a};
constexpr uint32_t kVersion = 1;
constexpr uint32_t kSizesOnly = 1;
constexpr size_t kHeaderSize = 64;
constexpr uint64_t kMaxSection = 64u << 20;
constexpr uint64_t kMaxData = uint64_t{1} << 48;
constexpr uint64_t kPage = 4096;
constexpr uint64_t kAlignment = 64;

// Without this, a fuzzer would not get past the first checksum.
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
constexpr bool kCheckSums = false;
#else
constexpr bool kCheckSums = true;
#endif

using CrcTables = std::array<std::array<uint32_t, 256>, 8>;

CrcTables make_crc_tables() {
  CrcTables tables{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0xEDB88320u : 0u);
    tables[0][i] = crc;
  }
  for (size_t t = 1; t < 8; ++t) {
    for (size_t i = 0; i < 256; ++i) {
      tables[t][i] = (tables[t - 1][i] >> 8) ^ tables[0][tables[t - 1][i] & 0xff];
    }
  }
  return tables;
}

Failure damaged(const std::string& what) {
  return failure("invalid rkllm model! (" + what + ")");
}

// Reads little-endian fields and refuses to go past the end.
class Cursor {
 public:
  Cursor(const uint8_t* data, size_t size, const char* what)
      : at_(data), end_(data + size), what_(what) {}

  template <class T>
  T take() {
    T value;
    std::memcpy(&value, bytes(sizeof value), sizeof value);
    return value;
  }

  std::string text(uint64_t size) {
    const auto* start = reinterpret_cast<const char*>(bytes(size));
    return std::string(start, static_cast<size_t>(size));
  }

  const uint8_t* bytes(uint64_t size) {
    if (size > static_cast<uint64_t>(end_ - at_)) {
      throw damaged(format("the %s ends in the middle of an entry", what_));
    }
    const uint8_t* start = at_;
    at_ += size;
    return start;
  }

  bool at_end() const { return at_ == end_; }

 private:
  const uint8_t* at_;
  const uint8_t* end_;
  const char* what_;
};

Value read_value(Cursor& cursor) {
  switch (const int type = cursor.take<uint8_t>()) {
    case 1:
      return cursor.take<int64_t>();
    case 2:
      return cursor.take<double>();
    case 3:
      return cursor.text(cursor.take<uint64_t>());
    case 4: {
      const auto count = cursor.take<uint64_t>();
      if (count > kMaxSection / sizeof(int64_t)) throw damaged("an array of metadata is too long");
      std::vector<int64_t> items(static_cast<size_t>(count));
      const uint8_t* start = cursor.bytes(count * sizeof(int64_t));
      if (count) std::memcpy(items.data(), start, items.size() * sizeof(int64_t));
      return items;
    }
    default:
      throw damaged(format("metadata value of the unknown type %d", type));
  }
}

uint64_t item_size(DType dtype) {
  return dtype == DType::i8 || dtype == DType::u8 ? 1 : 4;
}

struct Entry {
  std::string name;
  Tensor tensor;
  uint64_t offset = 0;
};

Entry read_entry(Cursor& cursor) {
  Entry entry;
  entry.name = cursor.text(cursor.take<uint16_t>());
  const auto dtype = cursor.take<uint8_t>();
  const auto rank = cursor.take<uint8_t>();
  if (dtype > 3 || rank > 4) throw damaged(format("tensor of type %d and rank %d", dtype, rank));
  entry.tensor.dtype = static_cast<DType>(dtype);
  uint64_t bytes = item_size(entry.tensor.dtype);
  for (int i = 0; i < rank; ++i) {
    const auto dimension = cursor.take<uint64_t>();
    if (dimension > kMaxData || (dimension && bytes > kMaxData / dimension)) {
      throw damaged("a tensor is too large");
    }
    bytes *= dimension;
    entry.tensor.shape.push_back(dimension);
  }
  entry.offset = cursor.take<uint64_t>();
  entry.tensor.bytes = cursor.take<uint64_t>();
  entry.tensor.crc = cursor.take<uint32_t>();
  if (entry.tensor.bytes != bytes) throw damaged("a tensor does not have the size of its shape");
  if (entry.offset % kAlignment || entry.offset > kMaxData) throw damaged("a tensor is misplaced");
  return entry;
}

void refuse_overlap(std::vector<Entry>& entries) {
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.offset, a.tensor.bytes) < std::pair(b.offset, b.tensor.bytes);
  });
  for (size_t i = 1; i < entries.size(); ++i) {
    if (entries[i - 1].offset + entries[i - 1].tensor.bytes > entries[i].offset) {
      throw damaged("two tensors overlap");
    }
  }
}

template <class T>
T field(const uint8_t* header, size_t offset) {
  T value;
  std::memcpy(&value, header + offset, sizeof value);
  return value;
}

}  // namespace

uint32_t crc32(uint32_t crc, const uint8_t* data, size_t size) {
  static const CrcTables t = make_crc_tables();
  crc = ~crc;
  for (; size >= 8; size -= 8, data += 8) {
    const uint32_t low = field<uint32_t>(data, 0) ^ crc;
    const uint32_t high = field<uint32_t>(data, 4);
    crc = t[7][low & 0xff] ^ t[6][(low >> 8) & 0xff] ^ t[5][(low >> 16) & 0xff] ^ t[4][low >> 24] ^
          t[3][high & 0xff] ^ t[2][(high >> 8) & 0xff] ^ t[1][(high >> 16) & 0xff] ^
          t[0][high >> 24];
  }
  for (; size; --size, ++data) crc = (crc >> 8) ^ t[0][(crc ^ *data) & 0xff];
  return ~crc;
}

Mapping Mapping::file(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status {};
  if (fd < 0 || ::fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
    if (fd >= 0) ::close(fd);
    throw failure("failed to open '" + path + "'");
  }
  const auto size = static_cast<size_t>(status.st_size);
  void* data = size ? ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0) : nullptr;
  ::close(fd);
  if (data == MAP_FAILED) throw failure("failed to map '" + path + "'");
  return Mapping(static_cast<uint8_t*>(data), size);
}

Mapping Mapping::anonymous(size_t size) {
  if (size == 0) return Mapping();
  void* data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) throw failure(format("failed to allocate %zu bytes", size));
  return Mapping(static_cast<uint8_t*>(data), size);
}

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

Mapping::~Mapping() {
  if (data_) ::munmap(data_, size_);
}

File File::open(const std::string& path) {
  File file;
  file.mapping_ = Mapping::file(path);
  file.read(file.mapping_.data(), file.mapping_.size());
  return file;
}

File File::parse(const uint8_t* data, size_t size) {
  File file;
  file.read(data, size);
  return file;
}

void File::read(const uint8_t* data, size_t size) {
  if (size < kHeaderSize || std::memcmp(data, kMagic, sizeof kMagic) != 0) {
    const uint32_t got = size >= 4 ? field<uint32_t>(data, 0) : 0;
    throw Failure(
        format("E rkllm: invalid magic number, got %08x\nE rkllm: invalid rkllm model!", got));
  }
  if (kCheckSums && crc32(0, data, 60) != field<uint32_t>(data, 60)) {
    throw damaged("checksum of the header");
  }
  if (const auto version = field<uint32_t>(data, 8); version != kVersion) {
    throw failure(format("model version %u is not supported, reconvert the model", version));
  }
  sizes_only_ = (field<uint32_t>(data, 12) & kSizesOnly) != 0;
  if (field<uint64_t>(data, 16) != size) throw damaged("the file is cut");
  const auto metadata_size = field<uint64_t>(data, 24);
  const auto directory_size = field<uint64_t>(data, 32);
  const auto data_offset = field<uint64_t>(data, 40);
  if (metadata_size > kMaxSection || directory_size > kMaxSection || data_offset > size ||
      data_offset % kPage || kHeaderSize + metadata_size + directory_size > data_offset) {
    throw damaged("sections are misplaced");
  }
  const uint8_t* sections = data + kHeaderSize;
  const auto sections_size = static_cast<size_t>(metadata_size + directory_size);
  const uint32_t crc = crc32(0, sections, sections_size);
  if (kCheckSums && crc != field<uint32_t>(data, 56)) throw damaged("checksum of the metadata");
  fingerprint_ = format("%08x", crc);

  Cursor metadata(sections, static_cast<size_t>(metadata_size), "metadata");
  for (auto left = field<uint32_t>(data, 52); left; --left) {
    std::string key = metadata.text(metadata.take<uint16_t>());
    if (!metadata_.emplace(std::move(key), read_value(metadata)).second) {
      throw damaged("a key occurs twice");
    }
  }
  Cursor directory(sections + metadata_size, static_cast<size_t>(directory_size), "directory");
  std::vector<Entry> entries;
  for (auto left = field<uint32_t>(data, 48); left; --left) {
    entries.push_back(read_entry(directory));
  }
  if (!metadata.at_end() || !directory.at_end()) throw damaged("counts and sizes disagree");
  refuse_overlap(entries);
  const uint64_t data_size = size - data_offset;
  for (auto& entry : entries) {
    if (!sizes_only_) {
      if (entry.offset > data_size || entry.tensor.bytes > data_size - entry.offset) {
        throw damaged("tensor " + entry.name + " is outside of the file");
      }
      entry.tensor.data = data + data_offset + entry.offset;
    }
    if (!tensors_.emplace(std::move(entry.name), std::move(entry.tensor)).second) {
      throw damaged("a tensor's name occurs twice");
    }
  }
}

template <class T>
const T& File::value(const std::string& key) const {
  const auto found = metadata_.find(key);
  const T* value = found == metadata_.end() ? nullptr : std::get_if<T>(&found->second);
  if (!value) throw damaged("no usable " + key);
  return *value;
}

int64_t File::integer(const std::string& key, int64_t low, int64_t high) const {
  const auto number = value<int64_t>(key);
  if (number < low || number > high) throw damaged("impossible " + key);
  return number;
}

double File::real(const std::string& key, double low, double high) const {
  const auto number = value<double>(key);
  if (!(number >= low && number <= high)) throw damaged("impossible " + key);
  return number;
}

const std::string& File::text(const std::string& key) const {
  return value<std::string>(key);
}

std::string File::text_or(const std::string& key, const std::string& fallback) const {
  return metadata_.count(key) ? text(key) : fallback;
}

const std::vector<int64_t>& File::integers(const std::string& key) const {
  return value<std::vector<int64_t>>(key);
}

const Tensor& File::tensor(const std::string& name, DType dtype,
                           const std::vector<uint64_t>& shape) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw damaged("tensor " + name + " is missing");
  if (found->second.dtype != dtype || found->second.shape != shape) {
    throw damaged("tensor " + name + " has another type or shape");
  }
  if (sizes_only_) throw failure("this model file holds sizes only and cannot run");
  return found->second;
}

void File::verify(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw damaged("tensor " + name + " is missing");
  const Tensor& tensor = found->second;
  if (kCheckSums && tensor.data &&
      crc32(0, tensor.data, static_cast<size_t>(tensor.bytes)) != tensor.crc) {
    throw damaged("checksum of " + name);
  }
}

}  // namespace rkemu

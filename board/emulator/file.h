// The .rkemu container (docs/rkemu-format.md), mapped into memory. Everything in the file is
// checked before it is used: a hostile file leads to a Failure, never to a read outside of the
// mapping.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace rkemu {

// A region of memory from mmap: a file read-only, or zeroed pages that cost nothing until they are
// written.
class Mapping {
 public:
  Mapping() = default;
  static Mapping file(const std::string& path);
  static Mapping anonymous(size_t size);
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  Mapping(uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

enum class DType : uint8_t { f32 = 0, i8 = 1, u8 = 2, u32 = 3 };

struct Tensor {
  DType dtype = DType::u8;
  std::vector<uint64_t> shape;
  uint64_t bytes = 0;
  uint32_t crc = 0;
  const uint8_t* data = nullptr;  // nullptr in a file that holds sizes only

  template <class T>
  const T* as() const {
    return reinterpret_cast<const T*>(data);
  }
};

using Value = std::variant<int64_t, double, std::string, std::vector<int64_t>>;

// Continues a CRC-32 over a block, like zlib's crc32(); start with 0.
uint32_t crc32(uint32_t crc, const uint8_t* data, size_t size);

class File {
 public:
  // Maps a file. Failure: it is not a .rkemu file, of another version, truncated or damaged.
  static File open(const std::string& path);
  // Reads a container that is in memory already (tests, fuzzing); the memory must outlive the
  // result.
  static File parse(const uint8_t* data, size_t size);

  bool sizes_only() const { return sizes_only_; }
  const std::string& fingerprint() const { return fingerprint_; }
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }

  int64_t integer(const std::string& key, int64_t low, int64_t high) const;
  double real(const std::string& key, double low, double high) const;
  const std::string& text(const std::string& key) const;
  std::string text_or(const std::string& key, const std::string& fallback) const;
  const std::vector<int64_t>& integers(const std::string& key) const;

  bool has(const std::string& name) const { return tensors_.count(name) != 0; }
  // The tensor of that name, type and shape. Failure: there is none, or the file holds sizes only.
  const Tensor& tensor(const std::string& name, DType dtype,
                       const std::vector<uint64_t>& shape) const;
  // Compares the data with its checksum.
  void verify(const std::string& name) const;

 private:
  template <class T>
  const T& value(const std::string& key) const;
  void read(const uint8_t* data, size_t size);

  Mapping mapping_;
  bool sizes_only_ = false;
  std::string fingerprint_;
  std::map<std::string, Value> metadata_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace rkemu

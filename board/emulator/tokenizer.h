// Byte-pair encoding over the token table of the model file: text to ids and ids to bytes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "file.h"

namespace rkemu {

enum class TokenKind : uint8_t { normal = 0, control = 1, byte = 2, unused = 3, user_defined = 4 };

class Tokenizer {
 public:
  // Failure: the tables contradict each other. The file must outlive the tokenizer. A file of a
  // model that was exported without a tokenizer has no tables: then only the ids below are known.
  Tokenizer(const File& file, size_t vocab_size);

  // With `special`, control and user-defined tokens are found in the text, as the library
  // `tokenizers` finds added tokens.
  std::vector<int32_t> encode(std::string_view text, bool special);
  // The bytes of a token, with word marks replaced by spaces.
  std::string decode(int32_t id) const;

  bool has_tables() const { return kinds_ != nullptr; }
  TokenKind kind(int32_t id) const {
    return kinds_ ? static_cast<TokenKind>(kinds_[id]) : TokenKind::normal;
  }
  int32_t bos() const { return bos_; }
  bool add_bos() const { return add_bos_; }
  const std::vector<int32_t>& eos() const { return eos_; }

 private:
  struct Merge {
    uint32_t rank;
    int32_t result;
  };

  // A token that is found in a text before it is merged.
  struct Added {
    int32_t id;
    uint8_t flags;
    std::string text;
  };
  using AddedByFirst = std::vector<std::vector<Added>>;  // by first byte, longest text first

  void read_tables(const File& file);
  std::string_view text_of(size_t id) const;
  void index();
  // Calls `plain` for the parts of the text between added tokens, and appends the ids of the added
  // tokens.
  template <class Plain>
  static void split(std::string_view text, const AddedByFirst& tokens, std::vector<int32_t>& ids,
                    const Plain& plain);
  void encode_plain(std::string_view marked, std::vector<int32_t>& ids) const;
  void add_character(std::string_view character, std::vector<int32_t>& ids) const;
  void merge(std::vector<int32_t>& symbols) const;

  size_t vocab_size_;
  const char* text_ = nullptr;
  const uint32_t* offsets_ = nullptr;
  const uint8_t* kinds_ = nullptr;
  const uint8_t* flags_ = nullptr;  // of added tokens; nullptr: none is set
  const uint32_t* merges_ = nullptr;
  size_t merge_count_ = 0;
  int32_t bos_;
  int32_t unk_;
  bool add_bos_;
  std::vector<int32_t> eos_;

  // Built for the first text, as clients that send ids do not need them.
  bool indexed_ = false;
  std::unordered_map<std::string_view, int32_t> ids_;
  std::unordered_map<uint64_t, Merge> pairs_;
  std::vector<int32_t> bytes_;
  AddedByFirst added_, normalized_;  // matched before and after spaces become word marks
};

// The number of bytes of the UTF-8 character at the front of `text` (not empty): 1 to 4, or 0 if
// there is no valid one.
size_t utf8_length(std::string_view text);
// The number of bytes at the end of `text` that begin an incomplete character: 0 to 3.
size_t utf8_unfinished(std::string_view text);

}  // namespace rkemu

#include "tokenizer.h"

#include <algorithm>
#include <queue>

#include "log.h"

namespace rkemu {

namespace {

constexpr std::string_view kSpace = "\xe2\x96\x81";  // U+2581
constexpr size_t kMaxMerges = 1u << 26;
// Bits of tokenizer.flags: the token is matched after spaces became word marks; it takes the white
// space on its left; on its right.
constexpr uint8_t kNormalized = 1, kLeftStrip = 2, kRightStrip = 4, kFlags = 7;

uint64_t pair_key(int32_t left, int32_t right) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) | static_cast<uint32_t>(right);
}

std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string result;
  result.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    if (text.compare(at, from.size(), from) == 0) {
      result += to;
      at += from.size();
    } else {
      result += text[at++];
    }
  }
  return result;
}

size_t utf8_announced(unsigned char first) {
  if (first < 0x80) return 1;
  if (first >= 0xC2 && first <= 0xDF) return 2;
  if (first >= 0xE0 && first <= 0xEF) return 3;
  if (first >= 0xF0 && first <= 0xF4) return 4;
  return 0;
}

// Bounds of the second byte that exclude overlong forms, surrogates and values above U+10FFFF.
bool utf8_second_fits(unsigned char first, unsigned char second) {
  const unsigned char low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
  const unsigned char high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
  return second >= low && second <= high;
}

// The number of bytes at the front of `text` that belong to one well-formed, perhaps unfinished,
// character.
size_t utf8_well_formed(std::string_view text, size_t announced) {
  if (announced == 0) return 0;
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  size_t have = 1;
  for (; have < announced && have < text.size(); ++have) {
    const bool fits = have == 1 ? utf8_second_fits(byte(0), byte(1)) : (byte(have) & 0xC0) == 0x80;
    if (!fits) return 0;
  }
  return have;
}

// The code point of a well-formed character.
uint32_t code_point(std::string_view character) {
  const auto first = static_cast<unsigned char>(character[0]);
  if (character.size() == 1) return first;
  uint32_t code = first & (0x7Fu >> character.size());
  for (size_t i = 1; i < character.size(); ++i) {
    code = (code << 6) | (static_cast<unsigned char>(character[i]) & 0x3F);
  }
  return code;
}

// Unicode's White_Space.
bool is_space(uint32_t code) {
  return (code >= 0x09 && code <= 0x0D) || code == 0x20 || code == 0x85 || code == 0xA0 ||
         code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 ||
         code == 0x202F || code == 0x205F || code == 0x3000;
}

// The number of bytes of white space at the front of `text`.
size_t space_in_front(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const size_t length = utf8_length(text.substr(at));
    if (length == 0 || !is_space(code_point(text.substr(at, length)))) break;
    at += length;
  }
  return at;
}

// Where the white space at the end of `text` begins.
size_t space_at_end(std::string_view text) {
  size_t end = text.size();
  while (end > 0) {
    size_t begin = end - 1;
    while (begin > 0 && end - begin < 4 && (static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80)
      --begin;
    const std::string_view last = text.substr(begin, end - begin);
    if (utf8_length(last) != last.size() || !is_space(code_point(last))) break;
    end = begin;
  }
  return end;
}

}  // namespace

size_t utf8_length(std::string_view text) {
  const size_t announced = utf8_announced(static_cast<unsigned char>(text[0]));
  return utf8_well_formed(text, announced) == announced ? announced : 0;
}

size_t utf8_unfinished(std::string_view text) {
  for (size_t back = 1; back <= std::min<size_t>(3, text.size()); ++back) {
    const std::string_view tail = text.substr(text.size() - back);
    const size_t announced = utf8_announced(static_cast<unsigned char>(tail[0]));
    if (announced > back && utf8_well_formed(tail, announced) == back) return back;
  }
  return 0;
}

Tokenizer::Tokenizer(const File& file, size_t vocab_size) : vocab_size_(vocab_size) {
  const auto last = static_cast<int64_t>(vocab_size) - 1;
  bos_ = static_cast<int32_t>(file.integer("tokenizer.bos_token_id", 0, last));
  unk_ = static_cast<int32_t>(file.integer("tokenizer.unk_token_id", 0, last));
  add_bos_ = file.integer("tokenizer.add_bos", 0, 1) != 0;
  for (const int64_t id : file.integers("tokenizer.eos_token_ids")) {
    if (id < 0 || id > last) throw failure("invalid rkllm model! (impossible eos id)");
    eos_.push_back(static_cast<int32_t>(id));
  }
  if (file.has("tokenizer.text")) read_tables(file);
}

void Tokenizer::read_tables(const File& file) {
  const Failure broken = failure("invalid rkllm model! (tokenizer)");
  offsets_ = file.tensor("tokenizer.offsets", DType::u32, {vocab_size_ + 1}).as<uint32_t>();
  kinds_ = file.tensor("tokenizer.kinds", DType::u8, {vocab_size_}).as<uint8_t>();
  text_ = file.tensor("tokenizer.text", DType::u8, {offsets_[vocab_size_]}).as<char>();
  const auto found = file.tensors().find("tokenizer.merges");
  if (found == file.tensors().end() || found->second.shape.empty()) throw broken;
  if (found->second.shape[0] > kMaxMerges) throw broken;
  merge_count_ = static_cast<size_t>(found->second.shape[0]);
  merges_ = file.tensor("tokenizer.merges", DType::u32, {merge_count_, 3}).as<uint32_t>();
  for (const char* name : {"text", "offsets", "kinds", "merges"}) {
    file.verify(std::string("tokenizer.") + name);
  }
  if (file.tensors().count("tokenizer.flags")) {
    flags_ = file.tensor("tokenizer.flags", DType::u8, {vocab_size_}).as<uint8_t>();
    file.verify("tokenizer.flags");
  }
  for (size_t id = 0; id < vocab_size_; ++id) {
    if (offsets_[id] > offsets_[id + 1] || kinds_[id] > 4) throw broken;
    if (flags_ && flags_[id] > kFlags) throw broken;
  }
  for (size_t i = 0; i < merge_count_ * 3; ++i) {
    if (merges_[i] >= vocab_size_) throw broken;
  }
}

std::string_view Tokenizer::text_of(size_t id) const {
  return std::string_view(text_ + offsets_[id], offsets_[id + 1] - offsets_[id]);
}

void Tokenizer::index() {
  if (indexed_) return;
  bytes_.assign(256, -1);
  added_.resize(256);
  normalized_.resize(256);
  ids_.reserve(vocab_size_);
  for (size_t i = 0; i < vocab_size_; ++i) {
    const auto id = static_cast<int32_t>(i);
    const std::string_view text = text_of(i);
    if (text.empty()) continue;
    const auto first = static_cast<unsigned char>(text[0]);
    const TokenKind what = kind(id);
    if (what == TokenKind::byte) {
      bytes_[first] = id;
    } else if (what == TokenKind::control || what == TokenKind::user_defined) {
      const uint8_t flags = flags_ ? flags_[i] : 0;
      const bool late = flags & kNormalized;
      std::string found = late ? replace_all(text, " ", kSpace) : std::string(text);
      auto& bucket = (late ? normalized_ : added_)[static_cast<unsigned char>(found[0])];
      bucket.push_back({id, flags, std::move(found)});
    }
    if (what != TokenKind::byte) ids_.emplace(text, id);
  }
  for (AddedByFirst* tokens : {&added_, &normalized_}) {
    for (auto& bucket : *tokens) {
      std::sort(bucket.begin(), bucket.end(), [](const Added& a, const Added& b) {
        return a.text.size() != b.text.size() ? a.text.size() > b.text.size() : a.id > b.id;
      });
    }
  }
  pairs_.reserve(merge_count_);
  for (size_t i = 0; i < merge_count_; ++i) {
    const uint32_t* m = merges_ + 3 * i;
    pairs_.emplace(pair_key(static_cast<int32_t>(m[0]), static_cast<int32_t>(m[1])),
                   Merge{static_cast<uint32_t>(i), static_cast<int32_t>(m[2])});
  }
  indexed_ = true;
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool special) {
  if (!has_tables()) throw failure("the model has no tokenizer");
  index();
  std::vector<int32_t> ids;
  static const AddedByFirst kNone(256);
  split(text, special ? added_ : kNone, ids, [&](std::string_view raw) {
    split(replace_all(raw, " ", kSpace), special ? normalized_ : kNone, ids,
          [&](std::string_view marked) { encode_plain(marked, ids); });
  });
  return ids;
}

template <class Plain>
void Tokenizer::split(std::string_view text, const AddedByFirst& tokens, std::vector<int32_t>& ids,
                      const Plain& plain) {
  size_t done = 0;
  for (size_t at = 0; at < text.size();) {
    const auto& bucket = tokens[static_cast<unsigned char>(text[at])];
    const auto found = std::find_if(bucket.begin(), bucket.end(), [&](const Added& token) {
      return text.compare(at, token.text.size(), token.text) == 0;
    });
    if (found == bucket.end()) {
      ++at;
      continue;
    }
    size_t begin = at, end = at + found->text.size();
    at = end;
    if (found->flags & kLeftStrip) begin = std::max(space_at_end(text.substr(0, begin)), done);
    if (found->flags & kRightStrip) end += space_in_front(text.substr(end));
    if (done < begin) plain(text.substr(done, begin - done));
    // Nothing may be left of this token if the one before took its white space.
    if (begin < end) ids.push_back(found->id);
    done = end;
  }
  if (done < text.size()) plain(text.substr(done));
}

void Tokenizer::encode_plain(std::string_view marked, std::vector<int32_t>& ids) const {
  std::vector<int32_t> symbols;
  for (std::string_view rest = marked; !rest.empty();) {
    const size_t length = std::max<size_t>(1, utf8_length(rest));
    add_character(rest.substr(0, length), symbols);
    rest.remove_prefix(length);
  }
  merge(symbols);
  ids.insert(ids.end(), symbols.begin(), symbols.end());
}

void Tokenizer::add_character(std::string_view character, std::vector<int32_t>& ids) const {
  if (const auto found = ids_.find(character); found != ids_.end()) {
    ids.push_back(found->second);
    return;
  }
  const bool have_bytes = std::all_of(character.begin(), character.end(), [this](char byte) {
    return bytes_[static_cast<unsigned char>(byte)] >= 0;
  });
  if (!have_bytes) {
    ids.push_back(unk_);
    return;
  }
  for (const char byte : character) ids.push_back(bytes_[static_cast<unsigned char>(byte)]);
}

// Repeats the merge of lowest rank, the leftmost first: O(n log n) with a queue over a linked list.
void Tokenizer::merge(std::vector<int32_t>& symbols) const {
  struct Candidate {
    uint32_t rank;
    size_t left;
    int32_t left_id, right_id;
    bool operator>(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : left > other.left;
    }
  };
  constexpr size_t kNone = static_cast<size_t>(-1);
  const size_t n = symbols.size();
  std::vector<size_t> next(n), previous(n);
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto consider = [&](size_t left) {
    if (left == kNone || next[left] == kNone) return;
    const int32_t a = symbols[left], b = symbols[next[left]];
    if (const auto found = pairs_.find(pair_key(a, b)); found != pairs_.end()) {
      queue.push({found->second.rank, left, a, b});
    }
  };
  for (size_t i = 0; i < n; ++i) {
    next[i] = i + 1 < n ? i + 1 : kNone;
    previous[i] = i ? i - 1 : kNone;
  }
  for (size_t i = 0; i < n; ++i) consider(i);
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    const size_t right = next[best.left];
    if (symbols[best.left] != best.left_id || right == kNone || symbols[right] != best.right_id) {
      continue;
    }
    symbols[best.left] = pairs_.at(pair_key(best.left_id, best.right_id)).result;
    symbols[right] = -1;
    next[best.left] = next[right];
    if (next[right] != kNone) previous[next[right]] = best.left;
    consider(previous[best.left]);
    consider(best.left);
  }
  symbols.erase(std::remove(symbols.begin(), symbols.end(), -1), symbols.end());
}

std::string Tokenizer::decode(int32_t id) const {
  if (!has_tables()) return "";
  const std::string_view text = text_of(static_cast<size_t>(id));
  return kind(id) == TokenKind::byte ? std::string(text) : replace_all(text, kSpace, " ");
}

}  // namespace rkemu

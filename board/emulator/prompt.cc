// A run's prompt: its tokens, those of them that are in the cache already, the room for the others.
#include <algorithm>

#include "log.h"
#include "run.h"

namespace rkemu {

namespace {

// Positions of the context that a prompt may not fill (seen: "max context: 1020" for a context of
// 1024, rkllama issue 25).
constexpr int kReserved = 4;

// FNV-1a over the bytes of a row, negative so that it is not a token id.
Key key_of_row(const float* row, int width) {
  uint64_t hash = 14695981039346656037u;
  const auto* bytes = reinterpret_cast<const uint8_t*>(row);
  for (size_t i = 0; i < static_cast<size_t>(width) * sizeof(float); ++i) {
    hash = (hash ^ bytes[i]) * 1099511628211u;
  }
  return static_cast<Key>(hash | (uint64_t{1} << 63));
}

}  // namespace

std::vector<int32_t> Run::tokenize(const std::string& text) const {
  if (!engine().tokenizer.has_tables() && loaded_.settings.tokenize)
    return loaded_.settings.tokenize(text);
  return engine().tokenizer.encode(text, true);
}

// Puts the template around a text, and <bos> and the system prompt before the first turn of a
// conversation.
void Run::start_text(Batch& batch, const Input& input, bool first) {
  std::string head, body = input.text;
  if (loaded_.rules.chat_template) {
    if (input.tool) body = "<" + loaded_.tool_tag + ">\n" + body + "\n</" + loaded_.tool_tag + ">";
    head = first ? loaded_.chat_template.system : "";
    body = loaded_.chat_template.prefix + body + loaded_.chat_template.suffix;
  }
  const auto add = [&](const std::vector<int32_t>& ids) {
    batch.keys.insert(batch.keys.end(), ids.begin(), ids.end());
  };
  if (first && engine().tokenizer.add_bos()) batch.keys.push_back(engine().tokenizer.bos());
  // The system prompt counts with the length of its own tokens, although in the whole text tokens
  // may merge across the border.
  if (!head.empty())
    batch.conversation->system_length = static_cast<int>(batch.keys.size() + tokenize(head).size());
  add(tokenize(head + body));
  if (log_level() >= 2) info("prompt: " + head + body);
}

void Run::start_tokens(Batch& batch, const Input& input, bool first) {
  const bool wrapped = loaded_.settings.guesses.tokens_wrapped && loaded_.rules.chat_template;
  const auto add = [&](const std::vector<int32_t>& ids) {
    batch.keys.insert(batch.keys.end(), ids.begin(), ids.end());
  };
  const ChatTemplate& around = loaded_.chat_template;
  if (first && loaded_.settings.guesses.bos_doubled && engine().tokenizer.add_bos()) {
    batch.keys.push_back(engine().tokenizer.bos());
  }
  if (wrapped && !around.prefix.empty()) add(tokenize(around.prefix));
  add(input.tokens);
  if (wrapped && !around.suffix.empty()) add(tokenize(around.suffix));
}

void Run::prepare(Batch& batch, const Input& input, Past past) {
  Conversation& conversation = *batch.conversation;
  const bool goes_on = past == Past::history && conversation.cache.length() > 0;
  if (goes_on && conversation.pending) batch.keys.push_back(*conversation.pending);
  conversation.pending.reset();
  switch (input.kind) {
    case Input::Kind::text:
      start_text(batch, input, !goes_on);
      break;
    case Input::Kind::tokens:
      start_tokens(batch, input, !goes_on);
      break;
    case Input::Kind::embeddings:
      batch.rows = input.rows;
      for (size_t i = 0; i < input.rows.size(); i += static_cast<size_t>(config().hidden_size)) {
        batch.keys.push_back(key_of_row(input.rows.data() + i, config().hidden_size));
      }
      break;
  }
  if (batch.keys.empty()) throw failure("the prompt is empty");
  for (const Key key : batch.keys) {
    if (key >= config().vocab_size) {
      throw failure(format("token %lld is not in the vocabulary of %d", static_cast<long long>(key),
                           config().vocab_size));
    }
  }
  const std::string adapter = request_.lora.value_or("");
  const bool may_reuse = input.kind == Input::Kind::embeddings ? loaded_.rules.embedding_reuse
                                                               : loaded_.rules.prefix_reuse;
  if (!goes_on) {
    const Guesses& guesses = loaded_.settings.guesses;
    const bool whole = guesses.prefix_read || (mode_ != Mode::generate && guesses.arrays_whole);
    reuse_prefix(batch, !whole && conversation.adapter == adapter &&
                            (may_reuse || past == Past::prompt_cache));
  }
  conversation.adapter = adapter;
  make_room(conversation, batch.keys.size());
  batch.prompt_length = conversation.cache.length() + static_cast<int>(batch.keys.size());

  conversation.sampler.start(request_.sampling.value_or(loaded_.settings.sampling));
  for (const Key key : batch.keys) {
    if (key >= 0) conversation.sampler.accept(static_cast<int32_t>(key));
  }
}

void Run::reuse_prefix(Batch& batch, bool allowed) {
  const auto& have = batch.conversation->cache.contents();
  size_t common = 0;
  while (allowed && common + 1 < batch.keys.size() && common < have.size() &&
         have[common] == batch.keys[common]) {
    ++common;
  }
  batch.conversation->cache.truncate(static_cast<int>(common));
  const auto known = batch.keys.begin() + static_cast<std::ptrdiff_t>(common);
  const auto rows = std::count_if(batch.keys.begin(), known, [](Key key) { return key < 0; });
  batch.rows.erase(batch.rows.begin(), batch.rows.begin() + rows * config().hidden_size);
  batch.keys.erase(batch.keys.begin(), known);
}

// Drops the oldest half of a full conversation after the first n_keep positions (the whole system
// prompt if n_keep is -1).
void Run::make_room(Conversation& conversation, size_t needed) {
  const int limit = loaded_.settings.max_context - kReserved;
  Cache& cache = conversation.cache;
  const int want = cache.length() + static_cast<int>(std::min<size_t>(needed, 1u << 30));
  if (want <= limit) return;
  const int kept =
      std::min(loaded_.settings.n_keep < 0 ? conversation.system_length : loaded_.settings.n_keep,
               cache.length());
  if (kept + static_cast<int>(std::min<size_t>(needed, 1u << 30)) > limit) {
    // The vendor's spelling.
    throw Failure(
        format("E rkllm: prompt gather than max context (prompt: %zu tokens, max context: %d)",
               needed, limit));
  }
  const int gone =
      std::min(std::max(want - limit, (cache.length() - kept) / 2), cache.length() - kept);
  engine().forward.erase(cache, kept, kept + gone);
}

}  // namespace rkemu

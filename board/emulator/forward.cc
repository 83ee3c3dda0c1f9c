#include "forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace rkemu {

namespace {

constexpr int kRowBlock = IntegerProduct::kMaxRows;
// With fewer multiplications than this, waking a thread costs more than it saves.
constexpr size_t kWorthThreads = 1u << 18;

size_t times(int a, int b) {
  return static_cast<size_t>(a) * static_cast<size_t>(b);
}

// The size of a group of activations with its padding, in bytes.
int padded(int group) {
  constexpr int kPadding = IntegerProduct::kPadding;
  return (group + kPadding - 1) / kPadding * kPadding;
}

}  // namespace

Forward::Forward(const Model& model, Pool& pool, const Kernels& kernels)
    : model_(model),
      config_(model.config()),
      pool_(pool),
      kernels_(kernels),
      embedding_factor_(std::sqrt(static_cast<float>(config_.hidden_size))),
      attention_scale_(
          static_cast<float>(1.0 / std::sqrt(static_cast<double>(config_.query_pre_attn_scalar)))),
      workplaces_(static_cast<size_t>(pool.size())) {
  for (int i = 0; i < config_.head_dim; i += 2) {
    const double exponent = static_cast<double>(i) / config_.head_dim;
    inverse_frequencies_.push_back(
        static_cast<float>(1.0 / std::pow(static_cast<double>(config_.rope_theta), exponent)));
  }
}

void Forward::scale_embedding(float* row) const {
  kernels_.scale(row, embedding_factor_, config_.hidden_size);
}

// transformers multiplies position and frequency as floats; sine and cosine are rounded from double
// here, which gives the same floats on machines whose math libraries differ in the last bit of a
// double.
void Forward::prepare_rope(int positions) {
  const size_t half = inverse_frequencies_.size();
  for (size_t p = cos_.size() / half; p < static_cast<size_t>(positions); ++p) {
    for (const float frequency : inverse_frequencies_) {
      const auto angle = static_cast<double>(frequency * static_cast<float>(p));
      cos_.push_back(static_cast<float>(std::cos(angle)));
      sin_.push_back(static_cast<float>(std::sin(angle)));
    }
  }
}

void Forward::rotate(float* head, int position, bool back) const {
  const auto half = static_cast<int>(inverse_frequencies_.size());
  const float* cos = cos_.data() + times(position, half);
  const float* sin = sin_.data() + times(position, half);
  for (int i = 0; i < half; ++i) {
    const float s = back ? -sin[i] : sin[i];
    const float a = head[i], b = head[i + half];
    head[i] = a * cos[i] - b * s;
    head[i + half] = b * cos[i] + a * s;
  }
}

template <class Job>
void Forward::each(int count, size_t work, const Job& job) {
  if (work < kWorthThreads) {
    for (int i = 0; i < count; ++i) job(i, 0);
  } else {
    pool_.run(count, job);
  }
}

void Forward::norm(const float* x, const float* weight, int rows, float* out) {
  const int n = config_.hidden_size;
  each(rows, times(rows, n) * 4, [&](int r, int) {
    kernels_.rms_norm(x + times(r, n), weight, config_.rms_norm_eps, n, out + times(r, n));
  });
}

void Forward::integer_block(const Quantized& w, const Target& target, int rows,
                            const Block& block) {
  const auto& [first, count, worker] = block;
  const Matrix& m = *target.matrix;
  const int group = m.in / w.groups;
  const auto in = static_cast<size_t>(m.in), groups = static_cast<size_t>(w.groups);
  const size_t x_stride = times(w.groups, padded(group));
  Workplace& at = workplaces_[static_cast<size_t>(worker)];
  const Rows<int32_t> acc{at.sums.data(), kRowBlock, rows};
  const Rows<float> out{target.out + first, static_cast<size_t>(m.out), rows};
  for (int g = 0; g < w.groups; ++g) {
    kernels_.integer_product({{w.data + times(first, m.in) + g * group, in, count},
                              {quantized_.data() + times(g, padded(group)), x_stride, rows},
                              group,
                              {x_sums_.data() + g, groups, rows},
                              acc,
                              at.weights.data()});
    const Rows<const float> scale{w.scale + times(first, w.groups) + g, groups, count};
    for (int t = 0; t < rows; ++t) kernels_.dequantize(acc[t], scale, g == 0, out[t]);
  }
  for (int t = 0; t < rows; ++t) kernels_.scale(out[t], x_scales_[static_cast<size_t>(t)], count);
}

void Forward::multiply_block(const Target& target, const Rows<const float>& x, const Block& block) {
  const auto& [first, count, worker] = block;
  const Matrix& m = *target.matrix;
  const Rows<float> out{target.out + first, static_cast<size_t>(m.out), x.count};
  if (const auto* quantized = std::get_if<Quantized>(&m.weights)) {
    integer_block(*quantized, target, x.count, block);
  } else {
    const float* w = std::get<const float*>(m.weights) + times(first, m.in);
    kernels_.float_product({{w, static_cast<size_t>(m.in), count}, x, m.in, out});
  }
  if (target.softcap > 0) {
    for (int t = 0; t < x.count; ++t) kernels_.softcap(out[t], target.softcap, count);
  }
}

void Forward::add_lora(const Target& target, const Rows<const float>& x) {
  const Adapter::Pair& pair = *target.lora;
  const int out = target.matrix->out;
  const auto product = [&](const float* w, const Rows<const float>& from, int to,
                           std::vector<float>& result) {
    const auto k = static_cast<int>(from.stride);
    const int blocks = (to + kRowBlock - 1) / kRowBlock;
    result.resize(times(from.count, to));
    each(blocks, times(from.count, k) * static_cast<size_t>(to), [&](int b, int) {
      const int first = b * kRowBlock;
      kernels_.float_product({{w + times(first, k), from.stride, std::min(kRowBlock, to - first)},
                              from,
                              k,
                              {result.data() + first, static_cast<size_t>(to), from.count}});
    });
  };
  product(pair.a, x, pair.rank, lora_low_);
  product(pair.b, {lora_low_.data(), static_cast<size_t>(pair.rank), x.count}, out, lora_high_);
  for (int t = 0; t < x.count; ++t) {
    kernels_.add(target.out + times(t, out), lora_high_.data() + times(t, out), pair.factor, out);
  }
}

void Forward::quantize(const Rows<const float>& x, int groups) {
  const auto k = static_cast<int>(x.stride);
  const size_t stride = times(groups, padded(k / groups));
  quantized_.resize(static_cast<size_t>(x.count) * stride);
  x_scales_.resize(static_cast<size_t>(x.count));
  x_sums_.resize(times(x.count, groups));
  each(x.count, times(x.count, k), [&](int t, int) {
    const auto row = static_cast<size_t>(t);
    kernels_.quantize(x[t], k, k / groups, quantized_.data() + row * stride, x_scales_.data() + row,
                      x_sums_.data() + times(t, groups));
  });
}

void Forward::multiply(const Rows<const float>& x, std::initializer_list<Target> targets) {
  const int rows = x.count;
  const auto k = static_cast<int>(x.stride);
  int groups = 0;  // in which the activations are quantized at the moment
  for (auto target = targets.begin(); target != targets.end();) {
    const int wanted = target->matrix->groups();
    auto end = target;
    int blocks = 0;
    size_t work = 0;
    for (; end != targets.end() && end->matrix->groups() == wanted; ++end) {
      blocks += (end->matrix->out + kRowBlock - 1) / kRowBlock;
      work += times(end->matrix->out, k) * static_cast<size_t>(rows);
    }
    if (wanted && groups != wanted) {
      groups = wanted;
      quantize(x, groups);
    }
    each(blocks, work, [&](int block, int worker) {
      const Target* at = target;
      for (;; ++at) {
        const int of_this = (at->matrix->out + kRowBlock - 1) / kRowBlock;
        if (block < of_this) break;
        block -= of_this;
      }
      const int first = block * kRowBlock;
      multiply_block(*at, x, {first, std::min(kRowBlock, at->matrix->out - first), worker});
    });
    target = end;
  }
  for (const Target& target : targets) {
    if (target.lora && target.lora->rank) add_lora(target, x);
  }
}

void Forward::store(Cache& cache, int layer, int position, const float* k, const float* v) {
  const int dim = config_.head_dim;
  const size_t at = static_cast<size_t>(position) * cache.row_bytes();
  for (int h = 0; h < config_.kv_heads; ++h) {
    for (const auto& [from, to] :
         {std::pair(k, cache.keys(layer, h)), std::pair(v, cache.values(layer, h))}) {
      const float* row = from + times(h, dim);
      if (cache.half()) {
        kernels_.to_half(row, dim, reinterpret_cast<uint16_t*>(to + at));
      } else {
        std::memcpy(to + at, row, cache.row_bytes());
      }
    }
  }
}

void Forward::attention(const std::vector<Row>& rows, int index, const Layer& layer) {
  const int dim = config_.head_dim;
  const int most = std::max(1, Attention::kMaxQueries / (config_.heads / config_.kv_heads));
  std::vector<Tile> tiles;
  size_t work = 0;
  for (int r = 0; r < static_cast<int>(rows.size()); ++r) {
    const Row& row = rows[static_cast<size_t>(r)];
    const bool follows = r && rows[static_cast<size_t>(r - 1)].cache == row.cache &&
                         rows[static_cast<size_t>(r - 1)].position + 1 == row.position;
    if (!follows || tiles.back().count == most) tiles.push_back({r, 0});
    ++tiles.back().count;
    work += times(row.position + 1, 2 * config_.q_size());
  }
  each(static_cast<int>(rows.size()), rows.size() * static_cast<size_t>(8 * config_.q_size()),
       [&](int r, int) {
         const Row& row = rows[static_cast<size_t>(r)];
         float* q = q_.data() + times(r, config_.q_size());
         float* k = k_.data() + times(r, config_.kv_size());
         for (int h = 0; h < config_.heads; ++h) rotate(q + times(h, dim), row.position, false);
         for (int h = 0; h < config_.kv_heads; ++h) rotate(k + times(h, dim), row.position, false);
         store(*row.cache, index, row.position, k, v_.data() + times(r, config_.kv_size()));
       });
  each(static_cast<int>(tiles.size()) * config_.kv_heads, work, [&](int job, int worker) {
    const Tile& tile = tiles[static_cast<size_t>(job / config_.kv_heads)];
    attend(rows, tile, index, layer, job % config_.kv_heads, worker);
  });
}

void Forward::attend(const std::vector<Row>& rows, const Tile& tile, int index, const Layer& layer,
                     int head, int worker) {
  const Row& row = rows[static_cast<size_t>(tile.first)];
  const auto stride = static_cast<size_t>(config_.q_size());
  Attention a{};
  a.heads = config_.heads / config_.kv_heads;
  a.head_dim = config_.head_dim;
  const size_t at = times(tile.first, config_.q_size()) + times(head * a.heads, a.head_dim);
  a.q = {q_.data() + at, stride, tile.count};
  a.out = {mixed_.data() + at, stride, tile.count};
  a.keys = row.cache->keys(index, head);
  a.values = row.cache->values(index, head);
  a.half = row.cache->half();
  a.position = row.position;
  a.window = layer.sliding ? config_.sliding_window : 0;
  a.scale = attention_scale_;
  a.softcap = config_.attn_softcap;
  std::vector<float>& room = workplaces_[static_cast<size_t>(worker)].attention;
  room.resize(std::max(room.size(), Attention::room_for(tile.count * a.heads, a.head_dim,
                                                        row.position + tile.count - a.first(0))));
  a.room = room.data();
  kernels_.attend(a);
}

void Forward::run(const std::vector<Row>& rows, float* x, const Adapter* adapter) {
  const auto n = static_cast<int>(rows.size());
  const int hidden = config_.hidden_size, inner = config_.intermediate_size;
  const auto size = [n](std::vector<float>& buffer, int width) { buffer.resize(times(n, width)); };
  size(normed_, hidden);
  size(y_, hidden);
  size(q_, config_.q_size());
  size(mixed_, config_.q_size());
  size(k_, config_.kv_size());
  size(v_, config_.kv_size());
  size(gate_, inner);
  size(up_, inner);
  for (const Row& row : rows) prepare_rope(row.position + 1);

  for (size_t l = 0; l < model_.layers().size(); ++l) {
    const Layer& layer = model_.layers()[l];
    const auto target = [&](Part part, std::vector<float>& out) {
      return Target{&layer[part], out.data(), adapter ? &adapter->at(l, part) : nullptr};
    };
    const auto all = [n](const std::vector<float>& of, int width) {
      return Rows<const float>{of.data(), static_cast<size_t>(width), n};
    };
    const auto add_to_residual = [&](const float* post_norm) {
      if (post_norm) norm(y_.data(), post_norm, n, y_.data());
      each(n, times(n, hidden) * 4, [&](int r, int) {
        kernels_.add(x + times(r, hidden), y_.data() + times(r, hidden), 1.0f, hidden);
      });
    };
    norm(x, layer.attn_norm, n, normed_.data());
    multiply(all(normed_, hidden), {target(Part::q, q_), target(Part::k, k_), target(Part::v, v_)});
    attention(rows, static_cast<int>(l), layer);
    multiply(all(mixed_, config_.q_size()), {target(Part::o, y_)});
    add_to_residual(layer.attn_post_norm);

    norm(x, layer.ffn_norm, n, normed_.data());
    multiply(all(normed_, hidden), {target(Part::gate, gate_), target(Part::up, up_)});
    each(n, times(n, inner) * 8, [&](int r, int) {
      kernels_.gelu_multiply(gate_.data() + times(r, inner), up_.data() + times(r, inner), inner);
    });
    multiply(all(gate_, inner), {target(Part::down, y_)});
    add_to_residual(layer.ffn_post_norm);
  }
  norm(x, model_.output_norm(), n, x);
}

void Forward::logits(const float* hidden, int rows, float* out) {
  multiply({hidden, static_cast<size_t>(config_.hidden_size), rows},
           {{&model_.head(), out, nullptr, config_.final_softcap}});
}

void Forward::erase(Cache& cache, int begin, int end) {
  const int gone = end - begin;
  const int dim = config_.head_dim;
  cache.erase(begin, end);
  prepare_rope(gone + 1);
  std::vector<float> row(static_cast<size_t>(dim));
  for (int layer = 0; layer < config_.layers; ++layer) {
    for (int head = 0; head < config_.kv_heads; ++head) {
      for (int p = begin; p < cache.length(); ++p) {
        uint8_t* at = cache.keys(layer, head) + static_cast<size_t>(p) * cache.row_bytes();
        if (cache.half()) {
          for (int i = 0; i < dim; ++i) {
            row[static_cast<size_t>(i)] = half_to_float(reinterpret_cast<uint16_t*>(at)[i]);
          }
        } else {
          std::memcpy(row.data(), at, cache.row_bytes());
        }
        rotate(row.data(), gone, true);
        if (cache.half()) {
          kernels_.to_half(row.data(), dim, reinterpret_cast<uint16_t*>(at));
        } else {
          std::memcpy(at, row.data(), cache.row_bytes());
        }
      }
    }
  }
}

}  // namespace rkemu

// Attention in tiles, included by each kernels_*.cc and compiled with its instruction set. A block
// of keys, later of values, is turned into floats once and meets the queries of several positions;
// tiles of queries and keys, or of queries and a part of the values, stay in registers.
//
// The terms that a query adds up, and their order, do not depend on the other queries: scores are
// added in lanes as in dot(), values by position.
#pragma once

#include "kernels_lanes.h"

namespace rkemu {
namespace {

#if defined(__AVX512F__)
constexpr int kTile = 4;  // 16 sums of a register each
#else
constexpr int kTile = 2;
#endif

// The parts of Attention::room. Rows have `width` floats: head_dim, padded with zeros.
struct Workplace {
  int queries;
  size_t width;
  float* block;  // [kBlock][width]: keys or values
  float* rows;   // [queries][width]: the queries, later their weighted sums of values
  size_t seen;
  float* scores;  // [queries][seen]

  explicit Workplace(const Attention& a)
      : queries(a.q.count * a.heads),
        width(Attention::padded(a.head_dim)),
        block(a.room),
        rows(block + Attention::kBlock * width),
        seen(Attention::padded(a.position + a.q.count - a.first(0))),
        scores(rows + static_cast<size_t>(queries) * width) {}
  float* row(int query) const { return rows + static_cast<size_t>(query) * width; }
  float* scores_of(int query) const { return scores + static_cast<size_t>(query) * seen; }
};

// Copies n floats and adds zeros up to `width`.
void copy_row(const float* from, int n, float* to, size_t width) {
  for (int i = 0; i < n; ++i) to[i] = from[i];
  for (size_t i = static_cast<size_t>(n); i < width; ++i) to[i] = 0;
}

void load_block(const void* from, bool half, int position, int count, int dim,
                const Workplace& to) {
  for (int j = 0; j < count; ++j) {
    const size_t start = static_cast<size_t>(position + j) * static_cast<size_t>(dim);
    float* row = to.block + static_cast<size_t>(j) * to.width;
    if (half) {
      const uint16_t* halves = static_cast<const uint16_t*>(from) + start;
      for (int i = 0; i < dim; ++i) row[i] = from_half(halves[i]);
      for (size_t i = static_cast<size_t>(dim); i < to.width; ++i) row[i] = 0;
    } else {
      copy_row(static_cast<const float*>(from) + start, dim, row, to.width);
    }
  }
}

// Stores the sums of kTile vectors, each added as sum_lanes() adds, times `scale`.
#if defined(__AVX512F__)
inline void store_sums(const Lanes (&of)[kTile], float scale, float* to) {
  const auto folded = [](__m512 a, __m512 b) {  // halves onto halves
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  };
  const __m512 two = folded(of[0].parts[0], of[1].parts[0]);
  const __m512 others = folded(of[2].parts[0], of[3].parts[0]);
  __m512 sums = _mm512_add_ps(_mm512_shuffle_f32x4(two, others, 0x88),
                              _mm512_shuffle_f32x4(two, others, 0xDD));
  sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0x4E));
  sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0xB1));
  // Each sum is in all four lanes of its quarter.
  const __m512i quarters = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  const __m128 four = _mm512_castps512_ps128(_mm512_permutexvar_ps(quarters, sums));
  _mm_storeu_ps(to, _mm_mul_ps(four, _mm_set1_ps(scale)));
}
#else
inline void store_sums(const Lanes (&of)[kTile], float scale, float* to) {
  float lanes[kTile][kLanes];
  RKEMU_UNROLL for (int j = 0; j < kTile; ++j) store_lanes(of[j], lanes[j]);
  for (int j = 0; j < kTile; ++j) to[j] = sum_lanes(lanes[j]) * scale;
}
#endif

// Computes the scores of kQueries queries and kTile keys.
template <int kQueries>
void score_tile(const float* q, const float* keys, size_t width, float scale, float* scores,
                size_t seen) {
  Lanes sums[kQueries][kTile] = {};
  for (size_t i = 0; i < width; i += kLanes) {
    Lanes key[kTile];
    RKEMU_UNROLL for (int j = 0; j < kTile; ++j) key[j] =
        load_lanes(keys + static_cast<size_t>(j) * width + i);
    RKEMU_UNROLL for (int n = 0; n < kQueries; ++n) {
      const Lanes query = load_lanes(q + static_cast<size_t>(n) * width + i);
      RKEMU_UNROLL for (int j = 0; j < kTile; ++j) add_products(query, key[j], sums[n][j]);
    }
  }
  RKEMU_UNROLL for (int n = 0; n < kQueries; ++n)
      store_sums(sums[n], scale, scores + static_cast<size_t>(n) * seen);
}

// Scores with all keys of the block, including those that a query does not see, which are not read.
template <int kQueries>
int score_block(const Workplace& at, int query, int offset, int count, float scale) {
  for (; query + kQueries <= at.queries; query += kQueries) {
    for (int j = 0; j < count; j += kTile) {
      score_tile<kQueries>(at.row(query), at.block + static_cast<size_t>(j) * at.width, at.width,
                           scale, at.scores_of(query) + offset + j, at.seen);
    }
  }
  return query;
}

// Adds `count` weighted values to a part of the sums of kQueries queries.
template <int kQueries, int kVectors>
void mix_tile(const float* scores, size_t seen, const float* values, size_t width, int count,
              float* out) {
  Lanes sums[kQueries][kVectors];
  RKEMU_UNROLL for (int n = 0; n < kQueries; ++n) {
    RKEMU_UNROLL for (int v = 0; v < kVectors; ++v) sums[n][v] =
        load_lanes(out + static_cast<size_t>(n) * width + v * kLanes);
  }
  for (int j = 0; j < count; ++j) {
    Lanes value[kVectors];
    RKEMU_UNROLL for (int v = 0; v < kVectors; ++v) value[v] =
        load_lanes(values + static_cast<size_t>(j) * width + v * kLanes);
    RKEMU_UNROLL for (int n = 0; n < kQueries; ++n) {
      const float score = scores[static_cast<size_t>(n) * seen + static_cast<size_t>(j)];
      RKEMU_UNROLL for (int v = 0; v < kVectors; ++v) add_products(value[v], score, sums[n][v]);
    }
  }
  RKEMU_UNROLL for (int n = 0; n < kQueries; ++n) {
    RKEMU_UNROLL for (int v = 0; v < kVectors; ++v)
        store_lanes(sums[n][v], out + static_cast<size_t>(n) * width + v * kLanes);
  }
}

// Adds values [begin, end) of the block; `offset` is where the block begins in the scores.
template <int kQueries>
void mix(const Workplace& at, int query, int offset, int begin, int end) {
  const float* scores = at.scores_of(query) + offset + begin;
  const float* values = at.block + static_cast<size_t>(begin) * at.width;
  size_t i = 0;
  for (; i + kTile * kLanes <= at.width; i += kTile * kLanes) {
    mix_tile<kQueries, kTile>(scores, at.seen, values + i, at.width, end - begin,
                              at.row(query) + i);
  }
  for (; i < at.width; i += kLanes) {
    mix_tile<kQueries, 1>(scores, at.seen, values + i, at.width, end - begin, at.row(query) + i);
  }
}

// Adds a block of values: kQueries queries at a time if all see the whole block, otherwise for each
// query the part that it sees.
template <int kQueries>
int mix_block(const Attention& a, const Workplace& at, int query, int start, int count) {
  const int offset = start - a.first(0);
  for (; query + kQueries <= at.queries; query += kQueries) {
    const int earliest = query / a.heads, latest = (query + kQueries - 1) / a.heads;
    if (a.first(latest) <= start && start + count <= a.position + earliest + 1) {
      mix<kQueries>(at, query, offset, 0, count);
      continue;
    }
    for (int n = query; n < query + kQueries; ++n) {
      const int row = n / a.heads;
      const int begin = a.first(row) > start ? a.first(row) - start : 0;
      const int seen = a.position + row + 1 - start;
      const int end = seen < count ? seen : count;
      if (begin < end) mix<1>(at, n, offset, begin, end);
    }
  }
  return query;
}

void softmax(float* x, int n) {
  float largest[kLanes];
  for (int l = 0; l < kLanes; ++l) largest[l] = x[0];
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) largest[l] = x[i + l] > largest[l] ? x[i + l] : largest[l];
  }
  for (int l = 0; i < n; ++i, ++l) largest[l] = x[i] > largest[l] ? x[i] : largest[l];
  for (int l = 1; l < kLanes; ++l) largest[0] = largest[l] > largest[0] ? largest[l] : largest[0];
  for (i = 0; i < n; ++i) x[i] = exp_inline(x[i] - largest[0]);
  float lanes[kLanes] = {};
  for (i = 0; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += x[i + l];
  }
  for (int l = 0; i < n; ++i, ++l) lanes[l] += x[i];
  scale(x, 1.0f / sum_lanes(lanes), n);
}

void attend(const Attention& a) {
  const Workplace at(a);
  const int first = a.first(0), end = a.position + a.q.count;
  for (int n = 0; n < at.queries; ++n) {
    copy_row(a.q[n / a.heads] + n % a.heads * a.head_dim, a.head_dim, at.row(n), at.width);
  }
  for (int start = first; start < end; start += Attention::kBlock) {
    const int count = end - start < Attention::kBlock ? end - start : Attention::kBlock;
    load_block(a.keys, a.half, start, count, a.head_dim, at);
    int query = score_block<kTile>(at, 0, start - first, count, a.scale);
    query = score_block<2>(at, query, start - first, count, a.scale);
    score_block<1>(at, query, start - first, count, a.scale);
  }
  for (int n = 0; n < at.queries; ++n) {
    const int row = n / a.heads;
    float* scores = at.scores_of(n) + a.first(row) - first;
    const int seen = a.position + row + 1 - a.first(row);
    if (a.softcap > 0) softcap(scores, a.softcap, seen);
    softmax(scores, seen);
    copy_row(scores, 0, at.row(n), at.width);
  }
  for (int start = first; start < end; start += Attention::kBlock) {
    const int count = end - start < Attention::kBlock ? end - start : Attention::kBlock;
    load_block(a.values, a.half, start, count, a.head_dim, at);
    int query = mix_block<kTile>(a, at, 0, start, count);
    query = mix_block<2>(a, at, query, start, count);
    mix_block<1>(a, at, query, start, count);
  }
  for (int n = 0; n < at.queries; ++n) {
    const auto dim = static_cast<size_t>(a.head_dim);
    copy_row(at.row(n), a.head_dim, a.out[n / a.heads] + n % a.heads * a.head_dim, dim);
  }
}

}  // namespace
}  // namespace rkemu

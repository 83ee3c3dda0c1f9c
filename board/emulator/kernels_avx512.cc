// AVX-512 with VNNI. vpdpbusd multiplies unsigned by signed bytes: the weight's sign bit is flipped
// on the way from memory (w + 128), and 128 times the sum of the activations is subtracted again,
// so files keep plain int8 rows.
#include <immintrin.h>

#include "kernels_panels.h"
#include "kernels_table.h"
#include "kernels_tiles.h"

#if !defined(__clang__)
// A false warning in GCC's own headers: bug 105593.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace rkemu {

namespace {

__m512i with_sign_flipped(__m512i bytes) {
  return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
}

struct Avx512 {
  using Bytes = __m512i;
  using Sums = __m512i;
  static constexpr int kStep = 64;
  static constexpr int32_t kOffset = 128;

  static Bytes load(const int8_t* from) { return _mm512_loadu_si512(from); }
  static Bytes load(const int8_t* from, int n) {
    return _mm512_maskz_loadu_epi8(~__mmask64{0} >> (kStep - n), from);
  }
  static Bytes weights(Bytes bytes) { return with_sign_flipped(bytes); }
  static Sums zero() { return _mm512_setzero_si512(); }
  static Sums dot(Sums sums, Bytes w, Bytes x) { return _mm512_dpbusd_epi32(sums, w, x); }
  static Sums sum(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
  static int32_t total(Sums sums) {
    alignas(64) int32_t lanes[16];
    _mm512_store_si512(lanes, sums);
    return sum_of(lanes);
  }
};

// 16 rows of 16 words become 16 columns of 16 words.
inline __attribute__((always_inline)) void transpose(__m512i (&rows)[16]) {
  __m512i pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  // Lane c of fours[4 * a + b] is column 4 * c + b of rows 4 * a to 4 * a + 3.
  for (int i = 0; i < 16; i += 4) {
    fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  constexpr int kEven = 0x88, kOdd = 0xdd;  // lanes 0 and 2, or 1 and 3, of both
  for (int b = 0; b < 4; ++b) {
    const __m512i even = _mm512_shuffle_i32x4(fours[b], fours[4 + b], kEven);
    const __m512i odd = _mm512_shuffle_i32x4(fours[b], fours[4 + b], kOdd);
    const __m512i later_even = _mm512_shuffle_i32x4(fours[8 + b], fours[12 + b], kEven);
    const __m512i later_odd = _mm512_shuffle_i32x4(fours[8 + b], fours[12 + b], kOdd);
    rows[b] = _mm512_shuffle_i32x4(even, later_even, kEven);
    rows[4 + b] = _mm512_shuffle_i32x4(odd, later_odd, kEven);
    rows[8 + b] = _mm512_shuffle_i32x4(even, later_even, kOdd);
    rows[12 + b] = _mm512_shuffle_i32x4(odd, later_odd, kOdd);
  }
}

// A vector has four bytes of each of 16 rows, and is multiplied by the same four bytes of a token
// in all lanes.
struct Avx512Panel {
  static constexpr int kVectors = 4, kRows = 16 * kVectors, kTokens = 6, kDepth = 64;
  static constexpr int32_t kOffset = 128;

  static void pack(const Rows<const int8_t>& w, int depth, int8_t* panel) {
    constexpr int kAhead = 256;
    // Few rows at a time: a processor that cannot prefetch so many streams would wait for memory.
    for (int v = 0; v < kVectors; ++v) {
      for (int k = 0; k < depth; k += kDepth) {
        const int missing = depth - k < kDepth ? kDepth - (depth - k) : 0;
        __m512i rows[16];
        for (int r = 0; r < 16; ++r) {
          const int row = 16 * v + r < w.count ? 16 * v + r : w.count - 1;
          _mm_prefetch(w[row] + k + kAhead, _MM_HINT_T0);
          rows[r] =
              with_sign_flipped(_mm512_maskz_loadu_epi8(~__mmask64{0} >> missing, w[row] + k));
        }
        transpose(rows);
        for (int i = 0; i < 16; ++i) {
          _mm512_store_si512(panel + (k / 4 + i) * 4 * kRows + v * 64, rows[i]);
        }
      }
    }
  }

  template <int kTokens>
  static void tile(const int8_t* panel, const Rows<const int8_t>& x, int depth,
                   const Rows<int32_t>& acc) {
    __m512i sums[kTokens][kVectors];
    const int8_t* from[kTokens];
    RKEMU_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      from[t] = x[t];
      RKEMU_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[t][v] = _mm512_load_si512(acc[t] + 16 * v);
    }
    for (int k = 0; k < depth; k += 4, panel += 4 * kRows) {
      __m512i weights[kVectors];
      RKEMU_UNROLL
      for (int v = 0; v < kVectors; ++v) weights[v] = _mm512_load_si512(panel + 64 * v);
      RKEMU_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        int32_t four;
        __builtin_memcpy(&four, from[t] + k, sizeof four);
        const __m512i bytes = _mm512_set1_epi32(four);
        RKEMU_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          sums[t][v] = _mm512_dpbusd_epi32(sums[t][v], weights[v], bytes);
        }
      }
    }
    RKEMU_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      RKEMU_UNROLL
      for (int v = 0; v < kVectors; ++v) _mm512_store_si512(acc[t] + 16 * v, sums[t][v]);
    }
  }
};

constexpr int kWorthPanel = 6;  // fewest tokens for which laying the weights out anew pays off

void integer_product(const IntegerProduct& p) {
  if (p.x.count >= kWorthPanel) return panel_product<Avx512Panel>(p);
  int token = 0;
  for (; token + 2 <= p.x.count; token += 2) strip<Avx512, 1, 2, 4>(p, token);
  for (; token < p.x.count; ++token) strip<Avx512, 1, 1, 4>(p, token);
}

}  // namespace

RKEMU_KERNELS(kAvx512Kernels, "avx512vnni", integer_product);

}  // namespace rkemu

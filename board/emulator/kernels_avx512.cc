// AVX-512 with VNNI. vpdpbusd multiplies unsigned by signed bytes: the weight's sign bit is flipped
// on the way from memory (w + 128), and 128 times the sum of the activations is taken off again, so
// files keep plain int8 rows.
#include <immintrin.h>

#include "kernels_float.h"

namespace rkemu {

namespace {

constexpr int kStep = 64;

template <int kRows, int kTokens>
void tile(const IntegerProduct& p, int row, int token) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const int8_t* w = p.w + static_cast<size_t>(row) * p.w_stride;
  const int8_t* x = p.x + static_cast<size_t>(token) * p.x_stride;
  __m512i acc[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) acc[r][t] = _mm512_setzero_si512();
  }
  const auto multiply = [&](int k, const auto& load) __attribute__((always_inline)) {
    __m512i ws[kRows];
    for (int r = 0; r < kRows; ++r) {
      ws[r] = _mm512_xor_si512(load(w + static_cast<size_t>(r) * p.w_stride + k), flip);
    }
    for (int t = 0; t < kTokens; ++t) {
      const __m512i xs = load(x + static_cast<size_t>(t) * p.x_stride + k);
      for (int r = 0; r < kRows; ++r) acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], ws[r], xs);
    }
  };
  int k = 0;
  for (; k + kStep <= p.k; k += kStep) {
    multiply(
        k,
        [](const int8_t* from) __attribute__((always_inline)) { return _mm512_loadu_si512(from); });
  }
  if (k < p.k) {
    const __mmask64 mask = ~__mmask64{0} >> (kStep - (p.k - k));
    multiply(
        k, [mask](const int8_t* from)
               __attribute__((always_inline)) { return _mm512_maskz_loadu_epi8(mask, from); });
  }
  for (int t = 0; t < kTokens; ++t) {
    const int32_t correction = 128 * p.x_sums[static_cast<size_t>(token + t) * p.x_sums_stride];
    int32_t* out = p.acc + static_cast<size_t>(token + t) * p.acc_stride + static_cast<size_t>(row);
    for (int r = 0; r < kRows; ++r) {
      alignas(64) int32_t lanes[16];
      _mm512_store_si512(lanes, acc[r][t]);
      int32_t sum = 0;
      for (const int32_t lane : lanes) sum += lane;
      out[r] = sum - correction;
    }
  }
}

template <int kRows, int kTokens>
void strip(const IntegerProduct& p, int token) {
  int row = 0;
  for (; row + kRows <= p.rows; row += kRows) tile<kRows, kTokens>(p, row, token);
  for (; row < p.rows; ++row) tile<1, kTokens>(p, row, token);
}

// Tiles of accumulators that fill the registers: many tokens, so that each weight's sign is flipped
// once for all of them; or many rows, for a single token.
void integer_product(const IntegerProduct& p) {
  int token = 0;
  for (; token + 8 <= p.tokens; token += 8) strip<3, 8>(p, token);
  for (; token + 2 <= p.tokens; token += 2) strip<4, 2>(p, token);
  for (; token < p.tokens; ++token) strip<4, 1>(p, token);
}

}  // namespace

RKEMU_KERNELS(kAvx512Kernels, "avx512vnni", integer_product);

}  // namespace rkemu

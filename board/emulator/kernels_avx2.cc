// AVX2, for processors without VNNI. The signed bytes are widened to 16 bits first: vpmaddubsw,
// which takes bytes, saturates its sums and would not be exact.
#include <immintrin.h>

#include "kernels_float.h"

namespace rkemu {

namespace {

constexpr int kStep = 16;

int32_t sum_of(__m256i acc) {
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), acc);
  int32_t sum = 0;
  for (const int32_t lane : lanes) sum += lane;
  return sum;
}

__m256i widened(const int8_t* from) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

template <int kRows, int kTokens>
void tile(const IntegerProduct& p, int row, int token) {
  const int8_t* w = p.w + static_cast<size_t>(row) * p.w_stride;
  const int8_t* x = p.x + static_cast<size_t>(token) * p.x_stride;
  __m256i acc[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) acc[r][t] = _mm256_setzero_si256();
  }
  int k = 0;
  for (; k + kStep <= p.k; k += kStep) {
    __m256i xs[kTokens];
    for (int t = 0; t < kTokens; ++t) xs[t] = widened(x + static_cast<size_t>(t) * p.x_stride + k);
    for (int r = 0; r < kRows; ++r) {
      const __m256i ws = widened(w + static_cast<size_t>(r) * p.w_stride + k);
      for (int t = 0; t < kTokens; ++t) {
        acc[r][t] = _mm256_add_epi32(acc[r][t], _mm256_madd_epi16(ws, xs[t]));
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) {
      int32_t sum = sum_of(acc[r][t]);
      for (int rest = k; rest < p.k; ++rest) {
        sum += w[static_cast<size_t>(r) * p.w_stride + static_cast<size_t>(rest)] *
               x[static_cast<size_t>(t) * p.x_stride + static_cast<size_t>(rest)];
      }
      p.acc[static_cast<size_t>(token + t) * p.acc_stride + static_cast<size_t>(row + r)] = sum;
    }
  }
}

template <int kRows, int kTokens>
void strip(const IntegerProduct& p, int token) {
  int row = 0;
  for (; row + kRows <= p.rows; row += kRows) tile<kRows, kTokens>(p, row, token);
  for (; row < p.rows; ++row) tile<1, kTokens>(p, row, token);
}

void integer_product(const IntegerProduct& p) {
  int token = 0;
  for (; token + 4 <= p.tokens; token += 4) strip<2, 4>(p, token);
  for (; token < p.tokens; ++token) strip<4, 1>(p, token);
}

}  // namespace

RKEMU_KERNELS(kAvx2Kernels, "avx2", integer_product);

}  // namespace rkemu

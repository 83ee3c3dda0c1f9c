// AVX2, for processors without VNNI. The signed bytes are widened to 16 bits first: vpmaddubsw,
// which takes bytes, saturates its sums and would not be exact.
#include <immintrin.h>

#include "kernels_table.h"
#include "kernels_tiles.h"

namespace rkemu {

namespace {

struct Avx2 {
  using Bytes = __m256i;  // 16 of them, as words
  using Sums = __m256i;
  static constexpr int kStep = 16;
  static constexpr int32_t kOffset = 0;

  static Bytes load(const int8_t* from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Bytes load(const int8_t* from, int n) { return load(Padded<kStep>(from, n).bytes); }
  static Bytes weights(Bytes bytes) { return bytes; }
  static Sums zero() { return _mm256_setzero_si256(); }
  static Sums dot(Sums sums, Bytes w, Bytes x) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(w, x));
  }
  static Sums sum(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
  static int32_t total(Sums sums) {
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums);
    return sum_of(lanes);
  }
};

void integer_product(const IntegerProduct& p) {
  int token = 0;
  for (; token + 4 <= p.x.count; token += 4) strip<Avx2, 2, 4, 1>(p, token);
  for (; token < p.x.count; ++token) strip<Avx2, 1, 1, 4>(p, token);
}

}  // namespace

RKEMU_KERNELS(kAvx2Kernels, "avx2", integer_product);

}  // namespace rkemu

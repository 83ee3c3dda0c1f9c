// AVX-512 with VNNI. vpdpbusd multiplies unsigned by signed bytes: the weight's sign bit is flipped
// on the way from memory (w + 128), and 128 times the sum of the activations is taken off again, so
// files keep plain int8 rows.
#include <immintrin.h>

#include "kernels_tiles.h"

namespace rkemu {

namespace {

struct Avx512 {
  using Bytes = __m512i;
  using Sums = __m512i;
  static constexpr int kStep = 64;
  static constexpr int32_t kOffset = 128;

  static Bytes load(const int8_t* from) { return _mm512_loadu_si512(from); }
  static Bytes load(const int8_t* from, int n) {
    return _mm512_maskz_loadu_epi8(~__mmask64{0} >> (kStep - n), from);
  }
  static Bytes weights(Bytes bytes) {
    return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  static Sums zero() { return _mm512_setzero_si512(); }
  static Sums dot(Sums sums, Bytes w, Bytes x) { return _mm512_dpbusd_epi32(sums, w, x); }
  static int32_t total(Sums sums) {
    alignas(64) int32_t lanes[16];
    _mm512_store_si512(lanes, sums);
    return sum_of(lanes);
  }
};

// Many tokens, so that each weight's sign is flipped once for all of them; or many rows, for a
// single token.
void integer_product(const IntegerProduct& p) {
  int token = 0;
  for (; token + 8 <= p.x.count; token += 8) strip<Avx512, 3, 8>(p, token);
  for (; token + 2 <= p.x.count; token += 2) strip<Avx512, 4, 2>(p, token);
  for (; token < p.x.count; ++token) strip<Avx512, 4, 1>(p, token);
}

}  // namespace

RKEMU_KERNELS(kAvx512Kernels, "avx512vnni", integer_product);

}  // namespace rkemu

// Sixteen floats in registers, included by kernels_attention.h. Their products are added with one
// rounding, which most processors do in one instruction; for the others it is computed, so that the
// bits are the same everywhere.
#pragma once

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels_float.h"
#include "kernels_unroll.h"

namespace rkemu {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__FMA__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = kLanes / kWidth;

// A register. It may alias any array of floats.
typedef float Part __attribute__((vector_size(kWidth * sizeof(float)), aligned(4), may_alias));

struct Lanes {
  Part parts[kParts];
};

inline Lanes load_lanes(const float* from) {
  Lanes lanes;
  RKEMU_UNROLL for (int i = 0; i < kParts; ++i) lanes.parts[i] =
      *reinterpret_cast<const Part*>(from + i * kWidth);
  return lanes;
}

inline void store_lanes(const Lanes& lanes, float* to) {
  RKEMU_UNROLL for (int i = 0; i < kParts; ++i) * reinterpret_cast<Part*>(to + i * kWidth) =
      lanes.parts[i];
}

// a * b + c, rounded once.
inline Part fused(Part a, Part b, Part c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  typedef double Doubles __attribute__((vector_size(kWidth * sizeof(double))));
  typedef int64_t Bits __attribute__((vector_size(kWidth * sizeof(double))));
  // The product is exact. The sum's rounding error is computed, and the sum rounded to odd: to
  // whichever neighbour of the exact sum has an odd last bit, so that the second rounding, to a
  // float, sees on which side of a tie the exact sum lies.
  const Doubles product = __builtin_convertvector(a, Doubles) * __builtin_convertvector(b, Doubles);
  const Doubles term = __builtin_convertvector(c, Doubles);
  const Doubles sum = product + term;
  const Doubles added = sum - product;
  const Doubles error = (product - (sum - added)) + (term - added);
  const Bits bits = reinterpret_cast<Bits>(sum);
  const Bits inexact = (error < 0) | (error > 0), even = (bits & 1) - 1;
  const Bits away_from_zero = (error > 0) == (sum > 0);
  const Bits odd = bits + (inexact & even & ((away_from_zero & 2) - 1));
  return __builtin_convertvector(reinterpret_cast<Doubles>(odd), Part);
#endif
}

// Adds the products of a and b to the sums.
inline void add_products(const Lanes& a, const Lanes& b, Lanes& sums) {
  RKEMU_UNROLL for (int i = 0; i < kParts; ++i) sums.parts[i] =
      fused(a.parts[i], b.parts[i], sums.parts[i]);
}

inline void add_products(const Lanes& a, float b, Lanes& sums) {
  const Part each = b - Part{};
  RKEMU_UNROLL for (int i = 0; i < kParts; ++i) sums.parts[i] =
      fused(a.parts[i], each, sums.parts[i]);
}

}  // namespace
}  // namespace rkemu

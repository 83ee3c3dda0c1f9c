// The float loops, included by each kernels_*.cc and compiled with its instruction set. No function
// of the standard library is used: its inline code could be merged across objects of different
// instruction sets by the linker.
//
// Sums are kept as kLanes partial sums that are added in a fixed order, so a compiler may use
// vectors of any width and the result stays the same to the bit.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

namespace rkemu {
namespace {

constexpr int kLanes = 16;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even
constexpr uint32_t kRoundBits = 0x4B400000u;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// Cephes' expf: e^x = 2^n e^r with |r| <= ln 2 / 2 and a polynomial of degree 6.
inline float exp_inline(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * float_of((bits_of(shifted) - kRoundBits + 127u) << 23);
}

inline float tanh_inline(float x) {
  x = x < -10.0f ? -10.0f : x;
  x = x > 10.0f ? 10.0f : x;
  const float e = exp_inline(x + x);
  return (e - 1.0f) / (e + 1.0f);
}

// A vector of floats that may alias any array of floats.
typedef float Four __attribute__((vector_size(4 * sizeof(float)), aligned(4), may_alias));

// Adds one half of the lanes to the other until one number is left.
inline float sum_lanes(const float* lanes) {
  static_assert(kLanes == 16);
  const Four* fours = reinterpret_cast<const Four*>(lanes);
  const Four sums = (fours[0] + fours[2]) + (fours[1] + fours[3]);
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

inline float dot(const float* a, const float* b, int n) {
  float lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += a[i + l] * b[i + l];
  }
  for (int l = 0; i < n; ++i, ++l) lanes[l] += a[i] * b[i];
  return sum_lanes(lanes);
}

void float_product(const FloatProduct& p) {
  for (int r = 0; r < p.w.count; ++r) {
    for (int t = 0; t < p.x.count; ++t) p.out[t][r] = dot(p.w[r], p.x[t], p.k);
  }
}

void quantize(const float* x, int k, int group, int8_t* q, float* scale, int32_t* sums) {
  float lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float a = x[i + l] < 0 ? -x[i + l] : x[i + l];
      lanes[l] = a > lanes[l] ? a : lanes[l];
    }
  }
  float largest = 0;
  for (; i < k; ++i) {
    const float a = x[i] < 0 ? -x[i] : x[i];
    largest = a > largest ? a : largest;
  }
  for (int l = 0; l < kLanes; ++l) largest = lanes[l] > largest ? lanes[l] : largest;
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  for (; k; k -= group, x += group) {
    int32_t sum = 0;
    for (i = 0; i < group; ++i) {
      // A NaN or an infinity in the model becomes some number in range, so that no conversion is
      // undefined.
      const int32_t rounded = static_cast<int32_t>(bits_of(x[i] * inverse + kRound) - kRoundBits);
      q[i] = static_cast<int8_t>(rounded < -127 ? -127 : rounded > 127 ? 127 : rounded);
      sum += q[i];
    }
    for (; i % IntegerProduct::kPadding; ++i) q[i] = 0;
    q += i;
    *sums++ = sum;
  }
  *scale = largest / 127.0f;
}

void dequantize(const int32_t* acc, const Rows<const float>& w_scale, bool first, float* out) {
  if (w_scale.stride == 1 && first) {
    for (int r = 0; r < w_scale.count; ++r) {
      out[r] = static_cast<float>(acc[r]) * w_scale.data[r];
    }
    return;
  }
  for (int r = 0; r < w_scale.count; ++r) {
    const float part = static_cast<float>(acc[r]) * *w_scale[r];
    out[r] = first ? part : out[r] + part;
  }
}

void scale(float* x, float factor, int n) {
  for (int i = 0; i < n; ++i) x[i] *= factor;
}

void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
  const float inverse = 1.0f / __builtin_sqrtf(dot(x, x, n) / static_cast<float>(n) + eps);
  for (int i = 0; i < n; ++i) out[i] = x[i] * inverse * (1.0f + weight[i]);
}

void gelu_multiply(float* gate, const float* up, int n) {
  for (int i = 0; i < n; ++i) {
    const float x = gate[i];
    const float inner = 0.79788456f * (x + 0.044715f * x * x * x);
    gate[i] = 0.5f * x * (1.0f + tanh_inline(inner)) * up[i];
  }
}

void softcap(float* x, float cap, int n) {
  for (int i = 0; i < n; ++i) x[i] = cap * tanh_inline(x[i] / cap);
}

void add(float* x, const float* y, float factor, int n) {
  for (int i = 0; i < n; ++i) x[i] += y[i] * factor;
}

// Half floats by integer arithmetic, which compilers vectorize: multiplying by 2^112 corrects the
// exponent, exactly even for subnormal halves. Values beyond the range become the largest half,
// never an infinity.
inline float from_half(uint16_t half) {
  // The conversion to a signed word of twice the width moves the sign to its place.
  const auto moved = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(half))) << 13;
  return float_of(moved & 0x8fffe000u) * float_of(239u << 23);
}

void to_half(const float* x, int n, uint16_t* out) {
  for (int i = 0; i < n; ++i) {
    const uint32_t sign = (bits_of(x[i]) >> 16) & 0x8000u;
    float a = x[i] < 0 ? -x[i] : x[i];
    a = a < 65504.0f ? a : 65504.0f;  // also for NaN
    const uint32_t bits = bits_of(a);
    const uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    const uint32_t subnormal = bits_of(a + 0.5f) - bits_of(0.5f);
    out[i] = static_cast<uint16_t>(sign | (bits < (113u << 23) ? subnormal : normal));
  }
}

}  // namespace
}  // namespace rkemu

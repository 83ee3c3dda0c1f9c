// The inner loops, as tables of functions chosen at run time by what the CPU can do.
//
// Every table gives the same bits: the integer sums are exact, and the float loops are one source
// (kernels_float.h) whose order of additions is fixed and which is compiled without contraction.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rkemu {

// acc[t * acc_stride + r] = sum over k of w[r][k] * x[t][k], for all rows r and tokens t.
// x_sums[t * x_sums_stride] is the sum of x[t][0..k): kernels with an unsigned operand need it.
struct IntegerProduct {
  const int8_t* w;
  size_t w_stride;
  int rows;
  const int8_t* x;
  size_t x_stride;
  int tokens;
  int k;
  const int32_t* x_sums;
  size_t x_sums_stride;
  int32_t* acc;
  size_t acc_stride;
};

struct FloatProduct {
  const float* w;
  size_t w_stride;
  int rows;
  const float* x;
  size_t x_stride;
  int tokens;
  int k;
  float* out;
  size_t out_stride;
};

// One query position against the keys of one KV head, for all query heads that share it.
// Keys and values are [position][head_dim], as half floats or floats.
struct Attention {
  static constexpr int kMaxHeadDim = 1024;  // kernels keep a row of values on the stack
  const float* q;
  int heads;
  int head_dim;
  const void* keys;
  const void* values;
  bool half;
  int first, last;  // positions seen, last included
  float scale;
  float softcap;  // 0 = none
  float* scores;  // [heads][last - first + 1]
  float* out;     // [heads][head_dim]
};

struct Kernels {
  const char* name;
  void (*integer_product)(const IntegerProduct&);
  void (*float_product)(const FloatProduct&);
  // One token's activations to int8: scale = absmax / 127, rounded half to even; sums per group of
  // `group`.
  void (*quantize)(const float* x, int k, int group, int8_t* q, float* scale, int32_t* sums);
  // out[r] = (sum over groups of acc_g[r] * w_scale[r][g]) * x_scale; `first` starts the sum.
  void (*dequantize)(const int32_t* acc, int rows, const float* w_scale, size_t w_scale_stride,
                     bool first, float* out);
  void (*scale)(float* x, float factor, int n);
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);
  void (*gelu_multiply)(float* gate, const float* up, int n);
  void (*softcap)(float* x, float cap, int n);
  void (*add)(float* x, const float* y, float factor, int n);
  void (*attend)(const Attention&);
  void (*to_half)(const float* x, int n, uint16_t* out);
};

// All tables that this machine can run, the fastest last; the first is plain C++.
std::vector<const Kernels*> available_kernels();
// The fastest, or the one that RKEMU_KERNELS names. Failure: no such table on this machine.
const Kernels& choose_kernels();

// Of plain C++: e^x to a few units in the last place, the same bits on every machine; a half
// float's value.
float exp_f32(float x);
float half_to_float(uint16_t half);

}  // namespace rkemu

// The inner loops, as tables of functions chosen at run time by what the CPU can do.
//
// Every table gives the same bits: the integer sums are exact, and the float loops are one source
// (kernels_float.h) whose order of additions is fixed and which is compiled without contraction.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rkemu {

// Row r of a matrix begins at data + r * stride.
template <class T>
struct Rows {
  T* data;
  size_t stride;
  int count;

  // Always inlined: a copy that was compiled for one instruction set must not become everybody's.
  __attribute__((always_inline)) T* operator[](int row) const {
    return data + static_cast<size_t>(row) * stride;
  }
};

// acc[t][r] = sum over i < k of w[r][i] * x[t][i].
// x_sums[t][0] is the sum of x[t][0..k): kernels with an unsigned operand need it.
struct IntegerProduct {
  Rows<const int8_t> w;
  Rows<const int8_t> x;
  int k;
  Rows<const int32_t> x_sums;
  Rows<int32_t> acc;
};

// out[t][r] = sum over i < k of w[r][i] * x[t][i].
struct FloatProduct {
  Rows<const float> w;
  Rows<const float> x;
  int k;
  Rows<float> out;
};

// One query position against the keys of one KV head, for all query heads that share it.
struct Attention {
  static constexpr int kMaxHeadDim = 1024;  // kernels keep a row of values on the stack
  // [heads][head_dim]: head_dim is the stride.
  Rows<const float> q;
  // [position][head_dim], as half floats or floats.
  const void* keys;
  const void* values;
  bool half;
  // Positions seen, last included.
  int first, last;
  float scale;
  float softcap;  // 0 = none
  float* scores;  // [heads][last - first + 1]
  float* out;     // as q
};

struct Kernels {
  const char* name;
  void (*integer_product)(const IntegerProduct&);
  void (*float_product)(const FloatProduct&);
  // One token's activations to int8: scale = absmax / 127, rounded half to even; sums per group of
  // `group`.
  void (*quantize)(const float* x, int k, int group, int8_t* q, float* scale, int32_t* sums);
  // out[r] += acc[r] * w_scale[r][0], for each group of a row; `first` starts the sum.
  void (*dequantize)(const int32_t* acc, const Rows<const float>& w_scale, bool first, float* out);
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

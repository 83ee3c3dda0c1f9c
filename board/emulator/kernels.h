// The inner loops, as tables of functions, one of which is chosen at run time for the CPU.
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

  // Always inlined: the linker must not share a copy that was compiled for one instruction set.
  __attribute__((always_inline)) T* operator[](int row) const {
    return data + static_cast<size_t>(row) * stride;
  }
};

// acc[t][r] = sum over i < k of w[r][i] * x[t][i].
struct IntegerProduct {
  static constexpr int kMaxRows = 64;
  static constexpr int kPadding = 64;
  static constexpr size_t kRoom = 64 * 3072;

  Rows<const int8_t> w;  // at most kMaxRows
  // Padded with zeros behind k, up to a multiple of kPadding.
  Rows<const int8_t> x;
  int k;
  // [t][0] is the sum of x[t][0..k): kernels with an unsigned operand need it.
  Rows<const int32_t> x_sums;
  Rows<int32_t> acc;  // room for kMaxRows in each row, aligned to a cache line
  int8_t* room;       // kRoom bytes of scratch memory, aligned to a cache line
};

// out[t][r] = sum over i < k of w[r][i] * x[t][i].
struct FloatProduct {
  Rows<const float> w;
  Rows<const float> x;
  int k;
  Rows<float> out;
};

// Consecutive query positions against one KV head, for all query heads that share it. Keys and
// values are read once for all of them.
struct Attention {
  static constexpr int kMaxQueries = 64;  // positions times heads, unless one position has more
  static constexpr int kBlock = 32;       // keys or values that are processed at a time
  static constexpr size_t padded(int n) {
    return static_cast<size_t>(n + kBlock - 1) / kBlock * kBlock;
  }
  // The floats of scratch memory for so many queries and positions that they see.
  static size_t room_for(int queries, int head_dim, int seen) {
    return static_cast<size_t>(queries) * (padded(head_dim) + padded(seen)) +
           kBlock * padded(head_dim);
  }

  // One row per position: [heads][head_dim].
  Rows<const float> q;
  int heads, head_dim;
  // [position][head_dim], as half floats or floats.
  const void* keys;
  const void* values;
  bool half;
  int position;  // of the first row
  int window;    // positions that a query sees, its own included; 0 = all
  float scale;
  float softcap;    // 0 = none
  float* room;      // scratch memory, aligned to a cache line
  Rows<float> out;  // laid out as q

  int first(int row) const {
    const int last = position + row;
    return window && last >= window ? last - window + 1 : 0;
  }
};

struct Kernels {
  const char* name;
  void (*integer_product)(const IntegerProduct&);
  void (*float_product)(const FloatProduct&);
  // Quantizes one token's activations to int8: scale = absmax / 127, rounded half to even. Each
  // `group` of them begins at a multiple of kPadding, with zeros behind it, and has its own sum.
  void (*quantize)(const float* x, int k, int group, int8_t* q, float* scale, int32_t* sums);
  // out[r] += acc[r] * w_scale[r][0], called for each group of a row; `first` starts the sum anew.
  void (*dequantize)(const int32_t* acc, const Rows<const float>& w_scale, bool first, float* out);
  void (*scale)(float* x, float factor, int n);
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);
  void (*gelu_multiply)(float* gate, const float* up, int n);
  void (*softcap)(float* x, float cap, int n);
  void (*add)(float* x, const float* y, float factor, int n);
  void (*attend)(const Attention&);
  void (*to_half)(const float* x, int n, uint16_t* out);
};

// All tables that this machine can run, from plain C++ to the fastest.
std::vector<const Kernels*> available_kernels();
// The fastest, or the one that RKEMU_KERNELS names. Failure: no such table on this machine.
const Kernels& choose_kernels();

// From the plain table: e^x to a few units in the last place, the same bits on every machine; and
// the value of a half float.
float exp_f32(float x);
float half_to_float(uint16_t half);

}  // namespace rkemu

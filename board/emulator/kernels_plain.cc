// Plain C++: the reference for the other tables, and what runs where nothing better is there.
#include "kernels_float.h"

namespace rkemu {

namespace {

void integer_product(const IntegerProduct& p) {
  for (int r = 0; r < p.rows; ++r) {
    const int8_t* w = p.w + static_cast<size_t>(r) * p.w_stride;
    for (int t = 0; t < p.tokens; ++t) {
      const int8_t* x = p.x + static_cast<size_t>(t) * p.x_stride;
      int32_t sum = 0;
      for (int k = 0; k < p.k; ++k) sum += w[k] * x[k];
      p.acc[static_cast<size_t>(t) * p.acc_stride + static_cast<size_t>(r)] = sum;
    }
  }
}

}  // namespace

RKEMU_KERNELS(kPlainKernels, "plain", integer_product);

float exp_f32(float x) {
  return exp_inline(x);
}
float half_to_float(uint16_t half) {
  return from_half(half);
}

}  // namespace rkemu

// Plain C++: the reference for the other tables, and the fallback for other processors.
#include "kernels_table.h"

namespace rkemu {

namespace {

void integer_product(const IntegerProduct& p) {
  for (int r = 0; r < p.w.count; ++r) {
    for (int t = 0; t < p.x.count; ++t) {
      int32_t sum = 0;
      for (int i = 0; i < p.k; ++i) sum += p.w[r][i] * p.x[t][i];
      p.acc[t][r] = sum;
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

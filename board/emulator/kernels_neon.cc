// AArch64 with the dot product instructions (Cortex-A76 and A55 of the RK3588 have them): sdot
// multiplies signed bytes by signed bytes.
#include <arm_neon.h>

#include "kernels_float.h"

namespace rkemu {

namespace {

constexpr int kStep = 16;

template <int kRows, int kTokens>
void tile(const IntegerProduct& p, int row, int token) {
  const int8_t* w = p.w + static_cast<size_t>(row) * p.w_stride;
  const int8_t* x = p.x + static_cast<size_t>(token) * p.x_stride;
  int32x4_t acc[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) acc[r][t] = vdupq_n_s32(0);
  }
  int k = 0;
  for (; k + kStep <= p.k; k += kStep) {
    int8x16_t xs[kTokens];
    for (int t = 0; t < kTokens; ++t) xs[t] = vld1q_s8(x + static_cast<size_t>(t) * p.x_stride + k);
    for (int r = 0; r < kRows; ++r) {
      const int8x16_t ws = vld1q_s8(w + static_cast<size_t>(r) * p.w_stride + k);
      for (int t = 0; t < kTokens; ++t) acc[r][t] = vdotq_s32(acc[r][t], ws, xs[t]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) {
      int32_t sum = vaddvq_s32(acc[r][t]);
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
  for (; token + 4 <= p.tokens; token += 4) strip<4, 4>(p, token);
  for (; token < p.tokens; ++token) strip<4, 1>(p, token);
}

}  // namespace

RKEMU_KERNELS(kNeonKernels, "neon-dotprod", integer_product);

}  // namespace rkemu

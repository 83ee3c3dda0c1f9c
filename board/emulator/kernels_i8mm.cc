// AArch64 with the int8 matrix instructions (Armv8.6; the RK3588's cores lack them): smmla
// multiplies eight bytes of two tokens by eight bytes of two rows.
#include "kernels_neon.h"

namespace rkemu {

namespace {

// A vector has eight bytes of each of two rows.
struct MatrixPanel {
  static constexpr int kPairs = 4, kRows = 2 * kPairs, kTokens = 8, kDepth = 16;
  static constexpr int32_t kOffset = 0;

  static void pack(const Rows<const int8_t>& w, int depth, int8_t* panel) {
    for (int k = 0; k < depth; k += kDepth, panel += kDepth * kRows) {
      for (int p = 0; p < kPairs; ++p) {
        const int64x2_t row = vreinterpretq_s64_s8(sixteen(w, 2 * p, k, depth - k));
        const int64x2_t next = vreinterpretq_s64_s8(sixteen(w, 2 * p + 1, k, depth - k));
        vst1q_s8(panel + p * 16, vreinterpretq_s8_s64(vzip1q_s64(row, next)));
        vst1q_s8(panel + (kPairs + p) * 16, vreinterpretq_s8_s64(vzip2q_s64(row, next)));
      }
    }
  }

  // The lower half of a sum belongs to the first of two tokens, the upper half to the second; a
  // token without a second one is paired with itself.
  template <int kTokens>
  static void tile(const int8_t* panel, const Rows<const int8_t>& x, int depth,
                   const Rows<int32_t>& acc) {
    constexpr int kTokenPairs = (kTokens + 1) / 2;
    int32x4_t sums[kTokenPairs][kPairs];
    const int8_t* from[2 * kTokenPairs];
    RKEMU_UNROLL
    for (int t = 0; t < 2 * kTokenPairs; ++t) from[t] = x[t < kTokens ? t : t - 1];
    RKEMU_UNROLL
    for (int t = 0; t < kTokenPairs; ++t) {
      const int second = 2 * t + 1 < kTokens ? 2 * t + 1 : 2 * t;
      RKEMU_UNROLL
      for (int p = 0; p < kPairs; ++p) {
        sums[t][p] = vcombine_s32(vld1_s32(acc[2 * t] + 2 * p), vld1_s32(acc[second] + 2 * p));
      }
    }
    for (int k = 0; k < depth; k += 8, panel += 8 * kRows) {
      int8x16_t weights[kPairs];
      RKEMU_UNROLL
      for (int p = 0; p < kPairs; ++p) weights[p] = vld1q_s8(panel + p * 16);
      RKEMU_UNROLL
      for (int t = 0; t < kTokenPairs; ++t) {
        const int8x16_t bytes = vcombine_s8(vld1_s8(from[2 * t] + k), vld1_s8(from[2 * t + 1] + k));
        RKEMU_UNROLL
        for (int p = 0; p < kPairs; ++p) sums[t][p] = vmmlaq_s32(sums[t][p], bytes, weights[p]);
      }
    }
    RKEMU_UNROLL
    for (int t = 0; t < kTokenPairs; ++t) {
      RKEMU_UNROLL
      for (int p = 0; p < kPairs; ++p) {
        vst1_s32(acc[2 * t] + 2 * p, vget_low_s32(sums[t][p]));
        if (2 * t + 1 < kTokens) vst1_s32(acc[2 * t + 1] + 2 * p, vget_high_s32(sums[t][p]));
      }
    }
  }
};

}  // namespace

RKEMU_KERNELS(kI8mmKernels, "neon-i8mm", panels_or_rows<MatrixPanel>);

}  // namespace rkemu

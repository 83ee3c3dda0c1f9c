// AArch64 with the dot product instructions (Cortex-A76 and A55 of the RK3588 have them).
#include "kernels_neon.h"

namespace rkemu {

namespace {

// A vector has four bytes of each of four rows, and is multiplied by the same four bytes of a
// token, which sdot takes from a lane.
struct DotPanel {
  static constexpr int kVectors = 2, kRows = 4 * kVectors, kTokens = 8, kDepth = 16;
  static constexpr int32_t kOffset = 0;

  static void pack(const Rows<const int8_t>& w, int depth, int8_t* panel) {
    for (int k = 0; k < depth; k += kDepth, panel += kDepth * kRows) {
      for (int v = 0; v < kVectors; ++v) {
        int32x4_t rows[4];
        for (int r = 0; r < 4; ++r) {
          rows[r] = vreinterpretq_s32_s8(sixteen(w, 4 * v + r, k, depth - k));
        }
        // Four rows of four words become columns.
        const int64x2_t low01 = vreinterpretq_s64_s32(vzip1q_s32(rows[0], rows[1]));
        const int64x2_t low23 = vreinterpretq_s64_s32(vzip1q_s32(rows[2], rows[3]));
        const int64x2_t high01 = vreinterpretq_s64_s32(vzip2q_s32(rows[0], rows[1]));
        const int64x2_t high23 = vreinterpretq_s64_s32(vzip2q_s32(rows[2], rows[3]));
        const int64x2_t columns[4] = {vzip1q_s64(low01, low23), vzip2q_s64(low01, low23),
                                      vzip1q_s64(high01, high23), vzip2q_s64(high01, high23)};
        for (int i = 0; i < 4; ++i) {
          vst1q_s8(panel + (i * kVectors + v) * 16, vreinterpretq_s8_s64(columns[i]));
        }
      }
    }
  }

  // The kLane-th four bytes of all tokens.
  template <int kLane, int kTokens>
  static inline __attribute__((always_inline)) void step(const int8_t* panel,
                                                         const int8x16_t (&x)[kTokens],
                                                         int32x4_t (&sums)[kTokens][kVectors]) {
    RKEMU_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int8x16_t weights = vld1q_s8(panel + (kLane * kVectors + v) * 16);
      RKEMU_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        sums[t][v] = vdotq_laneq_s32(sums[t][v], weights, x[t], kLane);
      }
    }
  }

  template <int kTokens>
  static void tile(const int8_t* panel, const Rows<const int8_t>& x, int depth,
                   const Rows<int32_t>& acc) {
    int32x4_t sums[kTokens][kVectors];
    const int8_t* from[kTokens];
    RKEMU_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      from[t] = x[t];
      RKEMU_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[t][v] = vld1q_s32(acc[t] + 4 * v);
    }
    for (int k = 0; k < depth; k += kDepth, panel += kDepth * kRows) {
      int8x16_t bytes[kTokens];
      RKEMU_UNROLL
      for (int t = 0; t < kTokens; ++t) bytes[t] = vld1q_s8(from[t] + k);
      step<0>(panel, bytes, sums);
      step<1>(panel, bytes, sums);
      step<2>(panel, bytes, sums);
      step<3>(panel, bytes, sums);
    }
    RKEMU_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      RKEMU_UNROLL
      for (int v = 0; v < kVectors; ++v) vst1q_s32(acc[t] + 4 * v, sums[t][v]);
    }
  }
};

}  // namespace

RKEMU_KERNELS(kNeonKernels, "neon-dotprod", panels_or_rows<DotPanel>);

}  // namespace rkemu

// AArch64 with the dot product instructions (Cortex-A76 and A55 of the RK3588 have them): sdot
// multiplies signed bytes by signed bytes.
#include <arm_neon.h>

#include "kernels_table.h"
#include "kernels_tiles.h"

namespace rkemu {

namespace {

struct Neon {
  using Bytes = int8x16_t;
  using Sums = int32x4_t;
  static constexpr int kStep = 16;
  static constexpr int32_t kOffset = 0;

  static Bytes load(const int8_t* from) { return vld1q_s8(from); }
  static Bytes load(const int8_t* from, int n) { return load(Padded<kStep>(from, n).bytes); }
  static Bytes weights(Bytes bytes) { return bytes; }
  static Sums zero() { return vdupq_n_s32(0); }
  static Sums dot(Sums sums, Bytes w, Bytes x) { return vdotq_s32(sums, w, x); }
  static int32_t total(Sums sums) { return vaddvq_s32(sums); }
};

void integer_product(const IntegerProduct& p) {
  int token = 0;
  for (; token + 4 <= p.x.count; token += 4) strip<Neon, 4, 4>(p, token);
  for (; token < p.x.count; ++token) strip<Neon, 4, 1>(p, token);
}

}  // namespace

RKEMU_KERNELS(kNeonKernels, "neon-dotprod", integer_product);

}  // namespace rkemu

// Shared by the tables of AArch64: products for few tokens by sdot, which multiplies signed bytes
// by signed bytes.
#pragma once

#include <arm_neon.h>

#include "kernels_panels.h"
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
  static Sums sum(Sums a, Sums b) { return vaddq_s32(a, b); }
  static int32_t total(Sums sums) { return vaddvq_s32(sums); }
};

// 16 bytes of a row of weights that ends after `left` bytes; of the last row if `row` is past it.
inline int8x16_t sixteen(const Rows<const int8_t>& w, int row, int k, int left) {
  const int8_t* from = w[row < w.count ? row : w.count - 1] + k;
  return left < Neon::kStep ? Neon::load(from, left) : Neon::load(from);
}

constexpr int kWorthPanel = 4;  // fewest tokens for which laying the weights out anew pays off

template <class Panel>
void panels_or_rows(const IntegerProduct& p) {
  if (p.x.count >= kWorthPanel) return panel_product<Panel>(p);
  for (int token = 0; token < p.x.count; ++token) strip<Neon, 1, 1, 4>(p, token);
}

}  // namespace
}  // namespace rkemu

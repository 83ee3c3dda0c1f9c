// The integer product for many tokens, as a product of panels: the weights of kRows rows are laid
// out anew, so that a vector holds bytes of several rows and no sum runs across a vector. A panel
// stays in the L2 cache while it is multiplied by all tokens. A Panel is a type of
//
//   kRows, kTokens   rows of a panel, tokens of the largest tile
//   kDepth           the depth of a panel is rounded up to a multiple of this
//   kOffset          is added to each weight on the way
//   pack(w, depth, panel)
//                    lays out bytes [0, depth) of w's rows; padding in rows and in depth may hold
//                    anything, as those rows are not used and x is zero there
//   tile<kTokens>(panel, x, depth, acc)
//                    acc[t][r] += panel's row r times x[t], for kTokens tokens and kRows rows
#pragma once

#include "kernels_float.h"
#include "kernels_unroll.h"

namespace rkemu {
namespace {

constexpr int up_to_multiple(int n, int of) {
  return (n + of - 1) / of * of;
}

template <class Panel, int kTokens>
int panel_tiles(const int8_t* panel, const Rows<const int8_t>& x, int depth,
                const Rows<int32_t>& acc, int token) {
  for (; token + kTokens <= x.count; token += kTokens) {
    Panel::template tile<kTokens>(panel, {x[token], x.stride, kTokens}, depth,
                                  {acc[token], acc.stride, kTokens});
  }
  return token;
}

template <class Panel>
void panel_product(const IntegerProduct& p) {
  constexpr int kDeepest = static_cast<int>(IntegerProduct::kRoom) / Panel::kRows;
  static_assert(kDeepest % Panel::kDepth == 0 && IntegerProduct::kMaxRows % Panel::kRows == 0);
  const int parts = (p.k + kDeepest - 1) / kDeepest;
  const int depth = up_to_multiple((p.k + parts - 1) / parts, Panel::kDepth);
  for (int t = 0; t < p.x.count; ++t) {
    const int32_t offset = Panel::kOffset * *p.x_sums[t];
    for (int r = 0; r < IntegerProduct::kMaxRows; ++r) p.acc[t][r] = -offset;
  }
  for (int row = 0; row < p.w.count; row += Panel::kRows) {
    const int rows = p.w.count - row < Panel::kRows ? p.w.count - row : Panel::kRows;
    const Rows<int32_t> acc{p.acc.data + row, p.acc.stride, p.acc.count};
    for (int k = 0; k < p.k; k += depth) {
      const int part = p.k - k < depth ? p.k - k : depth;
      const Rows<const int8_t> x{p.x.data + k, p.x.stride, p.x.count};
      Panel::pack({p.w[row] + k, p.w.stride, rows}, part, p.room);
      int token = panel_tiles<Panel, Panel::kTokens>(p.room, x, part, acc, 0);
      token = panel_tiles<Panel, 2>(p.room, x, part, acc, token);
      panel_tiles<Panel, 1>(p.room, x, part, acc, token);
    }
  }
}

}  // namespace
}  // namespace rkemu

// Compares fused(), as it is compiled here, with the standard library's fmaf;
// prints what differs.
#include <cmath>
#include <cstdio>
#include <random>

#include "kernels_lanes.h"

int main() {
  using namespace rkemu;
  std::mt19937_64 random(1);
  const auto any = [&] { return float_of(static_cast<uint32_t>(random())); };
  // A number of few digits, so that sums end in ties.
  const auto few = [&] {
    const auto digits = static_cast<int>(random() % 4096) - 2048;
    return std::ldexp(static_cast<float>(digits),
                      static_cast<int>(random() % 40) - 20);
  };
  int wrong = 0;
  for (int round = 0; round < 2000000; ++round) {
    float a[kWidth], b[kWidth], c[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      a[i] = random() % 2 ? any() : few();
      b[i] = random() % 2 ? any() : few();
      const float product = a[i] * b[i];
      const float near[] = {any(), few(), -product,
                            std::nextafter(-product, 0.0f), few() * product};
      c[i] = near[random() % 5];
    }
    const auto part = [](const float *of) {
      return *reinterpret_cast<const Part *>(of);
    };
    const Part got = fused(part(a), part(b), part(c));
    for (int i = 0; i < kWidth; ++i) {
      const float expected = std::fmaf(a[i], b[i], c[i]), mine = got[i];
      if (std::isnan(expected) ? std::isnan(mine)
                               : bits_of(expected) == bits_of(mine))
        continue;
      if (++wrong < 10)
        std::printf("%a * %a + %a: %a, not %a\n", a[i], b[i], c[i], mine,
                    expected);
    }
  }
  return wrong ? 1 : 0;
}

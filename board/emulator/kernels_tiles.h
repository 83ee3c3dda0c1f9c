// The integer product in tiles of accumulators that fill the registers, for any instruction set. A
// Vector is a type of static functions:
//
//   Bytes load(const int8_t* from)         kStep bytes
//   Bytes load(const int8_t* from, int n)  n bytes, fewer than kStep, and zeros
//   Bytes weights(Bytes)                   what dot() takes for weights: each plus kOffset
//   Sums zero()
//   Sums dot(Sums, Bytes weights, Bytes x)
//   int32_t total(Sums)
#pragma once

#include "kernels_float.h"

namespace rkemu {
namespace {

template <class Vector, int kRows, int kTokens>
void tile(const IntegerProduct& p, int row, int token) {
  typename Vector::Sums sums[kRows][kTokens];
  for (auto& of_row : sums) {
    for (auto& sum : of_row) sum = Vector::zero();
  }
  const auto multiply = [&](int k, const auto& load) __attribute__((always_inline)) {
    typename Vector::Bytes weights[kRows];
    for (int r = 0; r < kRows; ++r) weights[r] = Vector::weights(load(p.w[row + r] + k));
    for (int t = 0; t < kTokens; ++t) {
      const typename Vector::Bytes x = load(p.x[token + t] + k);
      for (int r = 0; r < kRows; ++r) sums[r][t] = Vector::dot(sums[r][t], weights[r], x);
    }
  };
  int k = 0;
  for (; k + Vector::kStep <= p.k; k += Vector::kStep) {
    multiply(
        k, [](const int8_t* from) __attribute__((always_inline)) { return Vector::load(from); });
  }
  if (const int rest = p.k - k) {
    multiply(
        k, [rest](const int8_t* from)
               __attribute__((always_inline)) { return Vector::load(from, rest); });
  }
  for (int t = 0; t < kTokens; ++t) {
    const int32_t offset = Vector::kOffset * *p.x_sums[token + t];
    for (int r = 0; r < kRows; ++r) {
      p.acc[token + t][row + r] = Vector::total(sums[r][t]) - offset;
    }
  }
}

// All rows for some tokens.
template <class Vector, int kRows, int kTokens>
void strip(const IntegerProduct& p, int token) {
  int row = 0;
  for (; row + kRows <= p.w.count; row += kRows) tile<Vector, kRows, kTokens>(p, row, token);
  for (; row < p.w.count; ++row) tile<Vector, 1, kTokens>(p, row, token);
}

// The total of a vector that was stored.
template <int kCount>
int32_t sum_of(const int32_t (&lanes)[kCount]) {
  int32_t sum = 0;
  for (const int32_t lane : lanes) sum += lane;
  return sum;
}

// The last bytes of a row, as many as a vector holds.
template <int kStep>
struct Padded {
  int8_t bytes[kStep] = {};
  Padded(const int8_t* from, int n) {
    for (int i = 0; i < n; ++i) bytes[i] = from[i];
  }
};

}  // namespace
}  // namespace rkemu

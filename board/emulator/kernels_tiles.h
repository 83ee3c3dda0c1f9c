// The integer product of rows as they lie in memory, for any instruction set. A Vector is a type
// with these static functions:
//
//   Bytes load(const int8_t* from)         kStep bytes
//   Bytes load(const int8_t* from, int n)  n bytes, fewer than kStep, and zeros
//   Bytes weights(Bytes)                   the weights as dot() takes them: each plus kOffset
//   Sums zero()
//   Sums dot(Sums, Bytes weights, Bytes x)
//   Sums sum(Sums, Sums)
//   int32_t total(Sums)
#pragma once

#include "kernels_float.h"
#include "kernels_unroll.h"

namespace rkemu {
namespace {

// Each sum is made of kParts partial sums, so that no addition waits for the one before. A single
// row is a single stream, which memory delivers faster than several: with kRows 1, decoding is as
// fast as the memory.
template <class Vector, int kRows, int kTokens, int kParts>
void tile(const IntegerProduct& p, int row, int token) {
  using Bytes = typename Vector::Bytes;
  typename Vector::Sums sums[kParts][kRows][kTokens];
  const int8_t* w[kRows];
  const int8_t* x[kTokens];
  RKEMU_UNROLL
  for (int r = 0; r < kRows; ++r) w[r] = p.w[row + r];
  RKEMU_UNROLL
  for (int t = 0; t < kTokens; ++t) x[t] = p.x[token + t];
  RKEMU_UNROLL
  for (int i = 0; i < kParts * kRows * kTokens; ++i) {
    sums[i / (kRows * kTokens)][i / kTokens % kRows][i % kTokens] = Vector::zero();
  }
  int k = 0;
  for (; k + kParts * Vector::kStep <= p.k; k += kParts * Vector::kStep) {
    RKEMU_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const int at = k + part * Vector::kStep;
      Bytes weights[kRows];
      RKEMU_UNROLL
      for (int r = 0; r < kRows; ++r) weights[r] = Vector::weights(Vector::load(w[r] + at));
      RKEMU_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const Bytes bytes = Vector::load(x[t] + at);
        RKEMU_UNROLL
        for (int r = 0; r < kRows; ++r) {
          sums[part][r][t] = Vector::dot(sums[part][r][t], weights[r], bytes);
        }
      }
    }
  }
  for (; k < p.k; k += Vector::kStep) {
    const int left = p.k - k;
    RKEMU_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Bytes weights = Vector::weights(left < Vector::kStep ? Vector::load(w[r] + k, left)
                                                                 : Vector::load(w[r] + k));
      RKEMU_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        sums[0][r][t] = Vector::dot(sums[0][r][t], weights, Vector::load(x[t] + k));
      }
    }
  }
  RKEMU_UNROLL
  for (int r = 0; r < kRows; ++r) {
    RKEMU_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      auto sum = sums[0][r][t];
      RKEMU_UNROLL
      for (int part = 1; part < kParts; ++part) sum = Vector::sum(sum, sums[part][r][t]);
      p.acc[token + t][row + r] = Vector::total(sum) - Vector::kOffset * *p.x_sums[token + t];
    }
  }
}

// Computes all rows for kTokens tokens.
template <class Vector, int kRows, int kTokens, int kParts>
void strip(const IntegerProduct& p, int token) {
  int row = 0;
  for (; row + kRows <= p.w.count; row += kRows)
    tile<Vector, kRows, kTokens, kParts>(p, row, token);
  for (; row < p.w.count; ++row) tile<Vector, 1, kTokens, kParts>(p, row, token);
}

// The sum of a stored vector.
template <int kCount>
int32_t sum_of(const int32_t (&lanes)[kCount]) {
  int32_t sum = 0;
  for (const int32_t lane : lanes) sum += lane;
  return sum;
}

// The last bytes of a row, padded with zeros to a vector.
template <int kStep>
struct Padded {
  int8_t bytes[kStep] = {};
  Padded(const int8_t* from, int n) {
    for (int i = 0; i < n; ++i) bytes[i] = from[i];
  }
};

}  // namespace
}  // namespace rkemu

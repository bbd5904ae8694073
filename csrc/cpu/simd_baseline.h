// Vectors of 8 floats in portable C++: what runs where neither AVX2 nor AVX-512 does. Every loop has a fixed length, so that a
// compiler turns it into whatever vector instructions it may assume (SSE2, NEON).
//
// The interface of a Simd type, which simd_avx2.h and simd_avx512.h share:
//   Float, kLanes, kUnroll (independent accumulators), load/store of float and Bf16, set, add, sub, mul,
//   fma(a, b, c) = a·b + c (rounded once where the processor can), max(a, b) = a > b ? a : b (so b where one is NaN),
//   power_of_two(v): the float whose exponent field is the low 8 bits of v's bits: 2^(low bits - 127), or 0 where they are 0.

#pragma once

#include <stdint.h>
#include <string.h>

#include "bf16.h"

namespace {

struct Baseline {
  static constexpr int kLanes = 8;
  static constexpr int kUnroll = 2;
  struct Float {
    float lane[kLanes];
  };

  template <class Operation>
  static inline Float each(Operation operation) {
    Float out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = operation(i);
    return out;
  }

  static inline Float load(const float* from) {
    return each([&](int i) { return from[i]; });
  }
  static inline Float load(const Bf16* from) {
    return each([&](int i) { return to_float(from[i]); });
  }
  static inline void store(float* to, Float v) {
    for (int i = 0; i < kLanes; ++i) to[i] = v.lane[i];
  }
  static inline void store(Bf16* to, Float v) {
    for (int i = 0; i < kLanes; ++i) to[i] = to_bf16(v.lane[i]);
  }
  static inline Float set(float value) {
    return each([&](int) { return value; });
  }
  static inline Float add(Float a, Float b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static inline Float sub(Float a, Float b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static inline Float mul(Float a, Float b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static inline Float fma(Float a, Float b, Float c) {
    return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static inline Float max(Float a, Float b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static inline Float power_of_two(Float v) {
    return each([&](int i) {
      uint32_t bits;
      memcpy(&bits, &v.lane[i], sizeof bits);
      bits <<= 23;
      float out;
      memcpy(&out, &bits, sizeof out);
      return out;
    });
  }
};

}  // namespace

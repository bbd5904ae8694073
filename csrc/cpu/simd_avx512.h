// Vectors of 16 floats with AVX-512 (F, BW, VL, DQ). simd_baseline.h states the interface.

#pragma once

#include <immintrin.h>

#include "bf16.h"

namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kUnroll = 4;
  using Float = __m512;

  static inline Float load(const float* from) { return _mm512_loadu_ps(from); }
  static inline Float load(const Bf16* from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static inline void store(float* to, Float v) { _mm512_storeu_ps(to, v); }
  static inline void store(Bf16* to, Float v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }
  static inline Float set(float value) { return _mm512_set1_ps(value); }
  static inline Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static inline Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static inline Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static inline Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static inline Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static inline Float power_of_two(Float v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 23)); }
};

}  // namespace

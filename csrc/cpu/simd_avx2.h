// Vectors of 8 floats with AVX2 and FMA. simd_baseline.h states the interface.

#pragma once

#include <immintrin.h>

#include "bf16.h"

namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kUnroll = 2;
  using Float = __m256;

  static inline Float load(const float* from) { return _mm256_loadu_ps(from); }
  static inline Float load(const Bf16* from) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static inline void store(float* to, Float v) { _mm256_storeu_ps(to, v); }
  static inline void store(Bf16* to, Float v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
    // packus works within 128-bit halves: bring its two useful quarters together.
    const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(kept, 16), _mm256_setzero_si256());
    const __m128i out = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), out);
  }
  static inline Float set(float value) { return _mm256_set1_ps(value); }
  static inline Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static inline Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static inline Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static inline Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static inline Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static inline Float power_of_two(Float v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), 23)); }
};

}  // namespace

// The checksum's block kernels with AVX2; setup.py gives this file its flags.

#include <immintrin.h>

#include "checksum_blocks.h"

namespace keju {
namespace {

struct Avx2 {
  static constexpr int kWords = 4;
  using Words = __m256i;

  static inline Words load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static inline void store(uint8_t* to, Words v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); }
  static inline void stream(uint8_t* to, Words v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(to), v); }
  static inline void fence() { _mm_sfence(); }
  static inline Words round(const uint8_t* from, uint16_t nan) {
    const __m256i packed = _mm256_packus_epi32(upper_half(load(from), nan), upper_half(load(from + 32), nan));
    return _mm256_permute4x64_epi64(packed, 0xd8);  // packus works within 128-bit halves
  }
  static inline Words zero() { return _mm256_setzero_si256(); }
  static inline uint64_t sum(Words v) {
    const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return static_cast<uint64_t>(_mm_cvtsi128_si64(two)) + static_cast<uint64_t>(_mm_extract_epi64(two, 1));
  }
  static inline Words keyed(Words v, Words key) { return _mm256_add_epi32(v, key); }
  static inline Words add(Words v, Words w) { return _mm256_add_epi64(v, w); }
  static inline Words product(Words x) { return _mm256_mul_epu32(x, _mm256_srli_epi64(x, 32)); }

 private:
  // Eight floats as bf16, each in the low half of 32 bits.
  static inline __m256i upper_half(__m256i bits, uint16_t nan) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256 value = _mm256_castsi256_ps(bits);
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(nan), _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q)));
  }
};

}  // namespace

const ChecksumKernels kAvx2Checksum = checksum_kernels_of<Avx2>();

}  // namespace keju

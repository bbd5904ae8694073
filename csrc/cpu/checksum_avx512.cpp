// The checksum's block kernels with AVX-512; setup.py gives this file its flags.

#include <immintrin.h>

#include "checksum_blocks.h"

namespace keju {
namespace {

struct Avx512 {
  static constexpr int kWords = 8;
  using Words = __m512i;

  static inline Words load(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static inline void store(uint8_t* to, Words v) { _mm512_storeu_si512(to, v); }
  static inline void stream(uint8_t* to, Words v) { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), v); }
  static inline void fence() { _mm_sfence(); }
  static inline Words round(const uint8_t* from, uint16_t nan) {
    const __m512i low = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(upper_half(load(from), nan)));
    return _mm512_inserti64x4(low, _mm512_cvtepi32_epi16(upper_half(load(from + 64), nan)), 1);
  }
  static inline Words zero() { return _mm512_setzero_si512(); }
  static inline uint64_t sum(Words v) { return static_cast<uint64_t>(_mm512_reduce_add_epi64(v)); }
  static inline Words keyed(Words v, Words key) { return _mm512_add_epi32(v, key); }
  static inline Words add(Words v, Words w) { return _mm512_add_epi64(v, w); }
  static inline Words product(Words x) { return _mm512_mul_epu32(x, _mm512_srli_epi64(x, 32)); }

 private:
  // Sixteen floats as bf16, each in the low half of 32 bits.
  static inline __m512i upper_half(__m512i bits, uint16_t nan) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __m512 value = _mm512_castsi512_ps(bits);
    return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), rounded, _mm512_set1_epi32(nan));
  }
};

}  // namespace

const ChecksumKernels kAvx512Checksum = checksum_kernels_of<Avx512>();

}  // namespace keju

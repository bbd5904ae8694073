// bfloat16 as stored, with conversions. The per-instruction-set files do without torch's own type: see logprob_entropy_rows.h.

#pragma once

#include <stdint.h>
#include <string.h>

namespace {

struct Bf16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

// Rounds to nearest, ties to even. NaN is set apart: adding the rounding term could carry its mantissa into another value.
inline Bf16 to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(value != value ? 0x7fc0u : rounded)};
}

inline void from_float(float value, float* to) { *to = value; }
inline void from_float(float value, Bf16* to) { *to = to_bf16(value); }

}  // namespace

// The checksum's block kernels in portable C++, for little-endian machines; setup.py gives this file no flags.

#include <string.h>

#include "bf16.h"
#include "checksum_blocks.h"

namespace keju {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are little-endian");

struct Baseline {
  static constexpr int kWords = 2;
  struct Words {
    uint64_t word[kWords];
  };

  template <class Operation>
  static inline Words each(Operation operation) {
    Words out;
    for (int i = 0; i < kWords; ++i) out.word[i] = operation(i);
    return out;
  }

  static inline Words load(const uint8_t* from) {
    Words out;
    memcpy(&out, from, sizeof out);
    return out;
  }
  static inline void store(uint8_t* to, Words v) { memcpy(to, &v, sizeof v); }
  static inline void stream(uint8_t* to, Words v) { store(to, v); }
  static inline void fence() {}
  static inline Words round(const uint8_t* from, uint16_t nan) {
    float numbers[4 * kWords];
    Bf16 rounded[4 * kWords];
    memcpy(numbers, from, sizeof numbers);
    for (int i = 0; i < 4 * kWords; ++i) rounded[i] = numbers[i] != numbers[i] ? Bf16{nan} : to_bf16(numbers[i]);
    Words out;
    memcpy(&out, rounded, sizeof out);
    return out;
  }
  static inline Words zero() { return {}; }
  static inline uint64_t sum(Words v) { return v.word[0] + v.word[1]; }
  static inline Words keyed(Words v, Words key) {
    return each([&](int i) {
      const uint32_t low = static_cast<uint32_t>(v.word[i]) + static_cast<uint32_t>(key.word[i]);
      const uint32_t high = static_cast<uint32_t>(v.word[i] >> 32) + static_cast<uint32_t>(key.word[i] >> 32);
      return uint64_t{high} << 32 | low;
    });
  }
  static inline Words add(Words v, Words w) {
    return each([&](int i) { return v.word[i] + w.word[i]; });
  }
  static inline Words product(Words x) {
    return each([&](int i) { return uint64_t{static_cast<uint32_t>(x.word[i])} * (x.word[i] >> 32); });
  }
};

}  // namespace

const ChecksumKernels kBaselineChecksum = checksum_kernels_of<Baseline>();

}  // namespace keju

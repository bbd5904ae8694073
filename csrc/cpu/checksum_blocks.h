// The block kernels of kernels/checksum.py, whose head has the definition, for any vector of 64-bit words.
//
// A Vector type has:
//   Words, kWords (64-bit words of one), load(bytes), store(bytes, v), stream(bytes, v) past the caches, fence() after streaming,
//   round(floats, nan) → as many bytes of bf16, zero(), sum(v) mod 2^64,
//   keyed(v, key) (32-bit halves added, each mod 2^32), add(v, w) mod 2^64, product(x) = low half · high half of each word.
//
// Everything here is in an unnamed namespace: another instruction set's copy must not be taken for this one by the linker.

#pragma once

#include <stdint.h>

#include "checksum.h"

namespace keju {
namespace {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;

constexpr uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

constexpr int kBlockWords = kChecksumBlock / 8;

struct Keys {
  alignas(64) uint64_t word[kBlockWords];
  constexpr Keys() : word() {
    for (int i = 0; i < kBlockWords; ++i) word[i] = mix((i + 1) * kGolden);
  }
};

constexpr Keys kKeys;

enum class Write { nothing, cached, streamed };

template <class Vector, bool kRound, Write kWrite>
uint64_t hash_blocks(const uint8_t* source, uint8_t* target, int64_t first, int64_t count, uint16_t nan) {
  using Words = typename Vector::Words;
  constexpr int kUnroll = 4;  // independent sums
  constexpr int kBytes = 8 * Vector::kWords;
  constexpr int kScale = kRound ? 2 : 1;
  static_assert(kBlockWords % (kUnroll * Vector::kWords) == 0, "a block is whole steps");
  const uint8_t* const keys = reinterpret_cast<const uint8_t*>(kKeys.word);
  uint64_t total = 0;
  for (int64_t block = first; block < first + count; ++block) {
    Words sums[kUnroll];
    for (int u = 0; u < kUnroll; ++u) sums[u] = Vector::zero();
    for (int at = 0; at < kChecksumBlock; at += kUnroll * kBytes) {
      for (int u = 0; u < kUnroll; ++u) {
        const int here = at + u * kBytes;
        Words words;
        if constexpr (kRound) words = Vector::round(source + 2 * here, nan);
        else words = Vector::load(source + here);
        if constexpr (kWrite == Write::cached) Vector::store(target + here, words);
        if constexpr (kWrite == Write::streamed) Vector::stream(target + here, words);
        const Words x = Vector::keyed(words, Vector::load(keys + here));
        sums[u] = Vector::add(sums[u], Vector::add(x, Vector::product(x)));
      }
    }
    const Words digest = Vector::add(Vector::add(sums[0], sums[1]), Vector::add(sums[2], sums[3]));
    total += mix(Vector::sum(digest) + static_cast<uint64_t>(block + 1) * kGolden);
    source += kScale * kChecksumBlock;
    if constexpr (kWrite != Write::nothing) target += kChecksumBlock;
  }
  if constexpr (kWrite == Write::streamed) Vector::fence();
  return total;
}

template <class Vector>
constexpr ChecksumKernels checksum_kernels_of() {
  return {hash_blocks<Vector, false, Write::nothing>, hash_blocks<Vector, false, Write::cached>,
          hash_blocks<Vector, false, Write::streamed>, hash_blocks<Vector, true, Write::cached>,
          hash_blocks<Vector, true, Write::streamed>};
}

}  // namespace
}  // namespace keju

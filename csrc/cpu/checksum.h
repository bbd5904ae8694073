// What crosses from the operations (checksum.cpp) to their block kernels, one set for each instruction set. No torch here.

#pragma once

#include <stdint.h>

namespace keju {

// Bytes that are hashed together; a tensor's last block is filled up with zeros.
constexpr int64_t kChecksumBlock = 4096;

// The sum of the mixed digests of `count` whole blocks, of which the first is number `first` of its tensor. What is not a plain
// checksum also writes the hashed bytes to `target`; `round` reads fp32, twice the bytes, and hashes and writes bf16 (`nan` where
// a number is none). Sources and targets may lie at any address, but those of `streaming` at a multiple of kStreamingAlignment.
using ChecksumKernel = uint64_t (*)(const uint8_t* source, uint8_t* target, int64_t first, int64_t count, uint16_t nan);

constexpr int64_t kStreamingAlignment = 64;

struct ChecksumKernels {
  ChecksumKernel checksum;
  ChecksumKernel copy;
  ChecksumKernel copy_streaming;
  ChecksumKernel round;
  ChecksumKernel round_streaming;
};

extern const ChecksumKernels kBaselineChecksum;
extern const ChecksumKernels kAvx2Checksum;
extern const ChecksumKernels kAvx512Checksum;

}  // namespace keju

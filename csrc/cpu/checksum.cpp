// torch.ops.keju.checksum_native and copy_checksum_native: kernels/checksum.py's checksum of a tensor's bytes, alone and while they
// are copied or rounded from fp32 to bf16. checksum.py has the definition and is the only caller; checksum_blocks.h does the work.

#include "checksum.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

#include "bf16.h"
#include "capability.h"
#include "checksum_blocks.h"

namespace keju {
namespace {

// Targets from this size on are written past the caches: nothing of them would stay there anyway.
constexpr int64_t kStreamedBytes = int64_t{4} << 20;
// Blocks that a thread takes at a time: some tens of microseconds.
constexpr int64_t kShare = 256;
// Shares for which another thread is worth its start.
constexpr int64_t kLeastShares = 4;

const ChecksumKernels& kernels_in_force() {
#if defined(KEJU_X86)
  if (cpu_capability() == Capability::avx512) return kAvx512Checksum;
  if (cpu_capability() == Capability::avx2) return kAvx2Checksum;
#endif
  return kBaselineChecksum;
}

// The bits PyTorch gives NaN in bf16, which are not the same everywhere (0xffff on x86, 0x7fc0 for a number alone).
uint16_t bf16_nan() {
  static const uint16_t bits = [] {
    const at::Tensor nan = at::full({1}, std::numeric_limits<double>::quiet_NaN(), at::TensorOptions(at::kFloat));
    uint16_t out;
    std::memcpy(&out, nan.to(at::kBFloat16).const_data_ptr(), sizeof out);
    return out;
  }();
  return bits;
}

enum class Source { hashed, copied, rounded };

// What a tensor's bytes come from. `bytes` counts those that are hashed, which `rounded` has two of for four of its source.
struct Work {
  Source kind;
  const uint8_t* source;
  uint8_t* target;  // null where nothing is written
  int64_t bytes;
  uint16_t nan;

  ChecksumKernel kernel() const {
    const ChecksumKernels& kernels = kernels_in_force();
    if (kind == Source::hashed) return kernels.checksum;
    const bool streaming = bytes >= kStreamedBytes && reinterpret_cast<uintptr_t>(target) % kStreamingAlignment == 0;
    if (kind == Source::copied) return streaming ? kernels.copy_streaming : kernels.copy;
    return streaming ? kernels.round_streaming : kernels.round;
  }

  uint64_t whole_blocks(ChecksumKernel kernel, int64_t first, int64_t count) const {
    const int64_t at = first * kChecksumBlock;
    return kernel(source + (kind == Source::rounded ? 2 * at : at), target == nullptr ? nullptr : target + at, first, count, nan);
  }

  // The bytes behind the last whole block, filled up with zeros.
  uint64_t last_block(int64_t index) const {
    const int64_t at = index * kChecksumBlock, rest = bytes - at;
    uint8_t block[kChecksumBlock] = {};
    if (kind == Source::rounded) {
      for (int64_t i = 0; i < rest; i += 2) {
        float number;
        std::memcpy(&number, source + 2 * (at + i), sizeof number);
        const Bf16 rounded = number != number ? Bf16{nan} : to_bf16(number);
        std::memcpy(block + i, &rounded, sizeof rounded);
      }
    } else {
      std::memcpy(block, source + at, rest);
    }
    if (target != nullptr) std::memcpy(target + at, block, rest);
    return kernels_in_force().checksum(block, nullptr, index, 1, 0);
  }
};

int64_t run(const Work& work, int64_t threads) {
  TORCH_CHECK_VALUE(threads >= 1, "threads: expected at least 1, got ", threads);
  const ChecksumKernel kernel = work.kernel();
  const int64_t blocks = work.bytes / kChecksumBlock;
  // A sum modulo 2^64 does not depend on who adds what first.
  std::atomic<uint64_t> total{0};
  std::atomic<int64_t> next{0};
  const auto take_shares = [&] {
    uint64_t sum = 0;
    for (int64_t first; (first = next.fetch_add(kShare)) < blocks;) {
      sum += work.whole_blocks(kernel, first, std::min(kShare, blocks - first));
    }
    total += sum;
  };
  // Not OpenMP: its threads wait for each other spinning, on cores that the engine at the other end of a push could use, and stall
  // where there are fewer cores than threads.
  std::vector<std::thread> helpers;
  for (int64_t count = std::min(threads, blocks / (kShare * kLeastShares)); count > 1; --count) {
    try {
      helpers.emplace_back(take_shares);
    } catch (const std::system_error&) {
      break;  // no more threads are to be had; the shares are taken all the same
    }
  }
  take_shares();
  for (std::thread& helper : helpers) helper.join();
  if (work.bytes % kChecksumBlock != 0) total += work.last_block(blocks);
  return static_cast<int64_t>(mix(total + static_cast<uint64_t>(work.bytes + 1) * kGolden));
}

void check_contiguous(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides ", tensor.strides());
}

int64_t checksum(const at::Tensor& tensor, int64_t threads) {
  check_contiguous(tensor, "tensor");
  const auto* bytes = static_cast<const uint8_t*>(tensor.const_data_ptr());
  return run({Source::hashed, bytes, nullptr, static_cast<int64_t>(tensor.nbytes()), 0}, threads);
}

int64_t copy_checksum(const at::Tensor& source, at::Tensor& target, int64_t threads) {
  check_contiguous(source, "source");
  check_contiguous(target, "target");
  TORCH_CHECK_VALUE(source.sizes() == target.sizes(), "target: expected ", source.sizes(), " as source, got ", target.sizes());
  const bool rounded = source.scalar_type() == at::kFloat && target.scalar_type() == at::kBFloat16;
  TORCH_CHECK_TYPE(rounded || source.scalar_type() == target.scalar_type(), "target: expected ", source.scalar_type(),
                   " as source, or bfloat16 from float32; got ", target.scalar_type(), " from ", source.scalar_type());
  const Work work = {rounded ? Source::rounded : Source::copied, static_cast<const uint8_t*>(source.const_data_ptr()),
                     static_cast<uint8_t*>(target.mutable_data_ptr()), static_cast<int64_t>(target.nbytes()),
                     rounded ? bf16_nan() : uint16_t{0}};
  return run(work, threads);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(keju, library) {
  library.def("checksum_native(Tensor tensor, int threads=1) -> int");
  library.def("copy_checksum_native(Tensor source, Tensor(a!) target, int threads=1) -> int");
}

TORCH_LIBRARY_IMPL(keju, CPU, library) {
  library.impl("checksum_native", &checksum);
  library.impl("copy_checksum_native", &copy_checksum);
}

}  // namespace keju

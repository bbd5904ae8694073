// As much of CUDA as the kernels of csrc/cuda use, for a CPU, so that the same sources can be tested where there is no GPU.
//
// Blocks run one after the other. A block's threads are fibers of one system thread: each runs until it waits at a barrier or in
// a shuffle, then the next, in turn. Every second block takes them from the last to the first, so that a result which hangs on
// their order shows. A shared variable is a static one: it still holds what the last block left there. Threads that wait for one
// another for ever end the process with a message, as does a failed assertion.
//
// What this cannot show: races between fibers that never wait in between, and anything about speed.

#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::isfinite;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim;

// ---- Threads ----

namespace cuda_on_cpu {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t entry;
  jmp_buf here;
  bool started, finished;
  unsigned shuffles;
};

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  // Two sets in turn: a lane may be in the next shuffle before another has read this one's values.
  uint64_t value[2][kWarp];
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  std::function<void()> kernel;
  jmp_buf scheduler;
  ucontext_t scheduler_entry;
  unsigned current, finished;
  bool moved;
};

inline Block block;

// Not inlined: threadIdx and the like must be read anew after a switch.
__attribute__((noinline)) inline void yield() {
  if (_setjmp(block.fibers[block.current]->here) == 0) _longjmp(block.scheduler, 1);
}

inline void fiber_main() {
  block.kernel();
  block.fibers[block.current]->finished = true;
  ++block.finished;
  block.moved = true;
  _longjmp(block.scheduler, 1);
}

__attribute__((noinline)) inline void resume(unsigned thread) {
  Fiber& fiber = *block.fibers[thread];
  block.current = thread;
  threadIdx = dim3(thread);
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  block.moved = true;
  swapcontext(&block.scheduler_entry, &fiber.entry);
}

inline void wait(Barrier& barrier, unsigned all) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == all) {
    barrier.arrived = 0;
    ++barrier.generation;
    block.moved = true;
  } else {
    while (barrier.generation == generation) yield();
  }
}

inline void run_block(unsigned index, unsigned threads) {
  blockIdx = dim3(index);
  blockDim = dim3(threads);
  while (block.fibers.size() < threads) block.fibers.push_back(std::make_unique<Fiber>());
  block.warps.assign((threads + kWarp - 1) / kWarp, Warp());
  block.barrier = Barrier();
  block.finished = 0;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *block.fibers[i];
    fiber.started = fiber.finished = false;
    fiber.shuffles = 0;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = kStackBytes;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, fiber_main, 0);
  }
  while (block.finished < threads) {
    block.moved = false;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned thread = index % 2 == 0 ? i : threads - 1 - i;
      if (!block.fibers[thread]->finished) resume(thread);
    }
    if (!block.moved) {
      fprintf(stderr, "cuda_on_cpu: the threads of block %u wait for one another for ever\n", index);
      abort();
    }
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::block.barrier, blockDim.x); }

template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lane_mask) {
  using namespace cuda_on_cpu;
  static_assert(sizeof(Value) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) abort();
  const unsigned lane = block.current % kWarp;
  Warp& warp = block.warps[block.current / kWarp];
  uint64_t* values = warp.value[block.fibers[block.current]->shuffles++ % 2];
  memcpy(&values[lane], &value, sizeof value);
  wait(warp.barrier, std::min<unsigned>(kWarp, blockDim.x));
  memcpy(&value, &values[lane ^ static_cast<unsigned>(lane_mask)], sizeof value);
  return value;
}

// ---- Launches ----

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  cuda_on_cpu::block.kernel = [&] { kernel(arguments...); };
  for (unsigned index = 0; index < config->gridDim.x; ++index) cuda_on_cpu::run_block(index, config->blockDim.x);
  return cudaSuccess;
}

// ---- Numbers ----

// Aligned as on the device, so that a compiler that checks alignment finds a misaligned access.
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline float __uint_as_float(uint32_t bits) {
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t out;
  memcpy(&out, &value, sizeof out);
  return out;
}

// 2^x, off by up to the 2^-22 of itself that ex2.approx.ftz is allowed, to either side by the bits of x; exact at 0, as that is.
inline float exp2_as_inexact_as_allowed(float x) {
  const float exact = exp2f(x);
  if (x == 0.0f || exact != exact) return exact;
  if (exact < 0x1p-126f) return 0.0f;
  const uint32_t mixed = __float_as_uint(x) * 2654435761u >> 30;
  return exact * (1.0f + (mixed == 0 ? -0x1p-22f : mixed == 1 ? 0x1p-22f : mixed == 2 ? -0x1p-23f : 0x1p-23f));
}

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __half {
  _Float16 value;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __bfloat162float(__nv_bfloat16 a) { return __uint_as_float(static_cast<uint32_t>(a.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float a) {
  const uint32_t bits = __float_as_uint(a);
  return {static_cast<uint16_t>(a != a ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)}; }
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(fmaxf(__bfloat162float(a.x), __bfloat162float(b.x)),
                               fmaxf(__bfloat162float(a.y), __bfloat162float(b.y)));
}

inline float __half2float(__half a) { return static_cast<float>(a.value); }
inline __half __float2half_rn(float a) { return {static_cast<_Float16>(a)}; }
inline float __low2float(__half2 a) { return __half2float(a.x); }
inline float __high2float(__half2 a) { return __half2float(a.y); }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline __half2 __hmax2(__half2 a, __half2 b) {
  return __floats2half2_rn(fmaxf(__half2float(a.x), __half2float(b.x)), fmaxf(__half2float(a.y), __half2float(b.y)));
}

// 16 bytes of logits at a time: loads, stores and conversions of the three types, and the two instructions that CUDA C++ has no
// name for, the only PTX of the kernels. Everything here compiles for a CPU as well, on tests/kernels/cuda_on_cpu.h.

#pragma once

#if defined(KEJU_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <stdint.h>

namespace keju::cuda {
namespace {

// 2^x within 2^-22 of itself, and 0 where that is below 2^-126. One MUFU instruction; exp2f would add a range check around it.
__device__ __forceinline__ float exp2_approximate(float x) {
#if defined(KEJU_CUDA_ON_CPU)
  return exp2_as_inexact_as_allowed(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// The larger, or NaN where either is: fmaxf would take the other one.
__device__ __forceinline__ float max_or_nan(float a, float b) {
#if defined(KEJU_CUDA_ON_CPU)
  return a != a || a > b ? a : b;
#else
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#endif
}

// The same number, of which the compiler knows nothing before this point.
__device__ __forceinline__ int computed_here(int x) {
#if !defined(KEJU_CUDA_ON_CPU)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

struct Words {
  uint32_t at[4];
};

// What a type of logits needs: its lanes of a 32-bit word as floats, and the larger of two words lane by lane (not NaN).
template <class Element>
struct Format;

template <>
struct Format<float> {
  static constexpr uint32_t kMinusInfinity = 0xff800000u;
  static __device__ __forceinline__ float to_float(float value) { return value; }
  static __device__ __forceinline__ float from_float(float value) { return value; }
  static __device__ __forceinline__ float lane(uint32_t word, int) { return __uint_as_float(word); }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  }
  static __device__ __forceinline__ uint32_t pack(const float* lanes) { return __float_as_uint(lanes[0]); }
};

template <class Pair>
__device__ __forceinline__ uint32_t bits_of(Pair pair) {
  static_assert(sizeof(Pair) == sizeof(uint32_t));
  return *reinterpret_cast<uint32_t*>(&pair);
}

template <class Pair>
__device__ __forceinline__ Pair pair_of(uint32_t word) {
  static_assert(sizeof(Pair) == sizeof(uint32_t));
  return *reinterpret_cast<Pair*>(&word);
}

template <>
struct Format<__nv_bfloat16> {
  static constexpr uint32_t kMinusInfinity = 0xff80ff80u;
  static __device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
  static __device__ __forceinline__ __nv_bfloat16 from_float(float value) { return __float2bfloat16_rn(value); }
  static __device__ __forceinline__ float lane(uint32_t word, int i) {
    return __uint_as_float(i == 0 ? word << 16 : word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    return bits_of(__hmax2(pair_of<__nv_bfloat162>(a), pair_of<__nv_bfloat162>(b)));
  }
  static __device__ __forceinline__ uint32_t pack(const float* lanes) {
    return bits_of(__floats2bfloat162_rn(lanes[0], lanes[1]));
  }
};

template <>
struct Format<__half> {
  static constexpr uint32_t kMinusInfinity = 0xfc00fc00u;
  static __device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
  static __device__ __forceinline__ __half from_float(float value) { return __float2half_rn(value); }
  static __device__ __forceinline__ float lane(uint32_t word, int i) {
    const __half2 pair = pair_of<__half2>(word);
    return i == 0 ? __low2float(pair) : __high2float(pair);
  }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    return bits_of(__hmax2(pair_of<__half2>(a), pair_of<__half2>(b)));
  }
  static __device__ __forceinline__ uint32_t pack(const float* lanes) {
    return bits_of(__floats2half2_rn(lanes[0], lanes[1]));
  }
};

template <class Element>
constexpr int kLanesPerWord = sizeof(uint32_t) / sizeof(Element);

template <class Element>
constexpr int kLanes = 4 * kLanesPerWord<Element>;

__device__ __forceinline__ Words load_aligned(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}

__device__ __forceinline__ void store_aligned(void* to, const Words& words) {
  *static_cast<uint4*>(to) = make_uint4(words.at[0], words.at[1], words.at[2], words.at[3]);
}

// 16 bytes from an address that is aligned to an element only.
template <class Element>
__device__ __forceinline__ Words load_elements(const Element* from) {
  Words words;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kLanesPerWord<Element> == 1) {
      words.at[i] = reinterpret_cast<const uint32_t*>(from)[i];
    } else {
      const uint16_t* halves = reinterpret_cast<const uint16_t*>(from) + 2 * i;
      words.at[i] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
    }
  }
  return words;
}

// A row cut at the 16-byte boundaries of its address: `head` elements, `vectors` of 16 bytes, `tail` elements.
template <class Element>
struct Cut {
  int head, vectors, tail;

  __device__ __forceinline__ Cut(const Element* row, int length) {
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(Element));
    head = past == 0 ? 0 : min(kLanes<Element> - past, length);
    vectors = (length - head) / kLanes<Element>;
    tail = length - head - vectors * kLanes<Element>;
  }

  // Column of the i-th element outside the vectors, i < head + tail. There are at most 14, so a thread each.
  __device__ __forceinline__ int edge(int i) const { return i < head ? i : i + vectors * kLanes<Element>; }

  // The vector that has a column, or -1.
  __device__ __forceinline__ int vector_of(int column) const {
    const int inside = column - head;
    return inside >= 0 && inside < vectors * kLanes<Element> ? inside / kLanes<Element> : -1;
  }
};

}  // namespace
}  // namespace keju::cuda

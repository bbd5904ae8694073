// What crosses from the operation (logprob_entropy_ops.cpp) to its kernels (logprob_entropy.cu). No torch here: nvcc alone builds
// the kernels, and the tests build them for a CPU.

#pragma once

#include <stdint.h>

#if defined(KEJU_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace keju::cuda {

// Label of a row that takes no part.
constexpr int64_t kIgnore = -100;

enum class LogitsType : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// T rows of V logits, unit column stride, aligned to their type and no more. Arrays are [T] unless said otherwise.
struct Logits {
  const void* data;
  LogitsType type;
  int64_t rows;
  int64_t vocabulary;
  int64_t row_stride;          // in elements
  const int64_t* labels;       // each in [0, V), or kIgnore; any other fails an assertion on the device
  const float* temperature;    // positive; any other makes its rows NaN
  int64_t temperature_stride;  // 1, or 0 where one temperature serves all rows
};

struct Forward {
  Logits logits;
  float* logprob;
  float* entropy;
  float* maximum;  // M: the row's largest logit, not divided by the temperature
  float* sum;      // S = sum_j exp((x_j - M)/temperature)
  float* mean;     // sum_j p_j (x_j - M)/temperature, in nats
};

struct Backward {
  Logits logits;
  const float* logprob;
  const float* maximum;
  const float* sum;
  const float* mean;
  const float* d_logprob;
  const float* d_entropy;
  void* d_logits;  // of the logits' type; the logits themselves (same data, same stride), or apart from them
  int64_t d_row_stride;
};

// Both queue one kernel on the stream and return; the host waits for nothing.
cudaError_t logprob_entropy_forward(const Forward& arguments, cudaStream_t stream);
cudaError_t logprob_entropy_backward(const Backward& arguments, cudaStream_t stream);

}  // namespace keju::cuda

// What crosses from the operation (logprob_entropy.cpp) to its row kernels, one set for each instruction set. No torch here.

#pragma once

#include <stdint.h>

namespace keju {

// Label of a row that takes no part.
constexpr int64_t kIgnore = -100;

// T rows of V logits, unit column stride. Arrays are [T] unless said otherwise.
struct Rows {
  const void* logits;
  int64_t row_stride;  // in elements
  int64_t vocabulary;
  const int64_t* labels;        // each in [0, V), or kIgnore
  const double* temperature;    // positive
  int64_t temperature_stride;   // 1, or 0 where one temperature serves all rows
};

struct ForwardRows {
  Rows rows;
  float* logprob;
  float* entropy;
  float* maximum;  // M: the row's largest logit, not divided by the temperature
  float* sum;      // S = sum_j exp((x_j - M)/temperature), so that logsumexp = M/temperature + log S
  float* mean;     // sum_j p_j (x_j - M)/temperature = -H + log S
};

struct BackwardRows {
  Rows rows;
  const float* logprob;
  const float* maximum;
  const float* sum;
  const float* mean;
  const float* d_logprob;
  const float* d_entropy;
  void* d_logits;  // of the logits' type; may be the logits themselves
  int64_t d_row_stride;
};

// Both work on rows [begin, end); a row's result depends on that row alone.
using ForwardKernel = void (*)(const ForwardRows&, int64_t begin, int64_t end);
using BackwardKernel = void (*)(const BackwardRows&, int64_t begin, int64_t end);

struct LogprobEntropyKernels {
  ForwardKernel forward_float;
  ForwardKernel forward_bf16;
  BackwardKernel backward_float;
  BackwardKernel backward_bf16;
  // exp of n numbers that are at most 0; n is a multiple of 64.
  void (*exp)(const float* from, float* to, int64_t n);
};

extern const LogprobEntropyKernels kBaselineKernels;
extern const LogprobEntropyKernels kAvx2Kernels;
extern const LogprobEntropyKernels kAvx512Kernels;

}  // namespace keju

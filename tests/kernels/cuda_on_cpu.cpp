// The kernels of csrc/cuda behind plain C functions, on a CPU. tests/kernels/test_cuda_sources.py builds and calls it.

#define KEJU_CUDA_ON_CPU

#include "cuda_on_cpu.h"

#include "../../csrc/cuda/logprob_entropy.cu"

namespace {

keju::cuda::Logits logits_of(int type, const void* data, int64_t rows, int64_t vocabulary, int64_t row_stride,
                             const int64_t* labels, const float* temperature, int64_t temperature_stride) {
  const auto logits_type = static_cast<keju::cuda::LogitsType>(type);
  return {data, logits_type, rows, vocabulary, row_stride, labels, temperature, temperature_stride};
}

}  // namespace

extern "C" int forward(int type, const void* data, int64_t rows, int64_t vocabulary, int64_t row_stride, const int64_t* labels,
                       const float* temperature, int64_t temperature_stride, float* logprob, float* entropy, float* saved) {
  const auto logits = logits_of(type, data, rows, vocabulary, row_stride, labels, temperature, temperature_stride);
  return keju::cuda::logprob_entropy_forward({logits, logprob, entropy, saved, saved + rows, saved + 2 * rows}, nullptr);
}

extern "C" int backward(int type, const void* data, int64_t rows, int64_t vocabulary, int64_t row_stride, const int64_t* labels,
                        const float* temperature, int64_t temperature_stride, const float* logprob, const float* saved,
                        const float* d_logprob, const float* d_entropy, void* d_logits, int64_t d_row_stride) {
  const auto logits = logits_of(type, data, rows, vocabulary, row_stride, labels, temperature, temperature_stride);
  return keju::cuda::logprob_entropy_backward({logits, logprob, saved, saved + rows, saved + 2 * rows, d_logprob, d_entropy,
                                               d_logits, d_row_stride}, nullptr);
}

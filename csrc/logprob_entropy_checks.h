// The argument checks that the CPU's and the CUDA operations of logprob_entropy share: shapes, dtypes, strides, devices. What
// depends on values (labels, temperatures) is checked by each of them.

#pragma once

#include <ATen/core/Tensor.h>

namespace keju {

inline void check_logits(const at::Tensor& logits_TV, const char* name) {
  TORCH_CHECK_VALUE(logits_TV.dim() == 2, name, ": expected [T, V], got ", logits_TV.sizes());
  TORCH_CHECK_VALUE(logits_TV.size(1) >= 1, name, ": the vocabulary is empty");
  TORCH_CHECK_VALUE(logits_TV.size(1) == 1 || logits_TV.stride(1) == 1, name, ": expected column stride 1, got ",
                    logits_TV.stride(1));
}

// One number a row of the logits.
inline void check_row_values(const at::Tensor& tensor_T, const at::Tensor& logits_TV, at::ScalarType dtype, const char* name) {
  const int64_t rows = logits_TV.size(0);
  TORCH_CHECK_VALUE(tensor_T.dim() == 1 && tensor_T.size(0) == rows, name, ": expected [", rows, "], got ", tensor_T.sizes());
  TORCH_CHECK_TYPE(tensor_T.scalar_type() == dtype, name, ": expected ", dtype, ", got ", tensor_T.scalar_type());
  TORCH_CHECK_VALUE(tensor_T.device() == logits_TV.device(), name, ": expected on ", logits_TV.device(), ", got ",
                    tensor_T.device());
}

inline void check_temperature(const at::Tensor& temperature, const at::Tensor& logits_TV) {
  const int64_t rows = logits_TV.size(0);
  TORCH_CHECK_VALUE(temperature.dim() == 1 && (temperature.size(0) == 1 || temperature.size(0) == rows),
                    "temperature: expected [1] or [", rows, "], got ", temperature.sizes());
  TORCH_CHECK_VALUE(temperature.device() == logits_TV.device(), "temperature: expected on ", logits_TV.device(), ", got ",
                    temperature.device());
}

// What the backward has besides the forward's inputs.
inline void check_backward(const at::Tensor& logits_TV, const at::Tensor& logprob_T, const at::Tensor& saved_3T,
                           const at::Tensor& d_logprob_T, const at::Tensor& d_entropy_T, const at::Tensor& d_logits_TV) {
  const int64_t rows = logits_TV.size(0);
  check_logits(d_logits_TV, "d_logits_TV");
  TORCH_CHECK_VALUE(d_logits_TV.sizes() == logits_TV.sizes() && d_logits_TV.scalar_type() == logits_TV.scalar_type() &&
                        d_logits_TV.device() == logits_TV.device(),
                    "d_logits_TV: expected the logits' shape, dtype and device");
  TORCH_CHECK_VALUE(rows <= 1 || d_logits_TV.stride(0) >= logits_TV.size(1), "d_logits_TV: its rows overlap");
  check_row_values(logprob_T, logits_TV, at::kFloat, "logprob_T");
  check_row_values(d_logprob_T, logits_TV, at::kFloat, "d_logprob_T");
  check_row_values(d_entropy_T, logits_TV, at::kFloat, "d_entropy_T");
  TORCH_CHECK_VALUE(saved_3T.dim() == 2 && saved_3T.size(0) == 3 && saved_3T.size(1) == rows && saved_3T.is_contiguous() &&
                        saved_3T.scalar_type() == at::kFloat && saved_3T.device() == logits_TV.device(),
                    "saved_3T: expected what the forward gave");
}

}  // namespace keju

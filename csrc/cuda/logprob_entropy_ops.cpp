// torch.ops.keju.logprob_entropy_forward_cuda and _backward_cuda: argument checks, then one kernel on the current stream. They
// take and return what the CPU's …_native do (csrc/cpu/logprob_entropy.cpp). Nothing here waits for the device: what depends on
// values is left to the kernel, where a label outside the vocabulary fails an assertion and a temperature that is not positive
// makes its rows NaN.

#include "logprob_entropy.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "../logprob_entropy_checks.h"

namespace keju::cuda {
namespace {

LogitsType logits_type(const at::Tensor& logits_TV) {
  if (logits_TV.scalar_type() == at::kFloat) return LogitsType::kFloat32;
  if (logits_TV.scalar_type() == at::kBFloat16) return LogitsType::kBfloat16;
  TORCH_CHECK_TYPE(logits_TV.scalar_type() == at::kHalf, "logits_TV: expected float32, bfloat16 or float16, got ",
                   logits_TV.scalar_type());
  return LogitsType::kFloat16;
}

// The inputs that forward and backward share, made contiguous, which keeps them alive until the kernel is queued; then the
// caching allocator gives their memory to nothing but later work of the same stream.
struct Inputs {
  at::Tensor logits_TV, labels_T, temperature;

  Inputs(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& temperatures)
      : logits_TV(logits), labels_T(labels.contiguous()), temperature(temperatures.to(at::kFloat).contiguous()) {
    check_logits(logits_TV, "logits_TV");
    check_row_values(labels_T, logits_TV, at::kLong, "labels_T");
    check_temperature(temperature, logits_TV);
    // The kernels count rows and columns in int.
    constexpr int64_t most = std::numeric_limits<int>::max() / 2;
    TORCH_CHECK_VALUE(logits_TV.size(0) <= most && logits_TV.size(1) <= most, "logits_TV: ", logits_TV.sizes(),
                      " is more than the kernels can count");
  }

  Logits logits() const {
    return {logits_TV.const_data_ptr(),
            logits_type(logits_TV),
            logits_TV.size(0),
            logits_TV.size(1),
            logits_TV.stride(0),
            labels_T.const_data_ptr<int64_t>(),
            temperature.const_data_ptr<float>(),
            temperature.size(0) == 1 ? 0 : 1};
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& logits_TV, const at::Tensor& labels_T,
                                                       const at::Tensor& temperature) {
  const c10::cuda::CUDAGuard guard(logits_TV.device());
  const Inputs inputs(logits_TV, labels_T, temperature);
  const int64_t rows = logits_TV.size(0);
  at::Tensor logprob_T = at::empty({rows}, logits_TV.options().dtype(at::kFloat));
  at::Tensor entropy_T = at::empty_like(logprob_T);
  at::Tensor saved_3T = at::empty({3, rows}, logprob_T.options());
  float* saved = saved_3T.mutable_data_ptr<float>();
  const Forward arguments = {inputs.logits(), logprob_T.mutable_data_ptr<float>(), entropy_T.mutable_data_ptr<float>(),
                             saved, saved + rows, saved + 2 * rows};
  C10_CUDA_CHECK(logprob_entropy_forward(arguments, c10::cuda::getCurrentCUDAStream()));
  return {logprob_T, entropy_T, saved_3T};
}

void backward(const at::Tensor& logits_TV, const at::Tensor& labels_T, const at::Tensor& temperature, const at::Tensor& logprob_T,
              const at::Tensor& saved_3T, const at::Tensor& d_logprob_T, const at::Tensor& d_entropy_T, at::Tensor& d_logits_TV) {
  const c10::cuda::CUDAGuard guard(logits_TV.device());
  const Inputs inputs(logits_TV, labels_T, temperature);
  check_backward(logits_TV, logprob_T, saved_3T, d_logprob_T, d_entropy_T, d_logits_TV);
  const at::Tensor logprob = logprob_T.contiguous(), d_logprob = d_logprob_T.contiguous(), d_entropy = d_entropy_T.contiguous();
  const int64_t rows = logits_TV.size(0);
  const float* saved = saved_3T.const_data_ptr<float>();
  const Backward arguments = {inputs.logits(), logprob.const_data_ptr<float>(), saved, saved + rows, saved + 2 * rows,
                              d_logprob.const_data_ptr<float>(), d_entropy.const_data_ptr<float>(),
                              d_logits_TV.mutable_data_ptr(), d_logits_TV.stride(0)};
  C10_CUDA_CHECK(logprob_entropy_backward(arguments, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(keju, library) {
  library.def(
      "logprob_entropy_forward_cuda(Tensor logits_TV, Tensor labels_T, Tensor temperature) -> (Tensor, Tensor, Tensor)");
  library.def(
      "logprob_entropy_backward_cuda(Tensor logits_TV, Tensor labels_T, Tensor temperature, Tensor logprob_T, Tensor saved_3T, "
      "Tensor d_logprob_T, Tensor d_entropy_T, Tensor(a!) d_logits_TV) -> ()");
}

TORCH_LIBRARY_IMPL(keju, CUDA, library) {
  library.impl("logprob_entropy_forward_cuda", &forward);
  library.impl("logprob_entropy_backward_cuda", &backward);
}

}  // namespace keju::cuda

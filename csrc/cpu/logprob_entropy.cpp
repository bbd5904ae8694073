// torch.ops.keju.logprob_entropy_forward_native and _backward_native: argument checks, parallelism over rows, and the choice of
// the instruction set. kernels/logprob_entropy.py is their only caller; logprob_entropy_rows.h has the mathematics.

#include "logprob_entropy.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../logprob_entropy_checks.h"
#include "capability.h"

namespace keju {
namespace {

const LogprobEntropyKernels& kernels_in_force() {
#if defined(KEJU_X86)
  if (cpu_capability() == Capability::avx512) return kAvx512Kernels;
  if (cpu_capability() == Capability::avx2) return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

// Rows a thread should have at least: about 64K logits, some tens of microseconds.
int64_t grain(int64_t vocabulary) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, vocabulary)); }

void check_dtype(const at::Tensor& logits_TV) {
  TORCH_CHECK_TYPE(logits_TV.scalar_type() == at::kFloat || logits_TV.scalar_type() == at::kBFloat16,
                   "logits_TV: expected float32 or bfloat16, got ", logits_TV.scalar_type());
}

// The inputs that forward and backward share, made contiguous (which keeps them alive) and checked value by value.
struct Inputs {
  at::Tensor logits_TV, labels_T, temperature;

  Inputs(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& temperatures)
      : logits_TV(logits), labels_T(labels.contiguous()), temperature(temperatures.to(at::kDouble).contiguous()) {
    check_logits(logits_TV, "logits_TV");
    check_dtype(logits_TV);
    check_row_values(labels_T, logits_TV, at::kLong, "labels_T");
    check_temperature(temperature, logits_TV);
    const int64_t rows = logits_TV.size(0), vocabulary = logits_TV.size(1);
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t label = labels_T.const_data_ptr<int64_t>()[t];
      TORCH_CHECK_VALUE(label == kIgnore || (0 <= label && label < vocabulary), "labels_T: label ", label, " of row ", t,
                        " lies outside [0, ", vocabulary, ") and is not ", kIgnore);
    }
    for (int64_t t = 0; t < temperature.size(0); ++t) {
      const double value = temperature.const_data_ptr<double>()[t];
      TORCH_CHECK_VALUE(value >= 1e-30 && value <= 1e30, "temperature: ", value, " lies outside [1e-30, 1e30]");
    }
  }

  Rows rows() const {
    return {logits_TV.const_data_ptr(), logits_TV.stride(0), logits_TV.size(1), labels_T.const_data_ptr<int64_t>(),
            temperature.const_data_ptr<double>(), temperature.size(0) == 1 ? 0 : 1};
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& logits_TV, const at::Tensor& labels_T,
                                                       const at::Tensor& temperature) {
  const Inputs inputs(logits_TV, labels_T, temperature);
  const int64_t rows = logits_TV.size(0);
  at::Tensor logprob_T = at::empty({rows}, logits_TV.options().dtype(at::kFloat));
  at::Tensor entropy_T = at::empty_like(logprob_T);
  at::Tensor saved_3T = at::empty({3, rows}, logprob_T.options());
  float* saved = saved_3T.mutable_data_ptr<float>();
  const ForwardRows out = {inputs.rows(), logprob_T.mutable_data_ptr<float>(), entropy_T.mutable_data_ptr<float>(),
                           saved, saved + rows, saved + 2 * rows};
  const LogprobEntropyKernels& kernels = kernels_in_force();
  const ForwardKernel kernel = logits_TV.scalar_type() == at::kFloat ? kernels.forward_float : kernels.forward_bf16;
  at::parallel_for(0, rows, grain(logits_TV.size(1)), [&](int64_t begin, int64_t end) { kernel(out, begin, end); });
  return {logprob_T, entropy_T, saved_3T};
}

void backward(const at::Tensor& logits_TV, const at::Tensor& labels_T, const at::Tensor& temperature, const at::Tensor& logprob_T,
              const at::Tensor& saved_3T, const at::Tensor& d_logprob_T, const at::Tensor& d_entropy_T, at::Tensor& d_logits_TV) {
  const Inputs inputs(logits_TV, labels_T, temperature);
  const int64_t rows = logits_TV.size(0);
  check_backward(logits_TV, logprob_T, saved_3T, d_logprob_T, d_entropy_T, d_logits_TV);
  const at::Tensor logprob = logprob_T.contiguous(), d_logprob = d_logprob_T.contiguous(), d_entropy = d_entropy_T.contiguous();
  const float* saved = saved_3T.const_data_ptr<float>();
  const BackwardRows in = {inputs.rows(), logprob.const_data_ptr<float>(), saved, saved + rows, saved + 2 * rows,
                           d_logprob.const_data_ptr<float>(), d_entropy.const_data_ptr<float>(), d_logits_TV.mutable_data_ptr(),
                           d_logits_TV.stride(0)};
  const LogprobEntropyKernels& kernels = kernels_in_force();
  const BackwardKernel kernel = logits_TV.scalar_type() == at::kFloat ? kernels.backward_float : kernels.backward_bf16;
  at::parallel_for(0, rows, grain(logits_TV.size(1)), [&](int64_t begin, int64_t end) { kernel(in, begin, end); });
}

// The kernels' own exp, for the test of its accuracy.
at::Tensor exp_nonpositive(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.is_contiguous() && x.numel() % 64 == 0,
                    "x: expected contiguous float32, a multiple of 64 numbers");
  at::Tensor out = at::empty_like(x);
  kernels_in_force().exp(x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), x.numel());
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(keju, library) {
  library.def(
      "logprob_entropy_forward_native(Tensor logits_TV, Tensor labels_T, Tensor temperature) -> (Tensor, Tensor, Tensor)");
  library.def(
      "logprob_entropy_backward_native(Tensor logits_TV, Tensor labels_T, Tensor temperature, Tensor logprob_T, Tensor saved_3T, "
      "Tensor d_logprob_T, Tensor d_entropy_T, Tensor(a!) d_logits_TV) -> ()");
  library.def("exp_nonpositive(Tensor x) -> Tensor");
}

TORCH_LIBRARY_IMPL(keju, CPU, library) {
  library.impl("logprob_entropy_forward_native", &forward);
  library.impl("logprob_entropy_backward_native", &backward);
  library.impl("exp_nonpositive", &exp_nonpositive);
}

}  // namespace keju

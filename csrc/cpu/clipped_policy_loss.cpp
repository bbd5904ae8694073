// torch.ops.keju.clipped_policy_loss_native: kernels/reference.py's clipped_policy_loss, its gradient and its metrics in one pass
// over the tokens. With x = logprob - old_logprob, r = exp(x), k3(x) = exp(x) - 1 - x and g = ref_logprob - logprob:
//
//     loss   = sum_t weight (max(-r A, -clip(r) A) + kl_coefficient k3(g))
//     d_t    = weight (-r A [the free arm is the larger or equal one] - kl_coefficient expm1(g))
//     sums_7 = loss, tokens clipped low, clipped high, sum of k3(x), sum of k3(g), largest r, smallest r
//
// over the tokens with weight ≠ 0; what the others hold is not looked at. NaN of a token that takes part reaches the loss, its
// gradient and the sums it belongs to.
//
// Arithmetic is fp32 for each token and fp64 in the sums. Tokens are summed in blocks of a fixed size and the blocks in their
// order, so that the result is the same, bit for bit, for any number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "exponential.h"

namespace keju {
namespace {

constexpr int64_t kBlock = 4096;  // tokens; some tens of microseconds

struct Inputs {
  const float* logprob;
  const float* old_logprob;
  const float* advantage;
  const float* weight;
  const float* ref_logprob;  // or null
  float ratio_low;           // 1 - clip_low
  float ratio_high;          // 1 + clip_high
  float kl_coefficient;
};

struct Sums {
  double loss = 0;
  double clipped_low = 0;
  double clipped_high = 0;
  double kl = 0;
  double ref_kl = 0;
  float ratio_max = -std::numeric_limits<float>::infinity();
  float ratio_min = std::numeric_limits<float>::infinity();

  // NaN wins, and stays: no comparison with it is true.
  void see(float largest, float smallest) {
    if (largest > ratio_max || largest != largest) ratio_max = largest;
    if (smallest < ratio_min || smallest != smallest) ratio_min = smallest;
  }

  void add(const Sums& other) {
    loss += other.loss;
    clipped_low += other.clipped_low;
    clipped_high += other.clipped_high;
    kl += other.kl;
    ref_kl += other.ref_kl;
    see(other.ratio_max, other.ratio_min);
  }
};

Sums sum_block(const Inputs& in, int64_t begin, int64_t end, float* d_logprob) {
  Sums sums;
  for (int64_t t = begin; t < end; ++t) {
    const float weight = in.weight[t];
    if (weight == 0.0f) {
      d_logprob[t] = 0.0f;
      continue;
    }
    const float advantage = in.advantage[t];
    const Exponential moved = exponential(in.logprob[t] - in.old_logprob[t]);
    const float ratio = moved.exp;
    // `&` and `|`: the sign of an advantage is a coin toss, and a branch on it a misprediction every other token.
    const bool low = (advantage < 0.0f) & (ratio < in.ratio_low);
    const bool high = (advantage > 0.0f) & (ratio > in.ratio_high);
    // An advantage of 0 gives a loss of 0 also where the ratio has overflown; NaN stays.
    const bool nothing = (advantage == 0.0f) & (ratio == std::numeric_limits<float>::infinity());
    const float free = nothing ? 0.0f : -ratio * advantage;
    const float held = -(ratio < in.ratio_low ? in.ratio_low : ratio > in.ratio_high ? in.ratio_high : ratio) * advantage;
    float loss = held > free ? held : free;  // free where it is NaN; held is never NaN alone
    float slope = low | high ? 0.0f : free;
    if (in.ref_logprob != nullptr) {
      const Exponential gap = exponential(in.ref_logprob[t] - in.logprob[t]);
      sums.ref_kl += gap.k3;
      if (in.kl_coefficient != 0.0f) {  // 0 · inf is NaN
        loss += in.kl_coefficient * gap.k3;
        slope -= in.kl_coefficient * gap.expm1;
      }
    }
    d_logprob[t] = slope * weight;
    sums.loss += loss * weight;
    sums.clipped_low += low;
    sums.clipped_high += high;
    sums.kl += moved.k3;
    sums.see(ratio, ratio);
  }
  return sums;
}

at::Tensor checked(const at::Tensor& tensor_T, int64_t tokens, const char* name) {
  TORCH_CHECK_VALUE(tensor_T.dim() == 1 && tensor_T.size(0) == tokens, name, ": expected [", tokens, "], got ", tensor_T.sizes());
  TORCH_CHECK_TYPE(tensor_T.scalar_type() == at::kFloat, name, ": expected float32, got ", tensor_T.scalar_type());
  return tensor_T.contiguous();
}

std::tuple<at::Tensor, at::Tensor> clipped_policy_loss(const at::Tensor& logprob_T, const at::Tensor& old_logprob_T,
                                                       const at::Tensor& advantage_T, const at::Tensor& weight_T, double clip_low,
                                                       double clip_high, const std::optional<at::Tensor>& ref_logprob_T,
                                                       double kl_coefficient) {
  TORCH_CHECK_VALUE(logprob_T.dim() == 1, "logprob_T: expected [T], got ", logprob_T.sizes());
  TORCH_CHECK_VALUE(clip_low >= 0, "clip_low: expected at least 0, got ", clip_low);
  TORCH_CHECK_VALUE(clip_high >= 0, "clip_high: expected at least 0, got ", clip_high);
  TORCH_CHECK_VALUE(std::isfinite(kl_coefficient), "kl_coefficient: expected a finite number, got ", kl_coefficient);
  const int64_t tokens = logprob_T.size(0);
  const at::Tensor logprob = checked(logprob_T, tokens, "logprob_T");
  const at::Tensor old_logprob = checked(old_logprob_T, tokens, "old_logprob_T");
  const at::Tensor advantage = checked(advantage_T, tokens, "advantage_T");
  const at::Tensor weight = checked(weight_T, tokens, "weight_T");
  const at::Tensor ref_logprob = ref_logprob_T ? checked(*ref_logprob_T, tokens, "ref_logprob_T") : at::Tensor();
  const Inputs in = {logprob.const_data_ptr<float>(),
                     old_logprob.const_data_ptr<float>(),
                     advantage.const_data_ptr<float>(),
                     weight.const_data_ptr<float>(),
                     ref_logprob.defined() ? ref_logprob.const_data_ptr<float>() : nullptr,
                     static_cast<float>(1.0 - clip_low),
                     static_cast<float>(1.0 + clip_high),
                     static_cast<float>(kl_coefficient)};
  at::Tensor sums_7 = at::empty({7}, logprob.options()), d_logprob = at::empty_like(logprob);
  float* d_logprob_data = d_logprob.mutable_data_ptr<float>();
  std::vector<Sums> blocks((tokens + kBlock - 1) / kBlock);
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      blocks[b] = sum_block(in, b * kBlock, std::min((b + 1) * kBlock, tokens), d_logprob_data);
    }
  });
  Sums total;
  for (const Sums& block : blocks) total.add(block);
  const double values[7] = {total.loss,   total.clipped_low, total.clipped_high, total.kl,
                            total.ref_kl, total.ratio_max,   total.ratio_min};
  std::transform(values, values + 7, sums_7.mutable_data_ptr<float>(), [](double value) { return static_cast<float>(value); });
  return {sums_7, d_logprob};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(keju, library) {
  library.def(
      "clipped_policy_loss_native(Tensor logprob_T, Tensor old_logprob_T, Tensor advantage_T, Tensor weight_T, float clip_low, "
      "float clip_high, Tensor? ref_logprob_T, float kl_coefficient) -> (Tensor sums_7, Tensor d_logprob_T)");
}

TORCH_LIBRARY_IMPL(keju, CPU, library) { library.impl("clipped_policy_loss_native", &clipped_policy_loss); }

}  // namespace keju

// Forward and backward of logprob_entropy for NVIDIA GPUs from sm_80. kernels/reference.py defines the operation.
//
// Forward, one read of the row. Base 2 throughout, for the hardware's exponential: with c = log2(e)/temperature, M the largest
// logit so far of all columns but the label's y, and a_j = c x_j - c M, every thread keeps
//     S = sum_{j != y} 2^a_j        W = sum_{j != y} 2^a_j a_j
// and rescales both to a new M once for each 64 bytes, not for each element. The label stays out of the sums so that nothing
// cancels where p_y is near 1: with d = ln 2 (a_y - log2 S),
//     log p_y = -softplus(-d)      1 - p_y = sigmoid(-d)
//     H = -p_y log p_y - (1 - p_y) log(1 - p_y) + (1 - p_y) ln 2 (log2 S - W/S)
// in which every term of H is at least 0.
//
// Backward, one read and one write, with the M, S and mean = sum_j p_j ln 2 a_j of ALL columns that the forward saved:
//     d_x_j = -(2^a_j / S) (d_logprob + d_entropy (ln 2 a_j - mean)) / temperature
// and for the label -expm1(log p_y) instead of the difference 1 - p_y.
//
// Shape. One block of 512 threads a row and two blocks a multiprocessor (at most 64 registers a thread): 1024 threads with four
// 16-byte loads each are 64 KiB in flight, where 4.3 TB/s at 800 ns over 132 multiprocessors (H200) take 26 KB. So a block left
// alone on its multiprocessor still comes near full speed, and what a row costs besides its bytes, the start and the closing
// formulas, 1 to 2 us where 152k logits in bf16 take 19, passes while the other block reads: a persistent grid would gain
// nothing, and the hardware's queue evens out ignored rows, which end at once. In bf16 that memory feeds a multiprocessor 8 to 9
// elements a clock, in which it can do 16 exponentials and 128 simple instructions: the forward's 1.03 exponentials and 8
// instructions an element (with a rescale for each element 2 and 16) are a little over half of either.
//
// All sums have a fixed order (shuffles, then shared memory; no atomics): the same input gives the same bits.

// Labels are checked with assert, whatever the build thinks of assertions: the host is not to wait for the labels to be read.
#undef NDEBUG
#include <assert.h>
#include <float.h>
#include <limits.h>
#include <math.h>

#include "logprob_entropy.h"
#include "vectors.h"

namespace keju::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kWarps = kThreads / 32;
constexpr int kUnroll = 4;  // independent 16-byte loads of a thread
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr float kLn2 = 0.693147181f;
constexpr float kLog2e = 1.44269502f;
constexpr float kLog2eRest = 1.92596303e-8f;  // log2(e) less its float

// exp2_approximate is 0 here already. A logit of -inf gets this for its a_j: 0 · -150 is 0, but 0 · -inf would be NaN.
constexpr float kFloor = -150.0f;

// A number in two floats, high + low.
struct Pair {
  float high, low;
};

__device__ __forceinline__ Pair exponent_scale(float temperature) {
  if (!(temperature > 0.0f)) return {NAN, NAN};
  const float high = kLog2e / temperature;
  return {high, (fmaf(-high, temperature, kLog2e) + kLog2eRest) / temperature};
}

// c (x - maximum) to about 2^-45 of itself, where it is finite.
__device__ __forceinline__ Pair scaled_gap(float x, float maximum, Pair c) {
  const float gap = x - maximum;
  const float back = gap - x;
  const float lost = (x - (gap - back)) + (-maximum - back);
  const float high = gap * c.high;
  const float low = fmaf(gap, c.high, -high) + fmaf(gap, c.low, lost * c.high);
  return {high, isfinite(high) ? low : 0.0f};
}

// 2^x of a finite x; x's own rounding error would otherwise be the result's relative error.
__device__ __forceinline__ float exp2_pair(Pair x) { return exp2f(x.high) * fmaf(kLn2, x.low, 1.0f); }

// a_j, from the rounded c · M. NaN passes.
__device__ __forceinline__ float exponent(float x, float c, float offset) { return max_or_nan(fmaf(x, c, -offset), kFloor); }

// The sums of some columns, at first of none. `maximum` starts finite, so that nothing but -inf gives no inf - inf; `offset` is
// c · maximum, rounded, and kept finite for the same reason. NaN is ignored in `maximum` and reaches the sums.
struct Sums {
  float maximum, offset, sum, weighted;

  __device__ __forceinline__ void raise_to(float new_maximum, float c) {
    const float new_offset = fmaxf(offset, new_maximum * c);
    const float gap = fmaxf(offset - new_offset, kFloor);
    const float scale = exp2_approximate(gap);
    weighted = scale * fmaf(gap, sum, weighted);
    sum *= scale;
    maximum = new_maximum;
    offset = new_offset;
  }

  __device__ __forceinline__ void add(float x, float c) {
    raise_to(fmaxf(maximum, x), c);
    const float a = exponent(x, c, offset);
    const float e = exp2_approximate(a);
    sum += e;
    weighted = fmaf(e, a, weighted);
  }

  template <class Element>
  __device__ __forceinline__ void add(const Words (&group)[kUnroll], float c) {
    constexpr int kPerWord = kLanesPerWord<Element>;
    uint32_t largest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      largest[i] = group[0].at[i];
#pragma unroll
      for (int u = 1; u < kUnroll; ++u) largest[i] = Format<Element>::max(largest[i], group[u].at[i]);
    }
    largest[0] = Format<Element>::max(largest[0], largest[1]);
    largest[2] = Format<Element>::max(largest[2], largest[3]);
    largest[0] = Format<Element>::max(largest[0], largest[2]);
    float new_maximum = maximum;
#pragma unroll
    for (int k = 0; k < kPerWord; ++k) new_maximum = fmaxf(new_maximum, Format<Element>::lane(largest[0], k));
    raise_to(new_maximum, c);
    // Sums of a group for themselves first: shorter chains round less, and the vectors' chains are independent.
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float vector_sum = 0.0f, vector_weighted = 0.0f;
#pragma unroll
      for (int i = 0; i < 4 * kPerWord; ++i) {
        const float a = exponent(Format<Element>::lane(group[u].at[i / kPerWord], i % kPerWord), c, offset);
        const float e = exp2_approximate(a);
        vector_sum += e;
        vector_weighted = fmaf(e, a, vector_weighted);
      }
      sum += vector_sum;
      weighted += vector_weighted;
    }
  }
};

__device__ __forceinline__ Sums no_sums() { return {-FLT_MAX, -FLT_MAX, 0.0f, 0.0f}; }

// The sums of a warp, in every lane.
__device__ __forceinline__ void combine_warp(Sums& sums, float c) {
  float largest = sums.maximum;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  }
  sums.raise_to(largest, c);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sums.sum += __shfl_xor_sync(kAllLanes, sums.sum, distance);
    sums.weighted += __shfl_xor_sync(kAllLanes, sums.weighted, distance);
  }
}

// Puts -inf in place of one element of a thread's loads. `column` counts the group's elements. Indexed with constants only, so
// that the group stays in registers.
template <class Element>
__device__ __forceinline__ void hide(Words (&group)[kUnroll], int column) {
  constexpr int kPerWord = kLanesPerWord<Element>;
  const uint32_t lane_mask = kPerWord == 1 ? ~0u : column % kPerWord == 0 ? 0x0000ffffu : 0xffff0000u;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t mask = column / kPerWord == 4 * u + i ? lane_mask : 0u;
      group[u].at[i] = (group[u].at[i] & ~mask) | (Format<Element>::kMinusInfinity & mask);
    }
  }
}

// This thread's share of the sums over all columns but the label's.
template <class Element>
__device__ __forceinline__ Sums scan_row(const Element* row, int vocabulary, int label, float c) {
  constexpr int kStep = kUnroll * kThreads;
  const int thread = threadIdx.x;
  const Cut<Element> cut(row, vocabulary);
  const Element* body = row + cut.head;
  const int label_vector = cut.vector_of(label);
  // The vector this thread's group with the label starts at, if it is this thread's.
  const int label_group = label_vector >= 0 && label_vector % kThreads == thread ? label_vector / kStep * kStep + thread : -1;
  Sums sums = no_sums();
  for (int first = thread; first < cut.vectors; first += kStep) {
    Words group[kUnroll];
    if (first + (kUnroll - 1) * kThreads < cut.vectors) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) group[u] = load_aligned(body + (first + u * kThreads) * kLanes<Element>);
    } else {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        constexpr uint32_t none = Format<Element>::kMinusInfinity;
        group[u] = {{none, none, none, none}};
        if (first + u * kThreads < cut.vectors) group[u] = load_aligned(body + (first + u * kThreads) * kLanes<Element>);
      }
    }
    if (first == label_group) {
      // Once a row. As the loop's own variable, so that the masks are made here; before the loop they would hold 16 registers.
      const int u = (label_vector - computed_here(first)) / kThreads;
      hide<Element>(group, u * kLanes<Element> + (label - cut.head) % kLanes<Element>);
    }
    sums.add<Element>(group, c);
  }
  if (thread < cut.head + cut.tail && cut.edge(thread) != label) sums.add(Format<Element>::to_float(row[cut.edge(thread)]), c);
  return sums;
}

// The closing formulas of a row; see the head of this file.
__device__ __forceinline__ void finish_row(const Sums& others, float label, Pair c, const Forward& out, int64_t t) {
  // Without others p_y is 1; but a row of nothing but -inf is no distribution.
  float logprob = label - label, entropy = logprob, maximum = label, sum = 1.0f + logprob, mean = logprob;
  if (others.sum != 0.0f) {
    // What the offset's rounding left in every exponent.
    const float residue = fmaf(others.maximum, c.high, -others.offset);
    const float sum_others = others.sum * exp2f(-residue);
    const float log_sum = logf(sum_others);
    const float mean_others = kLn2 * (others.weighted / others.sum - residue);
    const float entropy_others = log_sum - mean_others < 0.0f ? 0.0f : log_sum - mean_others;
    const Pair a = scaled_gap(label, others.maximum, c);
    const bool leads = label > others.maximum;
    // Both sides relative to the largest logit of all, each with its own relative accuracy; so have their quotients, the odds.
    const float e_label = leads ? 1.0f : exp2_pair(a);
    const float e_others = leads ? sum_others * exp2_pair({-a.high, -a.low}) : sum_others;
    sum = e_label + e_others;
    const float p_label = e_label / sum, p_others = e_others / sum;
    const float d = fmaf(kLn2, a.high, fmaf(kLn2, a.low, -log_sum));
    const bool likely = e_label > e_others;
    const float log1p_odds = log1pf(likely ? e_others / e_label : e_label / e_others);
    logprob = likely ? -log1p_odds : d - log1p_odds;
    const float log_p_others = likely ? -d - log1p_odds : -log1p_odds;
    // 0 · -inf, twice
    const float label_entropy = p_label == 0.0f ? 0.0f : -p_label * logprob;
    const float label_mean = p_label == 0.0f ? 0.0f : p_label * kLn2 * a.high;
    entropy = label_entropy + p_others * (entropy_others - log_p_others);
    maximum = leads ? label : others.maximum;
    mean = leads ? p_others * (mean_others - kLn2 * a.high) : p_others * mean_others + label_mean;
  }
  out.logprob[t] = logprob;
  out.entropy[t] = entropy;
  out.maximum[t] = maximum;
  out.sum[t] = sum;
  out.mean[t] = mean;
}

// The row's label. A label that is none ends the kernel here, before it becomes an address.
__device__ __forceinline__ int64_t checked_label(const Logits& logits, int64_t t) {
  const int64_t label = logits.labels[t];
  assert((label == kIgnore || (0 <= label && label < logits.vocabulary)) &&
         "labels_T: a label lies outside [0, V) and is not -100");
  return label;
}

template <class Element>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) forward_kernel(Forward out) {
  __shared__ Sums of_warp[kWarps];
  const Logits& logits = out.logits;
  const int64_t t = blockIdx.x;
  const int64_t label = checked_label(logits, t);
  if (label == kIgnore) {
    if (threadIdx.x == 0) {
      out.logprob[t] = out.entropy[t] = out.maximum[t] = out.mean[t] = 0.0f;
      out.sum[t] = 1.0f;
    }
    return;
  }
  const Element* row = static_cast<const Element*>(logits.data) + t * logits.row_stride;
  const Pair c = exponent_scale(logits.temperature[t * logits.temperature_stride]);
  Sums sums = scan_row(row, static_cast<int>(logits.vocabulary), static_cast<int>(label), c.high);
  combine_warp(sums, c.high);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sums;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sums = threadIdx.x < kWarps ? of_warp[threadIdx.x] : no_sums();
  combine_warp(sums, c.high);
  if (threadIdx.x == 0) finish_row(sums, Format<Element>::to_float(row[label]), c, out, t);
}

// What of a row's gradient does not depend on the column: d_x_j = 2^a_j (constant + slope a_j).
struct Gradient {
  float c, offset, constant, slope;

  __device__ __forceinline__ Gradient(const Backward& in, int64_t t, float temperature, Pair scale) : c(scale.high) {
    const float maximum = in.maximum[t];
    offset = maximum * c;
    const float residue = fmaf(maximum, c, -offset);
    const float over = -exp2f(-residue) / (in.sum[t] * temperature);
    constant = over * (in.d_logprob[t] - in.d_entropy[t] * fmaf(kLn2, residue, in.mean[t]));
    slope = over * in.d_entropy[t] * kLn2;
  }

  __device__ __forceinline__ float operator()(float x) const {
    const float a = exponent(x, c, offset);
    return exp2_approximate(a) * fmaf(slope, a, constant);
  }

  template <class Element>
  __device__ __forceinline__ Words operator()(const Words& words) const {
    constexpr int kPerWord = kLanesPerWord<Element>;
    Words out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float lanes[kPerWord];
#pragma unroll
      for (int k = 0; k < kPerWord; ++k) lanes[k] = (*this)(Format<Element>::lane(words.at[i], k));
      out.at[i] = Format<Element>::pack(lanes);
    }
    return out;
  }
};

__device__ __forceinline__ float label_gradient(const Backward& in, int64_t t, float label, float temperature, Pair c) {
  const float logprob = in.logprob[t];
  const float p = expf(logprob);
  // 0 · -inf
  const float a = p == 0.0f ? 0.0f : kLn2 * scaled_gap(label, in.maximum[t], c).high;
  return (-in.d_logprob[t] * expm1f(logprob) - in.d_entropy[t] * p * (a - in.mean[t])) / temperature;
}

// The vectors of the row. Where logits and gradient are not aligned alike the loads give way, and the stores stay 16 bytes wide.
template <bool kAlike, class Element>
__device__ __forceinline__ void write_vectors(const Element* body, Element* d_body, int vectors, const Gradient& gradient) {
  for (int first = threadIdx.x; first < vectors; first += kUnroll * kThreads) {
    Words group[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const Element* from = body + (first + u * kThreads) * kLanes<Element>;
      if (first + u * kThreads < vectors) group[u] = kAlike ? load_aligned(from) : load_elements(from);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int vector = first + u * kThreads;
      if (vector < vectors) store_aligned(d_body + vector * kLanes<Element>, gradient.template operator()<Element>(group[u]));
    }
  }
}

template <class Element>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) backward_kernel(Backward in) {
  const Logits& logits = in.logits;
  const int thread = threadIdx.x;
  const int64_t t = blockIdx.x;
  const int64_t label = checked_label(logits, t);
  // Without __restrict__: the two may be the same memory, of which a thread writes only what it alone has read.
  const Element* row = static_cast<const Element*>(logits.data) + t * logits.row_stride;
  Element* d_row = static_cast<Element*>(in.d_logits) + t * in.d_row_stride;
  const int vocabulary = static_cast<int>(logits.vocabulary);
  const Cut<Element> cut(d_row, vocabulary);
  if (label == kIgnore) {
    for (int v = thread; v < cut.vectors; v += kThreads) store_aligned(d_row + cut.head + v * kLanes<Element>, {{0, 0, 0, 0}});
    if (thread < cut.head + cut.tail) d_row[cut.edge(thread)] = Format<Element>::from_float(0.0f);
    return;
  }
  const float temperature = logits.temperature[t * logits.temperature_stride];
  const Pair c = exponent_scale(temperature);
  const Gradient gradient(in, t, temperature, c);
  const int column = static_cast<int>(label), label_vector = cut.vector_of(column);
  const bool at_edge = thread < cut.head + cut.tail;
  const bool has_label = label_vector >= 0 ? label_vector % kThreads == thread : at_edge && cut.edge(thread) == column;
  // Read before this thread overwrites it, and written after.
  const float label_logit = has_label ? Format<Element>::to_float(row[column]) : 0.0f;
  if (reinterpret_cast<uintptr_t>(row + cut.head) % 16 == 0) {
    write_vectors<true>(row + cut.head, d_row + cut.head, cut.vectors, gradient);
  } else {
    write_vectors<false>(row + cut.head, d_row + cut.head, cut.vectors, gradient);
  }
  if (at_edge) {
    d_row[cut.edge(thread)] = Format<Element>::from_float(gradient(Format<Element>::to_float(row[cut.edge(thread)])));
  }
  if (has_label) d_row[column] = Format<Element>::from_float(label_gradient(in, t, label_logit, temperature, c));
}

template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), const Arguments& arguments, const Logits& logits, cudaStream_t stream) {
  // A row's columns are counted in int, one step beyond its end included; blocks of a grid too.
  if (logits.vocabulary < 1 || logits.vocabulary > INT_MAX - 65536 || logits.rows > INT_MAX) return cudaErrorInvalidValue;
  if (logits.rows == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(logits.rows));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace

cudaError_t logprob_entropy_forward(const Forward& arguments, cudaStream_t stream) {
  const Logits& logits = arguments.logits;
  if (logits.type == LogitsType::kFloat32) return launch(forward_kernel<float>, arguments, logits, stream);
  if (logits.type == LogitsType::kBfloat16) return launch(forward_kernel<__nv_bfloat16>, arguments, logits, stream);
  return launch(forward_kernel<__half>, arguments, logits, stream);
}

cudaError_t logprob_entropy_backward(const Backward& arguments, cudaStream_t stream) {
  const Logits& logits = arguments.logits;
  if (logits.type == LogitsType::kFloat32) return launch(backward_kernel<float>, arguments, logits, stream);
  if (logits.type == LogitsType::kBfloat16) return launch(backward_kernel<__nv_bfloat16>, arguments, logits, stream);
  return launch(backward_kernel<__half>, arguments, logits, stream);
}

}  // namespace keju::cuda

// The row kernels of logprob_entropy, written once over a Simd type. kernels/reference.py defines the operation.
//
// Forward, one pass over the row in blocks that stay in the L1 cache. With M the largest logit so far of all columns but the
// label's and a_j = (x_j - M)/temperature, a block adds to
//     S = sum_{j != y} exp(a_j)        W = sum_{j != y} exp(a_j) a_j
// after both were rescaled to the new M. Sums are fp32 within a block (few terms a lane) and fp64 across blocks. The label stays
// out of the sums so that nothing cancels where p_y is near 1: with d = (x_y - M)/temperature - log S,
//     log p_y = -softplus(-d)      1 - p_y = sigmoid(-d)
// and by the grouping property of entropy
//     H = -p_y log p_y - (1 - p_y) log(1 - p_y) + (1 - p_y) (log S - W/S),
// in which every term is at least 0. These closing formulas are fp64, once a row.
//
// Backward, one read and one write, with the M, S and mean = sum_j p_j a_j of ALL columns that the forward saved:
//     p_j = exp(a_j)/S      log p_j + H = a_j - mean      d_x_j = -p_j (d_logprob + d_entropy (a_j - mean)) / temperature
// and for the label 1 - p_y = -expm1(log p_y) instead of the difference.
//
// Each instruction set compiles this header with its own flags. Nothing with external linkage may come of it but the one table of
// kernels: an inline function of the C++ library, emitted here with AVX-512 and merged by the linker with the baseline's
// copy, would crash on a lesser processor. Hence C headers only, and the unnamed namespace.

#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>

#include "bf16.h"
#include "logprob_entropy.h"

namespace {

constexpr int64_t kBlock = 1024;

// exp(x) is 0 at and below this: round(x/ln 2) is -127 there, the exponent field of 0. Logits of -inf are raised to it.
constexpr float kExpFloor = -88.03f;

// exp of numbers in [kExpFloor, 88]; NaN stays NaN. Under 1 ulp with FMA, under 2 without. x = n ln 2 + r with ln 2 in two
// parts, of which the first has few enough bits that n times it is exact (W. J. Cody and W. Waite, "Software Manual for the
// Elementary Functions", 1980); exp(r) = 1 + r + r² q(r), q fitted for least relative error (3e-9) on |r| <= ln(2)/2.
template <class Simd>
inline typename Simd::Float exp_in_range(typename Simd::Float x) {
  // Adding 1.5 · 2^23 leaves the rounded integer in the low bits; the 127 makes it a biased exponent at once.
  const auto magic = Simd::set(12582912.0f + 127.0f);
  const auto shifted = Simd::fma(x, Simd::set(1.44269504f), magic);
  const auto n = Simd::sub(shifted, magic);
  auto r = Simd::fma(n, Simd::set(-0.693359375f), x);
  r = Simd::fma(n, Simd::set(2.12194440e-4f), r);
  auto q = Simd::set(1.3814579e-3f);
  q = Simd::fma(q, r, Simd::set(8.36872589e-3f));
  q = Simd::fma(q, r, Simd::set(4.1668389e-2f));
  q = Simd::fma(q, r, Simd::set(1.66665211e-1f));
  q = Simd::fma(q, r, Simd::set(4.9999994e-1f));
  q = Simd::fma(q, r, Simd::set(1.0f));
  q = Simd::fma(q, r, Simd::set(1.0f));
  return Simd::mul(q, Simd::power_of_two(shifted));
}

// a = (x - offset)/temperature, not below kExpFloor. 1/temperature is carried in two floats: a relative error common to all a_j
// would move the entropy by its own size times the variance of log p, where rounding errors of single a_j average out.
template <class Simd, bool kScaled>
struct Exponent {
  typename Simd::Float offset, floor, inverse_high, inverse_low;

  Exponent(float offset_value, double temperature) {
    const double inverse = 1.0 / temperature;
    const float high = static_cast<float>(inverse);
    offset = Simd::set(offset_value);
    floor = Simd::set(static_cast<float>(kExpFloor * temperature));
    inverse_high = Simd::set(high);
    inverse_low = Simd::set(static_cast<float>(inverse - high));
  }

  inline typename Simd::Float operator()(typename Simd::Float x) const {
    // The floor comes first, where x - offset may be -inf; as max's first argument it lets NaN through.
    const auto gap = Simd::max(floor, Simd::sub(x, offset));
    if (!kScaled) return gap;
    return Simd::fma(gap, inverse_low, Simd::mul(gap, inverse_high));
  }
};

template <class Simd>
inline double lane_sum(typename Simd::Float v) {
  float lanes[Simd::kLanes];
  Simd::store(lanes, v);
  double total = 0;
  for (int i = 0; i < Simd::kLanes; ++i) total += lanes[i];
  return total;
}

template <class Simd>
inline float lane_max(typename Simd::Float v) {
  float lanes[Simd::kLanes];
  Simd::store(lanes, v);
  float largest = lanes[0];
  for (int i = 1; i < Simd::kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

template <class Simd, class Element>
inline float block_max(const Element* block, int64_t length) {
  typename Simd::Float largest[Simd::kUnroll];
  for (auto& v : largest) v = Simd::set(-FLT_MAX);
  for (int64_t j = 0; j < length; j += Simd::kUnroll * Simd::kLanes) {
    for (int u = 0; u < Simd::kUnroll; ++u) largest[u] = Simd::max(Simd::load(block + j + u * Simd::kLanes), largest[u]);
  }
  for (int u = 1; u < Simd::kUnroll; ++u) largest[0] = Simd::max(largest[u], largest[0]);
  return lane_max<Simd>(largest[0]);
}

// A block ready for the vector loop: the logits in place, or a copy of them with the label's column at -inf and -inf up to a
// multiple of the loop's step.
template <class Simd, class Element>
struct Block {
  alignas(64) Element copy[kBlock];
  const Element* data;
  int64_t length;

  void take(const Element* row, int64_t begin, int64_t end, int64_t label) {
    constexpr int64_t step = Simd::kUnroll * Simd::kLanes;
    data = row + begin;
    length = (end - begin + step - 1) / step * step;
    const bool has_label = begin <= label && label < end;
    if (length == end - begin && !has_label) return;
    for (int64_t j = begin; j < end; ++j) copy[j - begin] = row[j];
    for (int64_t j = end - begin; j < length; ++j) from_float(-INFINITY, copy + j);
    if (has_label) from_float(-INFINITY, copy + (label - begin));
    data = copy;
  }
};

// The sums over all columns but the label's.
struct Others {
  float maximum = -FLT_MAX;  // finite, so that a leading run of -inf gives no inf - inf
  double sum = 0;
  double weighted = 0;

  void rescale(float new_maximum, double temperature) {
    const double gap = (static_cast<double>(maximum) - new_maximum) / temperature;
    const double scale = exp(gap);
    weighted = scale * (weighted + gap * sum);
    sum *= scale;
    maximum = new_maximum;
  }
};

template <class Simd, bool kScaled, class Element>
inline void add_block(const Element* block, int64_t length, double temperature, Others& others) {
  const float maximum = block_max<Simd>(block, length);
  if (maximum > others.maximum) others.rescale(maximum, temperature);
  const Exponent<Simd, kScaled> exponent(others.maximum, temperature);
  typename Simd::Float sum[Simd::kUnroll], weighted[Simd::kUnroll];
  for (int u = 0; u < Simd::kUnroll; ++u) sum[u] = weighted[u] = Simd::set(0.0f);
  for (int64_t j = 0; j < length; j += Simd::kUnroll * Simd::kLanes) {
    for (int u = 0; u < Simd::kUnroll; ++u) {
      const auto a = exponent(Simd::load(block + j + u * Simd::kLanes));
      const auto e = exp_in_range<Simd>(a);
      sum[u] = Simd::add(sum[u], e);
      weighted[u] = Simd::fma(e, a, weighted[u]);
    }
  }
  for (int u = 0; u < Simd::kUnroll; ++u) {
    others.sum += lane_sum<Simd>(sum[u]);
    others.weighted += lane_sum<Simd>(weighted[u]);
  }
}

template <class Simd, bool kScaled, class Element>
inline Others scan_row(const Element* row, int64_t vocabulary, int64_t label, double temperature) {
  Block<Simd, Element> block;
  Others others;
  for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const int64_t end = begin + kBlock < vocabulary ? begin + kBlock : vocabulary;
    block.take(row, begin, end, label);
    add_block<Simd, kScaled>(block.data, block.length, temperature, others);
  }
  return others;
}

// The closing formulas of a row; see the head of this file.
inline void finish_row(const Others& others, float label_logit, double temperature, const keju::ForwardRows& out, int64_t t) {
  double logprob = 0, entropy = 0;
  if (others.sum != 0) {
    const double log_sum = log(others.sum);
    const double d = (static_cast<double>(label_logit) - others.maximum) / temperature - log_sum;
    logprob = d > 0 ? -log1p(exp(-d)) : d - log1p(exp(d));
    const double log_p_others = d > 0 ? logprob - d : -log1p(exp(d));
    const double p_label = exp(logprob), p_others = exp(log_p_others);
    const double label_term = p_label == 0 ? 0 : p_label * logprob;
    entropy = p_others * (log_sum - others.weighted / others.sum - log_p_others) - label_term;
  }
  const float maximum = label_logit > others.maximum ? label_logit : others.maximum;
  Others all = others;
  all.rescale(maximum, temperature);
  const double a_label = (static_cast<double>(label_logit) - maximum) / temperature;
  const double e_label = exp(a_label);
  all.sum += e_label;
  if (e_label != 0) all.weighted += e_label * a_label;
  // A row of nothing but -inf is no distribution.
  const bool empty = all.sum == 0;
  out.logprob[t] = empty ? NAN : static_cast<float>(logprob);
  out.entropy[t] = empty ? NAN : entropy < 0 ? 0.0f : static_cast<float>(entropy);
  out.maximum[t] = maximum;
  out.sum[t] = static_cast<float>(all.sum);
  out.mean[t] = static_cast<float>(all.weighted / all.sum);
}

template <class Simd, class Element>
void forward_rows(const keju::ForwardRows& out, int64_t begin, int64_t end) {
  const keju::Rows& rows = out.rows;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t label = rows.labels[t];
    if (label == keju::kIgnore) {
      out.logprob[t] = out.entropy[t] = out.maximum[t] = out.mean[t] = 0.0f;
      out.sum[t] = 1.0f;
      continue;
    }
    const Element* row = static_cast<const Element*>(rows.logits) + t * rows.row_stride;
    const double temperature = rows.temperature[t * rows.temperature_stride];
    const Others others = temperature == 1.0 ? scan_row<Simd, false>(row, rows.vocabulary, label, temperature)
                                             : scan_row<Simd, true>(row, rows.vocabulary, label, temperature);
    finish_row(others, to_float(row[label]), temperature, out, t);
  }
}

// d_x_j = exp(a_j) · (constant + slope · a_j), the formula at the head with what does not depend on j drawn together.
template <class Simd, bool kScaled, class Element>
inline void write_row(const Element* row, Element* d_row, int64_t vocabulary, float maximum, double temperature, float constant,
                      float slope) {
  const Exponent<Simd, kScaled> exponent(maximum, temperature);
  const auto constant_v = Simd::set(constant), slope_v = Simd::set(slope);
  const auto gradient = [&](typename Simd::Float x) {
    const auto a = exponent(x);
    return Simd::mul(exp_in_range<Simd>(a), Simd::fma(slope_v, a, constant_v));
  };
  int64_t j = 0;
  for (; j + Simd::kLanes <= vocabulary; j += Simd::kLanes) Simd::store(d_row + j, gradient(Simd::load(row + j)));
  if (j == vocabulary) return;
  Element tail[Simd::kLanes];
  for (int i = 0; i < Simd::kLanes; ++i) tail[i] = row[j + i < vocabulary ? j + i : j];
  Simd::store(tail, gradient(Simd::load(tail)));
  for (int i = 0; j + i < vocabulary; ++i) d_row[j + i] = tail[i];
}

template <class Simd, class Element>
inline void backward_row(const keju::BackwardRows& in, const Element* row, Element* d_row, int64_t label, int64_t t) {
  const keju::Rows& rows = in.rows;
  const double temperature = rows.temperature[t * rows.temperature_stride];
  const double d_logprob = in.d_logprob[t], d_entropy = in.d_entropy[t], mean = in.mean[t];
  const double over = -1.0 / (static_cast<double>(in.sum[t]) * temperature);
  const float constant = static_cast<float>(over * (d_logprob - d_entropy * mean));
  const float slope = static_cast<float>(over * d_entropy);
  // Read before the row is overwritten.
  const double label_logit = to_float(row[label]);
  const auto write = temperature == 1.0 ? write_row<Simd, false, Element> : write_row<Simd, true, Element>;
  write(row, d_row, rows.vocabulary, in.maximum[t], temperature, constant, slope);
  const double p_label = exp(static_cast<double>(in.logprob[t]));
  const double a_label = (label_logit - in.maximum[t]) / temperature;
  const double entropy_part = p_label == 0 ? 0 : p_label * (a_label - mean);
  const double not_label = -expm1(static_cast<double>(in.logprob[t]));
  from_float(static_cast<float>((d_logprob * not_label - d_entropy * entropy_part) / temperature), d_row + label);
}

template <class Simd, class Element>
void backward_rows(const keju::BackwardRows& in, int64_t begin, int64_t end) {
  const keju::Rows& rows = in.rows;
  for (int64_t t = begin; t < end; ++t) {
    const Element* row = static_cast<const Element*>(rows.logits) + t * rows.row_stride;
    Element* d_row = static_cast<Element*>(in.d_logits) + t * in.d_row_stride;
    if (rows.labels[t] == keju::kIgnore) {
      for (int64_t j = 0; j < rows.vocabulary; ++j) from_float(0.0f, d_row + j);
    } else {
      backward_row<Simd>(in, row, d_row, rows.labels[t], t);
    }
  }
}

template <class Simd>
void exp_all(const float* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += Simd::kLanes) {
    Simd::store(to + i, exp_in_range<Simd>(Simd::max(Simd::set(kExpFloor), Simd::load(from + i))));
  }
}

template <class Simd>
constexpr keju::LogprobEntropyKernels kernels_of() {
  return {forward_rows<Simd, float>, forward_rows<Simd, Bf16>, backward_rows<Simd, float>, backward_rows<Simd, Bf16>,
          exp_all<Simd>};
}

}  // namespace

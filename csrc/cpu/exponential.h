// exp(x), exp(x) - 1 and k3 = exp(x) - 1 - x (kernels/reference.py) of a log-ratio, in fp32.

#pragma once

#include <cmath>

namespace keju {
namespace {

struct Exponential {
  float exp;
  float expm1;
  float k3;
};

// exp(x), exp(x) - 1 and exp(x) - 1 - x, each accurate relative to itself. On-policy x is near 0, where k3 is about x²/2 and as a
// difference, even one of expm1, would drown in roundings of x: the Taylor series serves |x| < 1 (what it leaves out is 1/12!).
inline Exponential exponential(float x) {
  if (!(std::fabs(x) < 1.0f)) {
    // NaN comes here too. The k3 of an infinity is as in the reference: NaN for +inf, inf for -inf.
    const float e = std::exp(x);
    return {e, e - 1.0f, e - 1.0f - x};
  }
  float q = 1.0f / 39916800;
  for (const float coefficient : {1.0f / 3628800, 1.0f / 362880, 1.0f / 40320, 1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24,
                                  1.0f / 6, 1.0f / 2}) {
    q = q * x + coefficient;
  }
  const float k3 = q * x * x;
  return {k3 + x + 1.0f, k3 + x, k3};
}

}  // namespace
}  // namespace keju

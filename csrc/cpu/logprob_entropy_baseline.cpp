// The row kernels for one instruction set; setup.py gives this file its flags.

#include "logprob_entropy_rows.h"
#include "simd_baseline.h"

namespace keju {

const LogprobEntropyKernels kBaselineKernels = kernels_of<Baseline>();

}  // namespace keju

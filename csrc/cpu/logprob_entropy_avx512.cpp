// The row kernels for one instruction set; setup.py gives this file its flags.

#include "logprob_entropy_rows.h"
#include "simd_avx512.h"

namespace keju {

const LogprobEntropyKernels kAvx512Kernels = kernels_of<Avx512>();

}  // namespace keju

// The row kernels for one instruction set; setup.py gives this file its flags.

#include "logprob_entropy_rows.h"
#include "simd_avx2.h"

namespace keju {

const LogprobEntropyKernels kAvx2Kernels = kernels_of<Avx2>();

}  // namespace keju

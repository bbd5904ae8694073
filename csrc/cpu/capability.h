// Which instruction set the CPU kernels run with: chosen once from what the processor and the system support.

#pragma once

namespace keju {

enum class Capability : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The capability in force: the best one supported, unless `set_cpu_capability` chose another.
Capability cpu_capability();

}  // namespace keju

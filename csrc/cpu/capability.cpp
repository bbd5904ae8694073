// The run-time choice of an instruction set, and the operations that show and (for tests) change it:
//   cpu_capability() -> str          the one in force: "baseline", "avx2" or "avx512"
//   cpu_capabilities() -> str[]      all that this processor can run, slowest first
//   set_cpu_capability(str) -> ()    takes one of those; ValueError for any other

#include "capability.h"

#include <torch/library.h>

#include <array>
#include <atomic>
#include <string>
#include <vector>

namespace keju {
namespace {

constexpr std::array<const char*, 3> kNames = {"baseline", "avx2", "avx512"};

Capability best_supported() {
#if defined(KEJU_X86)
  __builtin_cpu_init();
  // These builtins also ask whether the operating system saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512) return Capability::avx512;
  if (avx2) return Capability::avx2;
#endif
  return Capability::baseline;
}

std::atomic<Capability>& in_force() {
  static std::atomic<Capability> capability{best_supported()};
  return capability;
}

std::string name_in_force() { return kNames[static_cast<int>(cpu_capability())]; }

std::vector<std::string> supported_names() {
  return {kNames.begin(), kNames.begin() + static_cast<int>(best_supported()) + 1};
}

void set_by_name(const std::string& name) {
  for (int index = 0; index <= static_cast<int>(best_supported()); ++index) {
    if (name == kNames[index]) {
      in_force() = static_cast<Capability>(index);
      return;
    }
  }
  TORCH_CHECK_VALUE(false, "set_cpu_capability: '", name, "' is not one this processor can run; cpu_capabilities() lists them");
}

}  // namespace

Capability cpu_capability() { return in_force().load(std::memory_order_relaxed); }

TORCH_LIBRARY_FRAGMENT(keju, library) {
  library.def("cpu_capability() -> str", &name_in_force);
  library.def("cpu_capabilities() -> str[]", &supported_names);
  library.def("set_cpu_capability(str name) -> ()", &set_by_name);
}

}  // namespace keju

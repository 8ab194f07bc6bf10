// Which of the compiled instruction sets runs: the widest that the machine has, or the one that FASTLORA_ISA names.
#include "kernels.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastlora {

namespace portable {
extern const Kernels passes;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels passes;
}
namespace avx512 {
extern const Kernels passes;
}
namespace avx512bf16 {
extern const Kernels passes;
}
namespace amx {
Kernels with_tiles();
}
namespace amx_emulated {
Kernels with_tiles();
}
#endif

namespace {

#if defined(__x86_64__)
/// Whether the machine has tiles of bfloat16, and the kernel grants this process their registers, which it keeps back until it is asked.
bool has_tiles() {
#if defined(__linux__)
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // Linux: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, features;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &features) || !(features & AMX_BF16) || !(features & AMX_TILE)) return false;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

Kernels pick() {
  const char* forced = std::getenv("FASTLORA_ISA");
  const std::string name = forced ? forced : "";
  const bool known = name.empty() || name == "portable" || name == "avx2" || name == "avx512" || name == "avx512bf16" || name == "amx" ||
                     name == "amx_emulated";
  STD_TORCH_CHECK(known, "FASTLORA_ISA=", name, ": expected portable, avx2, avx512, avx512bf16, amx or amx_emulated");
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(FASTLORA_EMULATED_AVX512)
  const bool has_avx512 = has_avx2, has_dots = has_avx2;  // tests/emulated_avx512.h
#else
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_dots = has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  if (has_dots && name == "amx_emulated") return amx_emulated::with_tiles();  // slow, for tests: never unasked
  if (has_dots && (name.empty() || name == "amx") && has_tiles()) return amx::with_tiles();
  if (has_dots && (name.empty() || name == "avx512bf16")) return avx512bf16::passes;
  if (has_avx512 && (name.empty() || name == "avx512")) return avx512::passes;
  if (has_avx2 && (name.empty() || name == "avx2")) return avx2::passes;
#endif
  STD_TORCH_CHECK(name.empty() || name == "portable", "FASTLORA_ISA=", name, ": this machine does not have it");
  return portable::passes;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels picked = pick();
  return picked;
}

}  // namespace fastlora

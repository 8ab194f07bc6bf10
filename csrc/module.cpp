// fastlora._C: importing it registers the native operators with torch (the STABLE_TORCH_LIBRARY_IMPL blocks of the other files).
// The schemas are defined by fastlora/ops.py, which must be imported first.
#include <pybind11/pybind11.h>

#include "cpu/adapter_passes.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native operators of fastlora and what they were compiled with.";
  m.attr("cuda") = false;
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "g++ " __VERSION__;
#endif
  m.def(
      "isa", [] { return fastlora::kernels().isa; },
      "The instruction set that runs: portable, avx2 or avx512 (FASTLORA_ISA forces one).");
}

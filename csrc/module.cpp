// fastlora._C: importing it registers the native operators with torch (the STABLE_TORCH_LIBRARY_IMPL blocks of the other files).
// The schemas are defined by fastlora/ops.py, which must be imported first.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"
#include "unchanged.h"

namespace py = pybind11;

namespace {

// Called once a layer and call: without pybind11's way of arguments, which costs as much again.
PyMethodDef unchanged_method{
    "unchanged", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fastlora::unchanged)), METH_FASTCALL,
    "unchanged(items, types, empty, lists, attributes): whether Python's objects still have what they had (fastlora/peft/known.py)."};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native operators of fastlora and what they were compiled with.";
#ifdef FASTLORA_CUDA
  m.attr("cuda") = py::str(FASTLORA_CUDA).attr("split")();  // the targets: machine code (sm_), and PTX for later cards (compute_)
#else
  m.attr("cuda") = false;
  m.attr("without_cuda") = FASTLORA_WITHOUT_CUDA;
#endif
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "g++ " __VERSION__;
#endif
  m.def(
      "isa", [] { return fastlora::kernels().isa; },
      "The instruction set that runs: portable, avx2, avx512 or avx512bf16 (FASTLORA_ISA forces one); amx and amx_emulated only where it names them.");
  m.attr("unchanged") = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&unchanged_method, nullptr, nullptr));
}

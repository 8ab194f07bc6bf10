// What every kernel file includes: CUDA's runtime and number types, and how kernels are launched. It stands between the kernels and CUDA so that
// the tests can compile them for a CPU (tests/emulated_cuda.h). Instructions that CUDA has no function for are in ptx.cuh.
#pragma once

#ifdef FASTLORA_EMULATED
#include "emulated_cuda.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fastlora {

constexpr size_t SHARED_UNASKED = 48 << 10;  // bytes a block may have without asking

/// `shared` bytes of dynamic shared memory, which the kernel finds at shared_memory(). An error is found by cudaGetLastError afterwards.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, Arguments... arguments) {
  if (shared > SHARED_UNASKED) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  kernel<<<grid, block, shared, stream>>>(arguments...);
}

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

}  // namespace fastlora

#endif

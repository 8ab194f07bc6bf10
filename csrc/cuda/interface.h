// What kernel files and their callers agree on. Neither CUDA's headers nor torch's: the kernels are compiled without torch, the callers without CUDA.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;  // as CUDA's own headers have it

namespace fastlora {

enum class Dtype { FLOAT32, BFLOAT16, FLOAT16 };

}  // namespace fastlora

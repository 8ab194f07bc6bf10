// What kernel files and their callers agree on. Neither CUDA's headers nor torch's: the kernels are compiled without torch, the callers without CUDA.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;  // as CUDA's own headers have it

namespace fastlora {

enum class Dtype { FLOAT32, BFLOAT16, FLOAT16 };

struct Matrix {
  const void* data;
  int64_t strides[2];
};

/// Whether a matrix of 16-bit numbers can be read 16 bytes at a time: columns side by side, rows apart, each at a multiple of 16 bytes.
inline bool lies_by_row(const Matrix& matrix, int64_t rows, int64_t columns) {
  const bool apart = rows <= 1 || (matrix.strides[0] % 8 == 0 && matrix.strides[0] >= columns), together = columns <= 1 || matrix.strides[1] == 1;
  return (apart && together && reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0) || rows * columns == 0;
}

/// The same of its columns, as GPT-2's Conv1D keeps a weight [N, K]; not where it lies by row, too.
inline bool lies_by_column(const Matrix& matrix, int64_t rows, int64_t columns) {
  return !lies_by_row(matrix, rows, columns) && lies_by_row({matrix.data, {matrix.strides[1], matrix.strides[0]}}, columns, rows);
}

}  // namespace fastlora

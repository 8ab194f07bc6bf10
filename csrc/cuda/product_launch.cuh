// How the products with the frozen weight and the thin products beside them are launched, whosever adapters they are of, and what is made ready
// for them and of their results.
#pragma once

#include <algorithm>
#include <string>

#include "product_sm80.cuh"
#include "product_sm90.cuh"

namespace fastlora {

constexpr int BLOCK = 256;  // threads of the kernels that only move numbers
// Places a part of dA and dB, unless there would be more than PARTS: of many ranks, whose tiles have more columns, fewer.
constexpr int least_span(int R) { return R <= 16 ? 1024 : 512; }
constexpr int PARTS = 64;

inline int span_of(int M, int R) { return std::max(least_span(R), round_up(divide_up(M, PARTS), sm90::HEIGHT)); }

/// A matrix rounded, and padded with zeros to [to_rows, to_columns], eight columns at a time: `to` and its rows are at multiples of 16 bytes.
template <class T>
struct Rounding {
  const void* from;
  bool wide;  // from float32
  int64_t rows, columns, row_stride, column_stride;
  T* to;
  int64_t to_rows, to_columns, to_stride;

  template <class From>
  __device__ Eight read(int64_t row, int64_t column) const {
    const From* const first = static_cast<const From*>(from) + row * row_stride + column * column_stride;
    float value[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = row < rows && column + i < columns ? static_cast<float>(first[i * column_stride]) : 0.f;
    return {pack<T>(value[0], value[1]), pack<T>(value[2], value[3]), pack<T>(value[4], value[5]), pack<T>(value[6], value[7])};
  }
};

/// By the blocks of gridDim.x.
template <class T>
__device__ void round(const Rounding<T>& matrix) {
  const int64_t eights = matrix.to_columns / 8;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(BLOCK) + threadIdx.x; i < matrix.to_rows * eights; i += gridDim.x * BLOCK) {
    const int64_t row = i / eights, column = i % eights * 8;
    Eight* const to = reinterpret_cast<Eight*>(matrix.to + row * matrix.to_stride + column);
    *to = matrix.wide ? matrix.template read<float>(row, column) : matrix.template read<T>(row, column);
  }
}

template <class T, class G, int RANK>
__global__ void __launch_bounds__(TEAM, AT_ONCE) side_kernel(const __grid_constant__ Sides<T, G> sides) {
  let_next_launch_begin();
  wait_for_launch_before();
  side_tile<T, RANK>(sides, blockIdx.x, shared_memory());
}

// The host launches the one or the other. A body compiled for another card than its own stops the card: nothing returns unwritten results.
template <class T, class G, bool BACK, bool ACROSS>
__global__ void __launch_bounds__(sm80::THREADS, 2) product_sm80_kernel(const __grid_constant__ Product<T, G> task) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  sm80::run<T, G, BACK, ACROSS>(task);
#else
  __trap();
#endif
}

template <class T, class G, bool BACK, bool ACROSS>
__global__ void __launch_bounds__(sm90::THREADS, 1) product_sm90_kernel(const __grid_constant__ sm90::Task<T, G> task) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(FASTLORA_EMULATED)
  sm90::run<T, G, BACK, ACROSS>(task);
#else
  __trap();
#endif
}

/// The thin products alone.
template <class T, class G>
void launch_sides(const Sides<T, G>& sides, cudaStream_t stream) {
  if (sides.tiles() == 0) return;
  const auto kernel = padded_rank(sides.R) == 16 ? side_kernel<T, G, 16> : side_kernel<T, G, RANKS>;
  launch_early(kernel, dim3(sides.tiles()), dim3(TEAM), QUEUE, stream, sides);
}

template <class T, class G, bool BACK, bool ACROSS>
std::string launch_on_sm90(const Product<T, G>& product, int device, int multiprocessors, cudaStream_t stream) {
  const int tiles = divide_up(product.M, sm90::HEIGHT) * divide_up(product.N, sm90::WIDTH);
  sm90::Task<T, G> task{{}, {}, {}, {}, product, tiles};
  // The driver's function that describes a matrix needs the card's context on this thread, on which autograd may not have run anything before.
  cudaSetDevice(device);
  const auto map = [](TensorMap& to, const T* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
    return describe(to, std::is_same_v<T, __nv_bfloat16>, matrix, rows, columns, rows > 1 ? stride : round_up(columns, 8), box_rows, 64);
  };
  const int M = product.M, N = product.N, depth = product.depth, padded = padded_rank(product.R), ranks = product.ranks;
  const bool mapped = map(task.x, product.x, M, depth, product.x_stride, sm90::HEIGHT) && map(task.p, product.p, M, padded, padded, sm90::HEIGHT) &&
                      map(task.w, product.w, ACROSS ? depth : N, ACROSS ? N : depth, product.w_stride, ACROSS ? 64 : sm90::WIDTH) &&
                      map(task.q, product.q, BACK ? ranks : N, BACK ? N : ranks, product.q_stride, BACK ? 64 : sm90::WIDTH);
  if (!mapped) return "the driver has no tensor map (cuTensorMapEncodeTiled) for x, weight, lora_a or lora_b";
  hear_of_waits();
  launch_early(product_sm90_kernel<T, G, BACK, ACROSS>, dim3(std::min(multiprocessors, tiles)), dim3(sm90::THREADS), sm90::SHARED, stream, task);
  return "";
}

/// The product, `first` that shrinks for it, and `last`, which reads what `first` has shrunk.
template <class T, class G, bool BACK, bool ACROSS>
std::string launch_products(const Product<T, G>& product, const Sides<T, G>& first, const Sides<T, G>& last, cudaStream_t stream) {
  int device = 0, major = 0, minor = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (major < 8) return "this card has compute capability " + std::to_string(major) + "." + std::to_string(minor) + ", expected 8.0 or newer";
  launch_sides(first, stream);
  if (major == 9 && minor == 0) {
    const std::string error = launch_on_sm90<T, G, BACK, ACROSS>(product, device, multiprocessors, stream);
    if (!error.empty()) return error;
  } else {
    const int tiles = divide_up(product.M, sm80::SIDE) * divide_up(product.N, sm80::SIDE);
    launch(product_sm80_kernel<T, G, BACK, ACROSS>, dim3(tiles), dim3(sm80::THREADS), sm80::SHARED, stream, product);
  }
  launch_sides(last, stream);
  return "";
}

/// The same; by_column: the frozen weight [N, K] lies column by column, as Conv1D keeps it, and not row by row.
template <class T, class G, bool BACK>
std::string launch_products(
    bool by_column, const Product<T, G>& product, const Sides<T, G>& first, const Sides<T, G>& last, cudaStream_t stream) {
  return (by_column == BACK ? launch_products<T, G, BACK, false> : launch_products<T, G, BACK, true>)(product, first, last, stream);
}

/// Pieces of the workspace, one after the other. Without a base it only counts.
struct Workspace {
  unsigned char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* const piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return piece;
  }
};

/// Blocks that move so many numbers, each more than one where they are many.
inline unsigned blocks_for(int64_t numbers) { return static_cast<unsigned>(std::min<int64_t>(divide_up(numbers, BLOCK), 1024)); }

/// What went wrong: what was found, and what CUDA says of the launches.
inline std::string all_of(const std::string& found) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return found;
  return (found.empty() ? "" : found + "; ") + "CUDA says: " + cudaGetErrorString(error);
}

}  // namespace fastlora

// What the products with the frozen weight share, on whichever card.
#pragma once

#include "skinny.cuh"

namespace fastlora {

/// y [M, N] = x [M, depth] w + p [M, R] q + bias, the rank step p q last. How w and q lie: forward (y = x Wᵀ), w is [N, depth] and q [N, R];
/// BACK (dx = dy W), w is [depth, N] and q [R, N]. Where keep is given, p q counts `factor` times where its bit is set, and not at all elsewhere.
template <class T>
struct Product {
  const T* x;
  int64_t x_stride;
  const T* w;
  int64_t w_stride;
  const T* p;  // rows of padded_rank(R)
  const T* q;
  int64_t q_stride;
  const T* bias;  // or null
  int64_t bias_stride;
  const uint8_t* keep;  // [M, 8 ceil(N / 64)], or null
  float factor;
  T* y;  // rows of N
  int M, N, depth, R;
};

constexpr int TILES_TOGETHER = 8;  // row-blocks whose tiles follow one another, so that they read a block of w while it is in the cache

struct Tile { int row, column; };  // the first ones

/// Tile `number` of ceil(M / height) * ceil(N / width): TILES_TOGETHER row-blocks at a time, down each block of columns.
__device__ inline Tile tile_of(int number, int M, int N, int height, int width) {
  const int rows = divide_up(M, height), columns = divide_up(N, width), first = number / (TILES_TOGETHER * columns) * TILES_TOGETHER;
  const int together = min(rows - first, TILES_TOGETHER), within = number - first * columns;
  return {(first + within % together) * height, within / together * width};
}

/// The bits of `keep` from `column` on, to the end of a group of 64, for rows some steps below `row`. None outside.
template <class T>
struct KeptRows {
  const uint8_t* at;
  int stride, rows, shift;

  __device__ KeptRows(const Product<T>& task, int row, int column)
      : stride(divide_up(task.N, 64) * 8), rows(column / 64 * 64 < task.N ? task.M - row : 0), shift(column % 64) {
    at = task.keep + static_cast<int64_t>(row) * stride + column / 64 * 8;
  }

  __device__ uint64_t bits(int below) const { return below < rows ? *reinterpret_cast<const uint64_t*>(at + below * stride) >> shift : 0; }
};

/// Two columns of a sum, those with bits `at` and `at + 1`, plus the rank step where the bits keep it.
__device__ inline void add_kept(float& first, float& second, float p0, float p1, uint64_t bits, int at, float factor) {
  const uint32_t pair = static_cast<uint32_t>(bits >> at);
  first += pair & 1 ? factor * p0 : 0.f;
  second += pair & 2 ? factor * p1 : 0.f;
}

/// The bias of a lane's columns among 32: 2 t and 2 t + 1 of each of four fragments. IS: whether there may be one.
template <class T, bool IS>
struct Bias {
  int column;
  float value[4][2] = {};

  __device__ Bias(const Product<T>& task, int column) : column(column) {
    if constexpr (IS) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int n = column + i / 2 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
        if (task.bias && n < task.N) value[i / 2][i % 2] = static_cast<float>(task.bias[n * task.bias_stride]);
      }
    }
  }
};

/// Writes one row's sums of four fragments, with the bias. Lane t of four holds columns 2 t and 2 t + 1 of each and trades them for one whole
/// fragment: eight columns, 16 bytes.
template <class T, bool IS>
__device__ inline void write_32(const Product<T>& task, int row, const Bias<T, IS>& bias, const float (&sum)[4][2]) {
  const int t = threadIdx.x % 4;
  uint32_t pair[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (IS) {
      pair[j] = pack<T>(sum[j][0] + bias.value[j][0], sum[j][1] + bias.value[j][1]);
    } else {
      pair[j] = pack<T>(sum[j][0], sum[j][1]);
    }
  }
  Eight mine = {};
#pragma unroll
  for (int r = 0; r < 4; ++r) {  // with lane t ^ r: its pair of fragment t for our pair of fragment t ^ r
    const int other = t ^ r;
    const uint32_t give = other < 2 ? (other ? pair[1] : pair[0]) : (other == 2 ? pair[2] : pair[3]);
    const uint32_t get = r ? __shfl_xor_sync(~0u, give, r) : give;
#pragma unroll
    for (int i = 0; i < 4; ++i) mine.pair[i] = r == 0 || i == other ? get : mine.pair[i];
  }
  const int first = bias.column + 8 * t;
  if (row >= task.M || first >= task.N) return;
  T* const to = task.y + static_cast<int64_t>(row) * task.N + first;
  if (task.N % 8 == 0) {
    *reinterpret_cast<Eight*>(to) = mine;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (first + i < task.N) reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(mine.pair[i / 2] >> 16 * (i % 2));
  }
}

}  // namespace fastlora

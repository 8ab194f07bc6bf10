// The product with the frozen weight on tensor cores as of sm_80: mma.sync on fragments that ldmatrix loads, from tiles that cp.async brings into
// a queue of stages. A block is four warps, each a quarter of the tile, 64 x 64.
#pragma once

#include <type_traits>

#include "product_epilogue.cuh"

namespace fastlora::sm80 {

constexpr int SIDE = 128;   // rows and columns of a tile
constexpr int DEPTH = 32;   // of a stage
constexpr int STAGES = 4;
constexpr int THREADS = 128;
constexpr int OPERAND = SIDE * DEPTH * 2;  // bytes of one operand of a stage
constexpr int SHARED = STAGES * 2 * OPERAND;

/// Where 16 bytes lie in a tile whose rows are 64 bytes, or 256: moved so that those of eight rows in one column are in different banks.
__device__ inline int narrow_place(int row, int chunk) { return row * 64 + ((chunk ^ row / 2) & 3) * 16; }
__device__ inline int wide_place(int row, int chunk) { return row * 256 + (chunk ^ row % 8) * 16; }

/// Where a thread's copies of an operand come from; it goes along the depth, and is then set on the rank step's operand.
template <class T>
struct Source {
  const T* at;      // of the thread's first copy
  int64_t stride;
  int rows, bytes;  // bytes: of a copy that are inside along the row

  /// A tile of SIDE rows by DEPTH columns, the depth: a copy every 32 rows.
  __device__ void load_narrow(unsigned char* tile, int depth) {
    const int row = threadIdx.x / 4, chunk = threadIdx.x % 4, inside = bytes_inside(depth - chunk * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      copy_async<16>(tile + narrow_place(row, chunk) + i * 32 * 64, at + i * 32 * stride, i * 32 < rows ? inside : 0);
    }
    at += DEPTH;
  }

  /// A tile of DEPTH rows, the depth, by SIDE columns: a copy every 8 rows.
  __device__ void load_wide(unsigned char* tile, int depth) {
    const int row = threadIdx.x / 16, chunk = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      copy_async<16>(tile + wide_place(row, chunk) + i * 8 * 256, at + i * 8 * stride, row + i * 8 < depth ? bytes : 0);
    }
    at += DEPTH * stride;
  }
};

/// `row`: the tile's first; a narrow tile's rows are the matrix's, a wide one's are the depth.
template <class T>
__device__ Source<T> narrow_source(const T* matrix, int64_t stride, int row, int rows) {
  const int first = row + static_cast<int>(threadIdx.x) / 4;
  return {matrix + first * stride + threadIdx.x % 4 * 8, stride, rows - first, 0};
}
template <class T>
__device__ Source<T> wide_source(const T* matrix, int64_t stride, int column, int columns) {
  const int first = column + static_cast<int>(threadIdx.x) % 16 * 8;
  return {matrix + threadIdx.x / 16 * stride + first, stride, 0, bytes_inside(columns - first)};
}

template <class T, class G, bool BACK, bool ACROSS>
__device__ void run(const Product<T, G>& task) {
  unsigned char* const stages = shared_memory();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int warp_row = warp / 2 * 64, warp_column = warp % 2 * 64;
  const Tile tile = tile_of(blockIdx.x, task.M, task.N, SIDE, SIDE);
  // Of w, then of q, and whether the one or the other lies across the depth.
  using Frozen = std::bool_constant<ACROSS>;
  using Rank = std::bool_constant<BACK>;
  const auto right_source = [&]<bool WIDE>(std::bool_constant<WIDE>, const T* matrix, int64_t stride, int depth) {
    if constexpr (WIDE) return wide_source(matrix + depth * stride, stride, tile.column, task.N);
    return narrow_source(matrix + depth, stride, tile.column, task.N);
  };
  Source<T> left = narrow_source(task.x, task.x_stride, tile.row, task.M), right = right_source(Frozen{}, task.w, task.w_stride, 0);
  int depth = task.depth;  // of the frozen weight, left to load
  RankSteps<G, BACK, DEPTH> ahead(task.groups, tile.row);
  const auto bring = [&]<bool WIDE>(std::bool_constant<WIDE>, unsigned char* stage, int depths) {
    left.load_narrow(stage, depths);
    if constexpr (WIDE) {
      right.load_wide(stage + OPERAND, depths);
    } else {
      right.load_narrow(stage + OPERAND, depths);
    }
  };
  const auto load = [&](int step) {
    unsigned char* const stage = stages + step % STAGES * 2 * OPERAND;
    if (depth > 0) {
      bring(Frozen{}, stage, depth);
      depth -= DEPTH;
    } else if (ahead.left()) {
      const RankStep rank = ahead.step();
      left = narrow_source(task.p + rank.p, padded_rank(task.R), tile.row, task.M);
      right = right_source(Rank{}, task.q, task.q_stride, rank.q);
      bring(Rank{}, stage, round_up(rank.depths, 16));
      ahead.next();
    }
    commit_copies();
  };
  // Brings a step's fragments into registers, 16 depths at a time, UNROLL of these together, and passes them on: left, and right by twos.
  const auto for_each_fragment = [&]<bool WIDE, int UNROLL>(std::bool_constant<WIDE>, int step, std::integral_constant<int, UNROLL>, auto use) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // everyone's copies of this step are there, and the step before is read
    load(step + STAGES - 1);
    const unsigned char *const left_tile = stages + step % STAGES * 2 * OPERAND, *const right_tile = left_tile + OPERAND;
#pragma unroll UNROLL
    for (int k = 0; k < DEPTH / 16; ++k) {
      uint32_t a[4][4], b[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) load_matrices(a[i], left_tile + narrow_place(warp_row + i * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (WIDE) {
          load_transposed(b[j], right_tile + wide_place(k * 16 + lane % 16, warp_column / 8 + j * 2 + lane / 16));
        } else {
          load_matrices(b[j], right_tile + narrow_place(warp_column + j * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
        }
      }
      use(a, b);
    }
  };
  float sum[4][8][4] = {};
  if (BACK && !G::MANY && task.adds) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int row = tile.row + warp_row + g + i / 16 * 16 + i % 2 * 8, column = tile.column + warp_column + t * 2 + i / 2 % 8 * 8;
      const float2 two = read_two(task, row, column);
      sum[i / 16][i / 2 % 8][i % 2 * 2] = two.x, sum[i / 16][i / 2 % 8][i % 2 * 2 + 1] = two.y;
    }
  }
  const auto add = [&](const uint32_t (&a)[4][4], const uint32_t (&b)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) multiply<T>(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  };

  for (int step = 0; step < STAGES - 1; ++step) load(step);
  const int frozen = divide_up(task.depth, DEPTH);
  int step = 0;
  for (; step < frozen; ++step) for_each_fragment(Frozen{}, step, std::integral_constant<int, 2>{}, add);
  for (RankSteps<G, BACK, DEPTH> steps(task.groups, tile.row); steps.left(); steps.next(), ++step) {
    const RankStep rank = steps.step();
    if ((!BACK && !G::MANY) || rank.alone) {
      for_each_fragment(Rank{}, step, std::integral_constant<int, 2>{}, add);
      continue;
    }
    for_each_fragment(Rank{}, step, std::integral_constant<int, 1>{}, [&](const uint32_t (&a)[4][4], const uint32_t (&b)[4][4]) {
      const KeptRows<T, G, BACK> kept(task, tile.row + warp_row + g, tile.column + warp_column + t * 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint64_t upper = kept.bits(rank, i * 16), lower = kept.bits(rank, i * 16 + 8);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float part[4] = {};
          multiply<T>(part, a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
          add_kept(sum[i][j][0], sum[i][j][1], part[0], part[1], upper, j * 8, rank.factor);
          add_kept(sum[i][j][2], sum[i][j][3], part[2], part[3], lower, j * 8, rank.factor);
        }
      }
    });
  }

  uint32_t thread = threadIdx.x;
  forget(thread);  // or where the sums belong keeps registers all along
  const int row = tile.row + static_cast<int>(thread / 64 * 64 + thread % 32 / 4);
  const int column = tile.column + static_cast<int>(thread / 32 % 2 * 64);
  write_sums<!BACK>(task, [&]<bool BIAS, bool WHOLE>(std::bool_constant<BIAS>, std::bool_constant<WHOLE>) {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const Bias<T, BIAS, WHOLE> bias(task, column + block * 32);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float part[4][2];
#pragma unroll
        for (int j = 0; j < 8; ++j) part[j / 2][j % 2] = sum[i / 2][block * 4 + j / 2][i % 2 * 2 + j % 2];
        write_32(task, row + i * 8, column + block * 32, bias, part);
      }
    }
  });
}

}  // namespace fastlora::sm80

// multi_lora's forward for few rows, as in decode.
//
//     multi_shrink_kernel   xa in parts of K, each block 16 places of one group; the mask drawn on the way and kept as bits
//     multi_linear_kernel   W from memory once: a block has some columns of y for up to 64 sorted places, the rank steps last
//
// The bound of decode is memory. 4096 x 4096, 32 rows, 8 adapters of rank 16: W 33.6 MB, the A and B that rows use 2.1 MB, x and y 0.5 MB, together
// 36.2 MB: 10.8 us at 3.35 TB/s, W alone 10.0 us. What follows from it:
//
//   - x is 0.26 MB, too much for one multiprocessor's memory beside what must be on its way, so every block brings it from the second-level cache.
//     With 64 columns a block that is 17 MB (34 MB for 64 rows), half of W's; with 32 it would be as much as W's. Up to 16 rows 32 columns do, and
//     4096 of them are a block for each of 128 multiprocessors. Fewer blocks than multiprocessors split K; the last to arrive adds up, in order.
//   - Each block keeps 32 to 56 KB of W on its way (128 of them 4 MB or more; 3.35 TB/s for a microsecond are 3.4 MB). Copies go to the lane that
//     multiplies them, 16 bytes at a time: the lanes' own columns are called the depths that the tensor core expects, and no barrier stands between.
//   - A is read once for every 16 rows of an adapter, B once a block, brought into the second-level cache while W streams.
//   - Two launches, not one whose blocks wait for flags: the second begins while the first runs (sm_90 and later) and waits for it where it needs xa,
//     10 us later; the 40 blocks of the first are done in the time of a few loads. Flags would have to be cleared by a launch before, or be memory
//     that outlives the call, which two graphs replayed at once would share; here the first launch clears the counters of the second. On sm_80
//     the two follow one another: some 3 us beside 20 us of W at 1.6 TB/s.
//
// None of these times is measured. More than 64 rows, which come here only where multi_lora.cu cannot take them, are tiles of 64: right, but slow.
#pragma once

#include "multi_lora.h"

#include <algorithm>
#include <type_traits>

#include "rows_by_adapter.cuh"

namespace fastlora {
namespace {

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int STEP = 128, CHUNK = 32;  // columns of K that a warp takes in turn, and at once
constexpr int TILE = 16;               // places, or ranks
constexpr int FEW = 32;                // adapters that go with a launch; more are written to the workspace first

/// An adapter where the caller has it.
struct StoredAdapter : Adapter {
  const void *a, *b;
  int64_t a_strides[2], b_strides[2];
  bool wide;                // float32
  bool a_packed, b_packed;  // can be read 16 bytes at a time, or 8
};

struct Adapters {
  StoredAdapter few[FEW];
  const StoredAdapter* many;  // all, where they are not few
  int count;

  __device__ const StoredAdapter& of(int group) const { return many ? many[group - 1] : few[group - 1]; }
};

struct Table {
  StoredAdapter part[FEW];
  StoredAdapter* to;
  int count;
};

__global__ void __launch_bounds__(FEW) multi_table_kernel(const __grid_constant__ Table table) {
  const int i = threadIdx.x;
  if (i < table.count) table.to[i] = table.part[i];
}

/// Eight numbers of a row from `column` on, zeros from `columns` on. The row lies side by side, at a multiple of 16 bytes.
template <class T>
__device__ Eight read_packed(const T* row, int column, int columns) {
  if (column + 8 <= columns) return *reinterpret_cast<const Eight*>(row + column);
  Eight numbers{};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (column + i < columns) numbers.pair[i / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(row)[column + i]) << 16 * (i % 2);
  }
  return numbers;
}

/// COUNT numbers with `stride` between them, rounded to T, of which only the first `left` are there.
template <class T, int COUNT>
__device__ void read_any(uint32_t (&pair)[COUNT / 2], const void* matrix, bool wide, int64_t at, int64_t stride, int left) {
  float value[COUNT] = {};
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (i >= left) continue;
    const int64_t from = at + i * stride;
    value[i] = wide ? static_cast<const float*>(matrix)[from] : static_cast<float>(static_cast<const T*>(matrix)[from]);
  }
#pragma unroll
  for (int i = 0; i < COUNT / 2; ++i) pair[i] = pack<T>(value[2 * i], value[2 * i + 1]);
}

// ---- xa

template <class T>
struct MultiShrink {
  const T* x;
  int64_t x_stride;
  float* sums;          // [parts, M, padded]: by place
  uint8_t* keep;        // or null
  const int64_t* seed;  // read where keep is given
  int K, span, padded;  // span: columns a part, a multiple of STEP
  unsigned* arrived;    // set to 0 for the kernel that follows
  int counters;
  RowsByAdapter groups;
  Adapters adapters;
};

struct Places {
  int group;  // 0: there is no such tile
  int64_t first, end;
};

/// Tile `tile` of all adapters' tiles of 16 places, each of one group. The whole warp asks.
__device__ Places places_of(const RowsByAdapter& groups, int64_t tile) {
  const int lane = threadIdx.x % 32;
  int64_t before = 0;
  for (int base = 1; base <= groups.count; base += 32) {
    const bool is = base + lane <= groups.count;
    const int64_t first = is ? groups.begin(base + lane) : 0, end = is ? groups.begin(base + lane + 1) : 0;
    const int64_t tiles = max(int64_t{0}, divide_up(end - first, TILE));
    int64_t last = tiles;
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(~0u, last, step);
      if (lane >= step) last += other;
    }
    last += before;
    const unsigned found = __ballot_sync(~0u, last > tile);
    if (found) {
      const int at = __ffs(static_cast<int>(found)) - 1;
      return {base + at, __shfl_sync(~0u, first + (tile - last + tiles) * TILE, at), __shfl_sync(~0u, end, at)};
    }
    before = __shfl_sync(~0u, last, 31);
  }
  return {};
}

/// Block (tile, part, ranks): 16 places, the columns of one part, 16 ranks. The warps share the columns.
template <class T>
__global__ void __launch_bounds__(THREADS, 4) multi_shrink_kernel(const __grid_constant__ MultiShrink<T> task) {
  let_next_launch_begin();
  const int thread = threadIdx.x, warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  const int64_t number = blockIdx.x + static_cast<int64_t>(gridDim.x) * (blockIdx.y + static_cast<int64_t>(gridDim.y) * blockIdx.z);
  for (int64_t i = number * THREADS + thread; i < task.counters; i += static_cast<int64_t>(gridDim.x) * gridDim.y * gridDim.z * THREADS) {
    task.arrived[i] = 0;
  }
  const Places places = places_of(task.groups, blockIdx.x);
  if (places.group == 0) return;
  const StoredAdapter& adapter = task.adapters.of(places.group);
  const int first_rank = blockIdx.z * TILE;
  if (first_rank >= adapter.R) return;

  int64_t row[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t place = places.first + g + half * 8;
    row[half] = place < places.end ? task.groups.row(place) : -1;
  }
  const int begin = blockIdx.y * task.span, end = min(begin + task.span, task.K);
  const bool draws = task.keep && adapter.threshold, writes = draws && first_rank == 0;
  const uint64_t seed = draws ? static_cast<uint64_t>(*task.seed) : 0;
  const int64_t calls = divide_up(task.K, 8), keep_stride = divide_up(task.K, 64) * 8;
  float sum[2][4] = {};
  const auto sweep = [&]<int UNROLL>(std::integral_constant<int, UNROLL>, auto read_a) {
    for (int step = begin + warp * STEP; step < end; step += WARPS * STEP) {
      Eight left[2][4], right[2][UNROLL];
      uint32_t kept[2] = {};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          left[half][c] = row[half] >= 0 ? read_packed(task.x + row[half] * task.x_stride, step + c * CHUNK + t * 8, task.K) : Eight{};
          if constexpr (UNROLL == 4) right[half][c] = read_a(first_rank + g + half * 8, step + c * CHUNK + t * 8);
        }
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (draws) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t bits = draw(seed, row[half] * calls + (step + c * CHUNK) / 8 + t, adapter.threshold);
            drop(left[half][c], bits);
            uint32_t word = bits << 8 * t;
            word |= __shfl_xor_sync(~0u, word, 1);
            word |= __shfl_xor_sync(~0u, word, 2);
            if (t == c) kept[half] = word;
          }
        }
        if constexpr (UNROLL == 1) {
#pragma unroll
          for (int half = 0; half < 2; ++half) right[half][0] = read_a(first_rank + g + half * 8, step + c * CHUNK + t * 8);
        }
        const Eight u = left[0][c], v = left[1][c];
        const uint32_t low[4] = {u.pair[0], v.pair[0], u.pair[1], v.pair[1]}, high[4] = {u.pair[2], v.pair[2], u.pair[3], v.pair[3]};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Eight& a = right[half][c % UNROLL];
          multiply<T>(sum[half], low, a.pair[0], a.pair[1]);
          multiply<T>(sum[half], high, a.pair[2], a.pair[3]);
        }
      }
      const int64_t byte = step / 8 + t * 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (writes && row[half] >= 0 && byte < keep_stride) *reinterpret_cast<uint32_t*>(task.keep + row[half] * keep_stride + byte) = kept[half];
      }
    }
  };
  if (adapter.a_packed) {
    sweep(std::integral_constant<int, 4>{}, [&](int r, int column) {
      return r < adapter.R ? read_packed(static_cast<const T*>(adapter.a) + r * adapter.a_strides[0], column, task.K) : Eight{};
    });
  } else {
    sweep(std::integral_constant<int, 1>{}, [&](int r, int column) {
      Eight numbers{};
      if (r < adapter.R) {
        read_any<T, 8>(
            numbers.pair, adapter.a, adapter.wide, r * adapter.a_strides[0] + column * adapter.a_strides[1], adapter.a_strides[1], task.K - column);
      }
      return numbers;
    });
  }

  float* const meeting = reinterpret_cast<float*>(shared_memory());  // [warps, 16 places, 16 ranks]
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) meeting[(warp * TILE + g + i / 2 * 8) * TILE + half * 8 + t * 2 + i % 2] = sum[half][i];
  }
  __syncthreads();
  for (int i = thread; i < TILE * TILE; i += THREADS) {
    const int64_t place = places.first + i / TILE;
    if (place >= places.end) continue;
    float total = 0;
    for (int from = 0; from < WARPS; ++from) total += meeting[from * TILE * TILE + i];
    const float factor = draws ? adapter.factor : 1.f;
    task.sums[(blockIdx.y * task.groups.M + place) * task.padded + first_rank + i % TILE] = factor * total;
  }
}

// ---- y

template <class T>
struct MultiLinear {
  const T* x;
  int64_t x_stride;
  const T* weight;
  int64_t weight_stride;
  const T* bias;  // or null
  int64_t bias_stride;
  const float* xa_sums;  // [parts, M, padded]: by place
  int parts, padded;
  T* y;
  float* xa;  // [M, R]
  int N, K, R;
  int splits, span;   // of K; span: a multiple of STEP
  float* sums;        // [tiles, splits, ROWS, COLUMNS], where there are splits
  unsigned* arrived;  // [tiles]
  RowsByAdapter groups;
  Adapters adapters;
};

/// A tile of y, and the queue of copies for it: 96 KB at most, which every card as of sm_80 has.
template <int ROWS_, int COLUMNS_>
struct Shape {
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, APART = COLUMNS + 4;  // APART: floats from row to row where the warps' sums meet
  static constexpr int PIECES = (ROWS + COLUMNS) / 8;                          // of 16 bytes, a thread and chunk
  static constexpr int STAGE = PIECES * THREADS * 16;
  static constexpr int STAGES = (96 << 10) / STAGE < 8 ? (96 << 10) / STAGE : 8;
  static constexpr int QUEUE = STAGES * STAGE;
  static constexpr int SHARED = QUEUE + ROWS * static_cast<int>(sizeof(int));
  static_assert(WARPS * ROWS * APART * 4 <= QUEUE);
};

/// Four ranks from r on of row n of B; zeros beyond.
template <class T>
__device__ uint2 read_ranks(const StoredAdapter& adapter, int64_t n, int r, int N) {
  if (n >= N || r >= adapter.R) return make_uint2(0, 0);
  const int64_t at = n * adapter.b_strides[0] + r * adapter.b_strides[1];
  if (adapter.b_packed) return *reinterpret_cast<const uint2*>(static_cast<const T*>(adapter.b) + at);
  uint32_t pair[2];
  read_any<T, 4>(pair, adapter.b, adapter.wide, at, adapter.b_strides[1], adapter.R - r);
  return make_uint2(pair[0], pair[1]);
}

/// xa of a place from rank r on, the parts in order.
__device__ inline float4 add_parts(const float* sums, int parts, int64_t apart) {
  float4 total = make_float4(0, 0, 0, 0);
  for (int part = 0; part < parts; ++part) {
    const float4 one = __ldcg(reinterpret_cast<const float4*>(sums + part * apart));
    total.x += one.x, total.y += one.y, total.z += one.z, total.w += one.w;
  }
  return total;
}

/// The queue of copies of a warp where W lies ACROSS, the numbers of 8 rows n side by side. The tensor core expects depths of rows, so ldmatrix turns
/// blocks of 8 x 8 round, which it reads by rows, of one depth each, from 16 bytes at any place. Depth k of a chunk is the one that the lanes' own columns
/// of x are called: number 2 t + i of block b stands for k = 8 t + 2 b + i. Eight rows of a block are in different banks.
template <int COLUMNS>
struct AcrossQueue {
  static constexpr int EIGHTS = COLUMNS / 8;  // of 16 bytes, a row of one depth

  static __device__ int depth(int lane, int piece) { return piece * (32 / EIGHTS) + lane / EIGHTS; }
  static __device__ int eight(int lane) { return lane % EIGHTS; }
  /// Where 16 bytes lie among the 32 * EIGHTS of a chunk.
  static __device__ int place(int depth, int eight) {
    const int row = depth / 8 * 2 + depth % 2;  // of block depth % 8 / 2
    return (depth % 8 / 2 * 8 + row) * EIGHTS + (eight ^ row * EIGHTS / 8 % EIGHTS);
  }
  /// Of the row of a block which the lane reads for load_transposed: blocks of 8 n, first and second, of 8 depths, `block` and the next.
  static __device__ int row(int lane, int block, int eight) {
    const int row = lane % 8;
    return place(row / 2 * 8 + (block + lane / 16) * 2 + row % 2, eight + lane / 8 % 2);
  }
};

template <class T, class S, bool ACROSS>
__global__ void __launch_bounds__(THREADS, 2) multi_linear_kernel(const __grid_constant__ MultiLinear<T> task) {
  constexpr int ROWS = S::ROWS, COLUMNS = S::COLUMNS, STAGES = S::STAGES;
  unsigned char* const queue = shared_memory();
  int* const group_of = reinterpret_cast<int*>(queue + S::QUEUE);  // of each place
  const RowsByAdapter& groups = task.groups;
  const int thread = threadIdx.x, warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  const int64_t row_tiles = divide_up(groups.M, ROWS), column_tiles = max(divide_up(task.N, COLUMNS), 1), tiles = row_tiles * column_tiles;
  const int64_t tile = blockIdx.x % tiles, first = tile % row_tiles * ROWS;
  const int split = static_cast<int>(blockIdx.x / tiles), column = static_cast<int>(tile / row_tiles) * COLUMNS;
  const int count = static_cast<int>(min(groups.M - first, static_cast<int64_t>(ROWS)));
  const int begin = split * task.span, end = min(begin + task.span, task.K);

  // The sums of a warp: all columns and places of the tile over every fourth step of K. Row n of W is row n % 16 of a fragment, a place a column.
  int rows[ROWS / 8];  // of x, -1: none
#pragma unroll
  for (int j = 0; j < ROWS / 8; ++j) rows[j] = j * 8 + g < count ? static_cast<int>(groups.row(first + j * 8 + g)) : -1;
  const int steps = max(0, static_cast<int>(divide_up(end - begin, STEP))), turns = (steps - warp + WARPS - 1) / WARPS * (STEP / CHUNK);
  const auto slot = [&](int turn, int piece) { return queue + (turn % STAGES * S::PIECES + piece) * THREADS * 16 + thread * 16; };
  // Where W lies ACROSS, 16 bytes of the warp's own part of what is W's in a stage.
  using Across = AcrossQueue<COLUMNS>;
  const int lane = thread % 32, its_column = column + Across::eight(lane) * 8;
  const T* const weight = ACROSS ? task.weight + Across::depth(lane, 0) * task.weight_stride + its_column
                                 : task.weight + (column + g) * task.weight_stride;
  const auto across = [&](int turn, int place) {
    return queue + (turn % STAGES * S::PIECES + place / 32) * THREADS * 16 + warp * 32 * 16 + place % 32 * 16;
  };
  const auto fetch = [&](int turn) {
    if (turn < turns) {
      const int chunk = begin + (turn / (STEP / CHUNK) * WARPS + warp) * STEP + turn % (STEP / CHUNK) * CHUNK;
      const int k = chunk + t * 8, bytes = bytes_inside(end - k);
      constexpr int UNROLL = ACROSS && ROWS == 64 ? 1 : COLUMNS / 8;  // where each copy's place would keep a register all along, and there is none
#pragma unroll UNROLL
      for (int i = 0; i < COLUMNS / 8; ++i) {
        if constexpr (ACROSS) {
          const int depth = Across::depth(lane, i);
          const T* const from = weight + (chunk + Across::depth(0, i)) * task.weight_stride;
          copy_async<16>(across(turn, Across::place(depth, Across::eight(lane))), from, chunk + depth < end ? bytes_inside(task.N - its_column) : 0);
        } else {
          copy_async<16>(slot(turn, i), weight + i * 8 * task.weight_stride + k, column + i * 8 + g < task.N ? bytes : 0);
        }
      }
#pragma unroll
      for (int j = 0; j < ROWS / 8; ++j) {
        copy_async<16>(slot(turn, COLUMNS / 8 + j), task.x + max(rows[j], 0) * task.x_stride + k, rows[j] >= 0 ? bytes : 0);
      }
    }
    commit_copies();
  };
  for (int turn = 0; turn < STAGES - 1; ++turn) fetch(turn);

  if (thread < count) group_of[thread] = groups.of(first + thread);
  __syncthreads();
  const bool adapts = split == task.splits - 1;  // this block adds the rank steps
  /// Every adapter of the tile's places, and which places: use(adapter, from, to).
  const auto for_each_adapter = [&](auto use) {
    for (int from = 0, to; from < count; from = to) {
      const int group = group_of[from];
      to = from + 1;
      while (to < count && group_of[to] == group) ++to;
      if (groups.adapts(group)) use(task.adapters.of(group), from, to);
    }
  };
  if (adapts) {
    for_each_adapter([&](const StoredAdapter& adapter, int, int) {
      const int64_t n = column + thread;
      if (adapter.b_packed && thread < COLUMNS && n < task.N) {
        for (int r = 0; r < adapter.R; r += 64) prefetch(static_cast<const T*>(adapter.b) + n * adapter.b_strides[0] + r);
      }
    });
  }

  float sum[COLUMNS / 16][ROWS / 8][4] = {};
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    wait_copies<STAGES - 2>();
    if constexpr (ACROSS) __syncwarp();  // the other lanes' copies are there, too, and they have read what is filled next
    fetch(turn + STAGES - 1);
    constexpr int TOGETHER = ROWS < 32 ? ROWS / 8 : 4;  // of x in registers at once
#pragma unroll
    for (int j = 0; j < ROWS / 8; j += TOGETHER) {
      Eight right[TOGETHER];
#pragma unroll
      for (int k = 0; k < TOGETHER; ++k) right[k] = *reinterpret_cast<const Eight*>(slot(turn, COLUMNS / 8 + j + k));
#pragma unroll
      for (int i = 0; i < COLUMNS / 16; ++i) {
        uint32_t low[4], high[4];
        if constexpr (ACROSS) {
          load_transposed(low, across(turn, Across::row(lane, 0, 2 * i)));
          load_transposed(high, across(turn, Across::row(lane, 2, 2 * i)));
        } else {
          const Eight u = *reinterpret_cast<const Eight*>(slot(turn, 2 * i)), v = *reinterpret_cast<const Eight*>(slot(turn, 2 * i + 1));
          low[0] = u.pair[0], low[1] = v.pair[0], low[2] = u.pair[1], low[3] = v.pair[1];
          high[0] = u.pair[2], high[1] = v.pair[2], high[2] = u.pair[3], high[3] = v.pair[3];
        }
#pragma unroll
        for (int k = 0; k < TOGETHER; ++k) {
          multiply<T>(sum[i][j + k], low, right[k].pair[0], right[k].pair[1]);
          multiply<T>(sum[i][j + k], high, right[k].pair[2], right[k].pair[3]);
        }
      }
    }
  }

  wait_for_launch_before();
  if (adapts) {
    const int64_t apart = groups.M * task.padded;
    int item = 0;  // 16 ranks of one adapter: a warp's
    for_each_adapter([&](const StoredAdapter& adapter, int from, int to) {
      for (int r = 0; r < adapter.R; r += TILE) {
        if (item++ % WARPS != warp) continue;
#pragma unroll
        for (int j = 0; j < ROWS / 8; ++j) {
          if (j * 8 >= to || j * 8 + 8 <= from) continue;
          const int place = j * 8 + g;
          float4 xa = make_float4(0, 0, 0, 0);
          if (place >= from && place < to) xa = add_parts(task.xa_sums + (first + place) * task.padded + r + t * 4, task.parts, apart);
          const uint32_t b0 = pack<T>(adapter.scale * xa.x, adapter.scale * xa.y), b1 = pack<T>(adapter.scale * xa.z, adapter.scale * xa.w);
#pragma unroll
          for (int i = 0; i < COLUMNS / 16; ++i) {
            const uint2 u = read_ranks<T>(adapter, column + i * 16 + g, r + t * 4, task.N);
            const uint2 v = read_ranks<T>(adapter, column + i * 16 + g + 8, r + t * 4, task.N);
            const uint32_t a[4] = {u.x, v.x, u.y, v.y};
            float part[4] = {};
            multiply<T>(part, a, b0, b1);
#pragma unroll
            for (int k = 0; k < 4; ++k) {  // of this adapter's places only: infinity times another's zero is no zero
              const int at = j * 8 + t * 2 + k % 2;
              sum[i][j][k] += at >= from && at < to ? part[k] : 0.f;
            }
          }
        }
      }
    });
    for (int64_t i = tile / row_tiles * THREADS + thread; i < static_cast<int64_t>(count) * task.R; i += column_tiles * THREADS) {
      const int place = static_cast<int>(i / task.R), r = static_cast<int>(i % task.R), group = group_of[place];
      const int64_t row = groups.row(first + place);
      const int parts = groups.adapts(group) && r < task.adapters.of(group).R ? task.parts : 0;
      float total = 0;
      for (int part = 0; part < parts; ++part) total += __ldcg(task.xa_sums + part * apart + (first + place) * task.padded + r);
      if (row >= 0) task.xa[row * task.R + r] = total;
    }
  }

  __syncthreads();  // the queue becomes the place where the warps' sums meet
  float* const meeting = reinterpret_cast<float*>(queue);  // [warps, ROWS, APART]
#pragma unroll
  for (int i = 0; i < COLUMNS / 16; ++i) {
#pragma unroll
    for (int j = 0; j < ROWS / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) meeting[(warp * ROWS + j * 8 + t * 2 + k % 2) * S::APART + i * 16 + g + k / 2 * 8] = sum[i][j][k];
    }
  }
  __syncthreads();
  const auto met = [&](int i) {
    float total = 0;
    for (int from = 0; from < WARPS; ++from) total += meeting[(from * ROWS + i / COLUMNS) * S::APART + i % COLUMNS];
    return total;
  };
  float* const sums = task.sums + tile * task.splits * ROWS * COLUMNS;
  if (task.splits > 1) {
    for (int i = thread; i < ROWS * COLUMNS; i += THREADS) sums[split * ROWS * COLUMNS + i] = met(i);
    __threadfence();
    __syncthreads();
    const bool last = thread == 0 && atomicAdd(task.arrived + tile, 1u) == task.splits - 1u;
    if (!__syncthreads_or(last)) return;
    __threadfence();
  }
  const int64_t valid = groups.begin(groups.count + 1) - first;
  for (int i = thread; i < count * COLUMNS; i += THREADS) {
    const int place = i / COLUMNS, n = column + i % COLUMNS;
    const int64_t row = groups.row(first + place);
    if (row < 0 || n >= task.N) continue;
    float total = 0;
    if (task.splits > 1) {
      for (int from = 0; from < task.splits; ++from) total += __ldcg(sums + from * ROWS * COLUMNS + i);
    } else {
      total = met(i);
    }
    if (task.bias) total += static_cast<float>(task.bias[n * task.bias_stride]);
    if (place >= valid) total = __uint_as_float(0x7FC00000);  // NaN: there is no such adapter
    reinterpret_cast<uint16_t*>(task.y)[row * task.N + n] = static_cast<uint16_t>(pack<T>(total, 0));
  }
}

// ---- the call

/// How a call is cut up, and where its pieces lie in the workspace.
struct Plan {
  int rows, columns;    // of a tile of y
  int64_t tiles;        // of y
  int splits, span;     // of K for y
  int parts, part;      // of K for xa: how many, and columns of each
  int padded;           // ranks
  int64_t sums, arrived, table, bytes;  // where they begin; xa's parts at 0

  explicit Plan(const MultiLora& layer)
      : rows(layer.M <= 8 ? 8 : layer.M <= 16 ? 16 : layer.M <= 32 ? 32 : 64), columns(rows <= 16 ? 32 : 64),
        tiles(std::max<int64_t>(divide_up(layer.M, rows) * divide_up(layer.N, columns), 1)), padded(static_cast<int>(round_up(layer.R, TILE))) {
    const auto cut = [&](int64_t most) {  // the columns of one of `most` pieces
      return static_cast<int>(std::max<int64_t>(round_up(divide_up(layer.K, std::max<int64_t>(most, 1)), STEP), STEP));
    };
    span = cut(std::min({processors() / tiles, divide_up(layer.K, WARPS * STEP), int64_t{8}}));
    splits = static_cast<int>(std::max<int64_t>(divide_up(layer.K, span), 1));
    part = cut(std::min<int64_t>(divide_up(layer.K, 1024), 8));
    parts = static_cast<int>(std::max<int64_t>(divide_up(layer.K, part), 1));
    sums = round_up(int64_t{4} * parts * layer.M * padded, 256);
    arrived = sums + (splits > 1 ? int64_t{4} * tiles * splits * rows * columns : 0);
    table = round_up(arrived + (splits > 1 ? 4 * tiles : 0), 256);
    bytes = table + (layer.S > FEW ? layer.S * sizeof(StoredAdapter) : 0);
  }
};

bool at_multiples(const void* matrix, const int64_t (&strides)[2], int numbers) {
  return strides[1] == 1 && strides[0] % numbers == 0 && reinterpret_cast<uintptr_t>(matrix) % (numbers * 2) == 0;
}

StoredAdapter adapter_of(const LoraAdapter& from, bool wide) {
  const int R = static_cast<int>(from.R);
  return {
      {0, 0, R, threshold_of(from.dropout_p), factor_of(from.dropout_p), static_cast<float>(from.scale)}, from.a, from.b,
      {from.a_strides[0], from.a_strides[1]}, {from.b_strides[0], from.b_strides[1]}, wide, !wide && at_multiples(from.a, from.a_strides, 8),
      !wide && from.R % 4 == 0 && at_multiples(from.b, from.b_strides, 4)};
}

Adapters adapters_of(const MultiLora& layer, StoredAdapter* table, cudaStream_t stream) {
  const bool wide = layer.adapter_dtype == Dtype::FLOAT32;
  Adapters adapters{{}, layer.S > FEW ? table : nullptr, static_cast<int>(layer.S)};
  for (int64_t begin = 0; begin < layer.S; begin += FEW) {
    const int count = static_cast<int>(std::min<int64_t>(layer.S - begin, FEW));
    StoredAdapter* const to = adapters.few;
    for (int i = 0; i < count; ++i) to[i] = adapter_of(layer.adapters[begin + i], wide);
    if (!adapters.many) break;
    Table part{{}, table + begin, count};
    std::copy(to, to + count, part.part);
    launch(multi_table_kernel, dim3(1), dim3(FEW), 0, stream, part);
  }
  return adapters;
}

template <class T, int ROWS, int COLUMNS>
void linear(const MultiLinear<T>& task, const Plan& plan, bool by_column, cudaStream_t stream) {
  using S = Shape<ROWS, COLUMNS>;
  const auto kernel = by_column ? multi_linear_kernel<T, S, true> : multi_linear_kernel<T, S, false>;
  launch_early(kernel, dim3(static_cast<unsigned>(plan.tiles * plan.splits)), dim3(THREADS), S::SHARED, stream, task);
}

template <class T>
void few_rows(const MultiLoraForward& given, cudaStream_t stream) {
  const MultiLora& layer = given.layer;
  const Plan plan(layer);
  unsigned char* const base = static_cast<unsigned char*>(given.workspace);
  float *const xa_sums = reinterpret_cast<float*>(base), *const sums = reinterpret_cast<float*>(base + plan.sums);
  unsigned* const arrived = reinterpret_cast<unsigned*>(base + plan.arrived);
  const RowsByAdapter groups{layer.order, layer.offsets, layer.M, static_cast<int>(layer.S)};
  const Adapters adapters = adapters_of(layer, reinterpret_cast<StoredAdapter*>(base + plan.table), stream);
  const T* const x = static_cast<const T*>(layer.x);
  const int N = static_cast<int>(layer.N), K = static_cast<int>(layer.K), R = static_cast<int>(layer.R);

  const unsigned tiles = static_cast<unsigned>(std::min(layer.M, layer.M / TILE + layer.S));
  const MultiShrink<T> shrink{
      x, layer.x_stride, xa_sums, given.keep, given.seed, K, plan.part, plan.padded, arrived,
      plan.splits > 1 ? static_cast<int>(plan.tiles) : 0, groups, adapters};
  const dim3 grid(tiles, plan.parts, plan.padded / TILE);
  launch(multi_shrink_kernel<T>, grid, dim3(THREADS), WARPS * TILE * TILE * sizeof(float), stream, shrink);

  const MultiLinear<T> task{
      x, layer.x_stride, static_cast<const T*>(layer.weight), layer.weight_stride, static_cast<const T*>(given.bias), given.bias_stride,
      xa_sums, plan.parts, plan.padded, static_cast<T*>(given.y), given.xa, N, K, R, plan.splits, plan.span, sums, arrived, groups, adapters};
  switch (plan.rows) {
    case 8: return linear<T, 8, 32>(task, plan, layer.by_column, stream);
    case 16: return linear<T, 16, 32>(task, plan, layer.by_column, stream);
    case 32: return linear<T, 32, 64>(task, plan, layer.by_column, stream);
    default: return linear<T, 64, 64>(task, plan, layer.by_column, stream);
  }
}

}  // namespace
}  // namespace fastlora

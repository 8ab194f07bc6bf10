// The two thin products of an adapter, each a tile by a team of three warps: x aᵀ with few columns, and pᵀ x with few rows.
//
// Both are bound by reading x, so x goes from memory to the lane that multiplies it, 16 bytes at a time, with hardly a barrier and no exchange: a
// sum may take its terms in any order, so a lane's own columns (or rows) are called the depths that the tensor core expects of it. Shared memory
// is a queue of each thread's own copies. Every sum has one order, whoever computes it.
#pragma once

#include <type_traits>

#include "ptx.cuh"

namespace fastlora {

constexpr int WARPS = 3;               // a team; on Hopper the fourth of its warpgroup brings tiles
constexpr int TEAM = 32 * WARPS;       // threads
constexpr int QUEUE = 16 * TEAM * 16;  // bytes of shared memory a team
constexpr int SHRINK_ROWS = 16;        // of a tile of x aᵀ
constexpr int SHRINK_STEP = 128;       // columns of x that a warp takes at a time; the rows of `a` are padded with zeros to a multiple of it
constexpr int GRAD_COLUMNS = 64;       // of a tile of pᵀ x
constexpr int GRAD_STEP = 16 * WARPS;  // rows of x that a team takes at a time
constexpr int RANKS = 16 * WARPS;      // at most in one tile; beyond, x is read again

template <class I>
constexpr __host__ __device__ I divide_up(I a, std::type_identity_t<I> b) { return (a + b - 1) / b; }
template <class I>
constexpr __host__ __device__ I round_up(I a, std::type_identity_t<I> b) { return divide_up(a, b) * b; }
/// The ranks of a tile where R is the largest rank, which those of each adapter are padded with zeros to a multiple of.
constexpr __host__ __device__ int ranks_a_pass(int R) { return R <= 16 ? 16 : RANKS; }
constexpr __host__ __device__ int padded_rank(int R) { return round_up(R, ranks_a_pass(R)); }

/// The 16-bit number below which a half-word drops its element, and what a kept one is multiplied by; as in fastlora/reference.py.
inline uint32_t threshold_of(double p) { return static_cast<uint32_t>(65536 * p + 0.5); }
inline float factor_of(double p) {
  const uint32_t kept = 65536 - threshold_of(p);
  return kept ? static_cast<float>(65536.0 / kept) : 0.f;
}

/// Eight decisions of fastlora/reference.py::keep_mask, bit j for column 8 * eight + j. counter = row * ceil(columns / 8) + eight.
__device__ inline uint32_t draw(uint64_t seed, uint64_t counter, uint32_t threshold) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  forget(k0), forget(k1);  // or the keys of all rounds stay in registers from call to call
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint32_t words[4] = {c0, c1, c2, c3};
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bits |= static_cast<uint32_t>((words[i] & 0xFFFF) >= threshold) << (2 * i);
    bits |= static_cast<uint32_t>((words[i] >> 16) >= threshold) << (2 * i + 1);
  }
  return bits;
}

/// Eight 16-bit numbers that lie side by side in memory.
struct alignas(16) Eight { uint32_t pair[4]; };

/// What is read of eight numbers of which only the first `left` are in the matrix.
__device__ inline int bytes_inside(int left) { return max(0, min(8, left)) * 2; }

/// Zeros where `bits` has them.
__device__ inline void drop(Eight& numbers, uint32_t bits) {
#pragma unroll
  for (int i = 0; i < 4; ++i) numbers.pair[i] &= (bits >> 2 * i & 1) * 0xFFFFu | (bits >> (2 * i + 1) & 1) * 0xFFFF0000u;
}

/// What the kernels must know of an adapter.
struct Adapter {
  int first, before;   // where its ranks begin among those of all adapters, each padded, and as they are
  int R;
  uint32_t threshold;  // of dropout; 0: nothing is dropped
  float factor, scale;
};

/// Some of an adapter's rows by their places, which are consecutive; the rows need not be.
struct Piece {
  int group, begin, end;  // places
  int padded;             // `begin` where each adapter's places begin at a multiple of SHRINK_ROWS
  int number;             // of this piece among those of its adapter
  int slot;               // of this piece among all that are not the first of their adapter
};

/// Whose the rows are: all one adapter's, group 1, each at its own place, as in lora_linear. What takes a G takes this or ManyAdapters (rows_by_adapter.cuh).
struct OneAdapter {
  static constexpr bool MANY = false;
  Adapter adapter;
  int M;

  /// Piece `number` of all adapters' pieces of `size` places.
  __device__ Piece piece(int number, int size) const { return {1, number * size, min(number * size + size, M), number * size, number, number - 1}; }
  /// The group's adapter.
  __device__ const Adapter& of(int) const { return adapter; }
  /// Whether it drops something, where keep is given at all.
  __device__ bool drops(const Adapter&) const { return true; }
  /// The row at a place of the piece; M or more: none.
  __device__ int row(const Piece&, int place) const { return place; }
  /// Keeps in mind, for the product, that the row is the group's.
  __device__ void note(int, int) const {}

  // Of the rows of a tile of the product, which begins with `row`; the whole warp asks.
  /// The next group after `group` that a row has, but for the base's own rows; 0: none.
  __device__ int after(int, int group) const { return group == 0; }
  /// Whether all rows are the group's.
  __device__ bool alone(int, int) const { return true; }
  /// Whether the group has an adapter: else its rows are NaN.
  __device__ bool exists(int) const { return true; }

  /// The rows at four places of a piece, looked up before they are asked for.
  struct FourRows {
    __device__ void look(const OneAdapter&, const Piece&, int) {}
    __device__ int row(int first, int i) const { return first + i; }
  };
};

/// out = factor * d(x) aᵀ, a tile of 16 places.
template <class T, class G>
struct Shrink {
  const T* x;  // [M, K]
  int64_t x_stride;
  const T* a;  // [padded ranks of all adapters, K], rows padded with zeros to a multiple of SHRINK_STEP
  int a_stride;
  float* out;           // [M, R] in float32, rows of out_stride, 0 beyond a row's own ranks; or null
  int64_t out_stride;
  T* rounded;           // [M, padded R]: scale * out, for the product that adds it
  T* transposed;        // [padded R, places]: the same, for the gradient; or null
  uint8_t* keep;        // [M, 8 ceil(K / 64)]: the mask drawn, or null: nothing is dropped
  const int64_t* seed;  // read where keep is given
  int M, K, R;          // R: the largest rank
  int places;           // a multiple of SHRINK_ROWS
  G groups;
};

/// Where shrink_tile leaves the rows of its tile's places, M or more where there is none, until the queue is filled again.
__device__ inline int* shrunk_rows(unsigned char* queue) { return reinterpret_cast<int*>(queue + QUEUE) - SHRINK_ROWS; }

/// DRAWS: whether `keep` may be given.
template <class T, int WIDTH, bool DRAWS, class G>
__device__ void shrink_tile(const Shrink<T, G>& task, int tile, int first_rank, unsigned char* queue, int barrier) {
  constexpr int EARLY = WIDTH == 16 ? 2 : 3;  // loads of `a` before the bits are drawn, which hides them
  const int thread = threadIdx.x % TEAM, warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  const Piece piece = task.groups.piece(tile, SHRINK_ROWS);
  const Adapter& adapter = task.groups.of(piece.group);
  const int steps = first_rank < adapter.R && piece.begin < piece.end ? divide_up(task.K, SHRINK_STEP) : 0;
  const int row[2] = {task.groups.row(piece, piece.begin + g), task.groups.row(piece, piece.begin + g + 8)};
  const T* const rows[2] = {task.x + row[0] * task.x_stride, task.x + row[1] * task.x_stride};
  const int columns[2] = {row[0] < task.M ? task.K : 0, row[1] < task.M ? task.K : 0};
  const bool draws = DRAWS && task.keep && task.groups.drops(adapter);
  const auto place = [&](int step, int i) { return queue + ((step / WARPS % 2 * 8 + i) * TEAM + thread) * 16; };
  const auto fetch = [&](int step) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int column = step * SHRINK_STEP + i / 2 * 32 + t * 8;
      if (step < steps) copy_async<16>(place(step, i), rows[i % 2] + column, bytes_inside(columns[i % 2] - column));
    }
    commit_copies();
  };
  const uint64_t seed = draws ? static_cast<uint64_t>(*task.seed) : 0;
  const int64_t calls = divide_up(task.K, 8);
  const int keep_stride = divide_up(task.K, 64) * 8;
  const T* const a = task.a + static_cast<int64_t>(adapter.first + first_rank + g) * task.a_stride + t * 8;
  float sum[WIDTH / 8][4] = {};

  fetch(warp);
  fetch(warp + WARPS);
  for (int step = warp; step < steps; step += WARPS) {
    wait_copies<1>();
    uint32_t kept[2] = {};  // of both rows: 32 columns, those with number t of the four times 32
#pragma unroll 1
    for (int c = 0; c < 4; ++c) {
      const int column = step * SHRINK_STEP + c * 32;
      uint4 right[WIDTH / 8];
      const auto load = [&](int j) { right[j] = *reinterpret_cast<const uint4*>(a + j * 8 * task.a_stride + column); };
#pragma unroll
      for (int j = 0; j < EARLY; ++j) load(j);
      Eight left[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        left[half] = *reinterpret_cast<const Eight*>(place(step, 2 * c + half));
        if (!draws) continue;
        const uint32_t bits = draw(seed, row[half] * calls + column / 8 + t, adapter.threshold);
        drop(left[half], bits);
        uint32_t word = bits << 8 * t;
        word |= __shfl_xor_sync(~0u, word, 1);
        word |= __shfl_xor_sync(~0u, word, 2);
        if (t == c) kept[half] = word;
      }
#pragma unroll
      for (int j = EARLY; j < WIDTH / 8; ++j) load(j);
      const auto [u, v] = left;
      const uint32_t first[4] = {u.pair[0], v.pair[0], u.pair[1], v.pair[1]}, second[4] = {u.pair[2], v.pair[2], u.pair[3], v.pair[3]};
#pragma unroll
      for (int j = 0; j < WIDTH / 8; ++j) {
        multiply<T>(sum[j], first, right[j].x, right[j].y);
        multiply<T>(sum[j], second, right[j].z, right[j].w);
      }
    }
    fetch(step + 2 * WARPS);
    const int byte = step * (SHRINK_STEP / 8) + t * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!draws || first_rank || row[half] >= task.M || byte >= keep_stride) continue;
      *reinterpret_cast<uint32_t*>(task.keep + static_cast<int64_t>(row[half]) * keep_stride + byte) = kept[half];
    }
  }
  team_sync(barrier, TEAM);  // the queue becomes the place where the warps' sums meet

  float* const meeting = reinterpret_cast<float*>(queue);  // [WARPS, 16 places, WIDTH]
  int* const met_rows = shrunk_rows(queue);
  if (warp == 0 && t == 0) met_rows[g] = row[0], met_rows[g + 8] = row[1];
#pragma unroll
  for (int j = 0; j < WIDTH / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* const to = meeting + (warp * SHRINK_ROWS + g + half * 8) * WIDTH + j * 8 + t * 2;
      *reinterpret_cast<float2*>(to) = make_float2(sum[j][2 * half], sum[j][2 * half + 1]);
    }
  }
  team_sync(barrier, TEAM);
  if (thread < SHRINK_ROWS && met_rows[thread] < task.M) task.groups.note(met_rows[thread], piece.group);
  const Adapter& again = task.groups.of(piece.group);  // or it keeps registers all along
  const float factor = draws ? again.factor : 1.f;
  for (int i = thread; i < SHRINK_ROWS * WIDTH / 2; i += TEAM) {
    const int m = met_rows[i * 2 / WIDTH], r = first_rank + i * 2 % WIDTH;
    float total[2] = {};
    for (int from = 0; from < WARPS; ++from) {
      total[0] += meeting[from * SHRINK_ROWS * WIDTH + i * 2];
      total[1] += meeting[from * SHRINK_ROWS * WIDTH + i * 2 + 1];
    }
    const uint32_t pair = m < task.M ? pack<T>(again.scale * (factor * total[0]), again.scale * (factor * total[1])) : 0;
    if (task.transposed) {
      const int64_t place = tile * SHRINK_ROWS + i * 2 / WIDTH;
      uint16_t* const to = reinterpret_cast<uint16_t*>(task.transposed) + static_cast<int64_t>(r) * task.places + place;
      to[0] = static_cast<uint16_t>(pair);
      to[task.places] = static_cast<uint16_t>(pair >> 16);
    }
    if (m >= task.M) continue;
    *reinterpret_cast<uint32_t*>(task.rounded + static_cast<int64_t>(m) * padded_rank(task.R) + r) = pair;
    if (!task.out) continue;
    float* const out = task.out + m * task.out_stride + r;
    if (r < task.R) out[0] = r < again.R ? factor * total[0] : 0.f;
    if (r + 1 < task.R) out[1] = r + 1 < again.R ? factor * total[1] : 0.f;
  }
}

/// sums[part] = pᵀ d(x) over a part of an adapter's places, a tile of 64 columns; without the factor of d.
template <class T, class G>
struct Gradient {
  const T* x;  // [M, columns]
  int64_t x_stride;
  const uint8_t* keep;  // [M, 8 ceil(columns / 64)], or null: nothing is dropped
  const T* p;           // [padded R, places], transposed
  float* sums;          // [padded ranks of all adapters + slots * padded R, columns padded to GRAD_COLUMNS]: first parts, all other parts
  int M, span;          // span: places a part, a multiple of 16
  int columns, R;       // R: the largest rank
  int places, ranks;    // places: a multiple of SHRINK_ROWS; ranks: of all adapters, padded
  G groups;
};

/// Where the ranks of a part of an adapter begin in `sums`, by the part's Piece::number and slot.
__device__ inline int sums_row(const Adapter& adapter, int number, int slot, int ranks, int R) {
  return number == 0 ? adapter.first : ranks + slot * padded_rank(R);
}

/// Sixteen ranks a warp. With a WIDTH of 16 the warps divide the rows of x; with RANKS each has its own ranks, and all read what is in the queue.
/// MASKS: whether `keep` may be given.
template <class T, int WIDTH, bool MASKS, class G>
__device__ void gradient_tile(const Gradient<T, G>& task, int number, int block, int first_rank, unsigned char* queue, int barrier) {
  constexpr int STAGES = 3;
  constexpr bool ALONE = WIDTH == 16;  // each warp reads only what it has fetched itself
  const int thread = threadIdx.x % TEAM, warp = thread / 32, g = thread % 32 / 4, t = thread % 4, lane = thread % 32;
  const int column = block * GRAD_COLUMNS + g * 8, bytes = bytes_inside(task.columns - column);
  const Piece part = task.groups.piece(number, task.span);
  const Adapter& adapter = task.groups.of(part.group);
  if (first_rank >= adapter.R || part.begin >= part.end) return team_sync(barrier, TEAM);
  const int begin = part.begin, end = part.end, steps = divide_up(end - begin, GRAD_STEP), keep_stride = divide_up(task.columns, 64) * 8;
  uint32_t sums_begin = static_cast<uint32_t>(sums_row(adapter, part.number, part.slot, task.ranks, task.R));
  forget(sums_begin);  // or what it is made of keeps more registers all along
  const bool masks = MASKS && task.keep && task.groups.drops(adapter);
  const auto place = [&](int step, int i, int of_warp) { return queue + ((step % STAGES * 5 + i) * TEAM + of_warp * 32 + lane) * 16; };
  typename G::FourRows rows;  // of the step that is fetched next: their numbers may have to come from memory first
  const auto fetch = [&](int step) {
    const int first = begin + step * GRAD_STEP + warp * 16 + t * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (step >= steps) break;
      const int row = rows.row(first, i);
      const bool inside = first + i < end && row < task.M;
      copy_async<16>(place(step, i, warp), task.x + row * task.x_stride + column, inside ? bytes : 0);
      if (!masks) continue;
      const uint8_t* const four = task.keep + static_cast<int64_t>(row) * keep_stride + block * 8 + g / 4 * 4;  // the lane's byte among them
      copy_async<4>(place(step, 4, warp) + i * 4, four, inside ? 4 : 0);
    }
    commit_copies();
    rows.look(task.groups, part, first + GRAD_STEP);
  };
  const T* const p = task.p + static_cast<int64_t>(first_rank + (ALONE ? 0 : warp * 16) + g) * task.places + (part.padded - begin) + t * 4;
  float sum[8][4] = {};

  rows.look(task.groups, part, begin + warp * 16 + t * 4);
#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) fetch(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    if constexpr (!ALONE) team_sync(barrier, TEAM);  // all copies of this step are there, and the step before is read
    fetch(step + STAGES - 1);
#pragma unroll
    for (int share = 0; share < (ALONE ? 1 : WARPS); ++share) {
      const int of_warp = ALONE ? warp : share;
      const int row = begin + step * GRAD_STEP + of_warp * 16;
      if (row >= end) break;
      const uint2 low = *reinterpret_cast<const uint2*>(p + row), high = *reinterpret_cast<const uint2*>(p + row + int64_t{8} * task.places);
      const uint32_t left[4] = {low.x, high.x, low.y, high.y};
      Eight right[4];  // rows 4 t to 4 t + 3, columns 8 g to 8 g + 7
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        right[i] = *reinterpret_cast<const Eight*>(place(step, i, of_warp));
        if (masks) drop(right[i], *(place(step, 4, of_warp) + i * 4 + g % 4));
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t row0 = right[0].pair[j], row1 = right[1].pair[j], row2 = right[2].pair[j], row3 = right[3].pair[j];
        multiply<T>(sum[2 * j], left, low_halves(row0, row1), low_halves(row2, row3));
        multiply<T>(sum[2 * j + 1], left, high_halves(row0, row1), high_halves(row2, row3));
      }
    }
  }
  if constexpr (ALONE) team_sync(barrier, TEAM);  // the queue becomes the place where the warps' sums meet

  // sum[j] holds ranks g and g + 8, columns 16 t + j and 16 t + 8 + j of the block.
  const int stride = round_up(task.columns, GRAD_COLUMNS);
  float* const sums = task.sums + (static_cast<int64_t>(sums_begin) + first_rank) * stride + block * GRAD_COLUMNS;
  float* const meeting = reinterpret_cast<float*>(queue);  // [WARPS, 16 ranks, 64 columns]
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // rank g or g + 8, the first or the last 8 columns
    float* const to = ALONE ? meeting + (warp * 16 + g + i / 2 * 8) * GRAD_COLUMNS : sums + (warp * 16 + g + i / 2 * 8) * stride;
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      *reinterpret_cast<float4*>(to + t * 16 + i % 2 * 8 + j) = make_float4(sum[j][i], sum[j + 1][i], sum[j + 2][i], sum[j + 3][i]);
    }
  }
  if constexpr (ALONE) {
    team_sync(barrier, TEAM);
    for (int i = thread; i < 16 * GRAD_COLUMNS; i += TEAM) {
      float total = 0;
      for (int from = 0; from < WARPS; ++from) total += meeting[from * 16 * GRAD_COLUMNS + i];
      sums[i / GRAD_COLUMNS * stride + i % GRAD_COLUMNS] = total;
    }
  }
}

/// Tiles of both products in the order in which they are to be taken, by turns `shrinks_a_turn` of the one and `grads_a_turn` of the other: where
/// both read the same x, what one has read is in the second-level cache for the other.
template <class T, class G>
struct Sides {
  Shrink<T, G> shrink{};
  Gradient<T, G> gradient{};
  int shrinks = 0, shrinks_a_turn = 0, grads = 0, grads_a_turn = 0;  // tiles
  int blocks = 1;                                                   // of columns, a tile each, which follow one another
  int R, passes;                                                    // the largest rank; of ranks

  explicit Sides(int R) : R(R), passes(padded_rank(R) / ranks_a_pass(R)) {}
  void take(const Shrink<T, G>& task, int tiles, int a_turn) { shrink = task, shrinks = tiles, shrinks_a_turn = a_turn; }
  void take(const Gradient<T, G>& task, int parts, int parts_a_turn) {
    gradient = task, blocks = divide_up(task.columns, GRAD_COLUMNS), grads = parts * blocks, grads_a_turn = parts_a_turn * blocks;
  }

  __host__ __device__ int shrink_tiles() const { return shrinks * passes; }
  __host__ __device__ int tiles() const { return (shrinks + grads) * passes; }
};

/// What a launch may be asked for: the less, the fewer registers.
enum Kinds { SHRINKS = 1, GRADS = 2, DROPS = 4 };

/// Computes tile `number`. Whether it has shrunk rows. The team meets within it, and must meet again before the queue is filled for another.
template <class T, int WIDTH, int KINDS, class G>
__device__ bool side_tile(const Sides<T, G>& sides, int number, unsigned char* queue, int barrier) {
  const int first_rank = number % sides.passes * WIDTH, all = number / sides.passes;
  const int shrinks_a_turn = KINDS & SHRINKS ? sides.shrinks_a_turn : 0, grads_a_turn = KINDS & GRADS ? sides.grads_a_turn : 0;
  const int turn = all / (shrinks_a_turn + grads_a_turn), within = all % (shrinks_a_turn + grads_a_turn);
  const int shrinks = shrinks_a_turn ? min(shrinks_a_turn, sides.shrinks - turn * shrinks_a_turn) : 0;
  if constexpr (KINDS & GRADS) {
    if (within >= shrinks) {
      const int gradient = turn * grads_a_turn + within - shrinks;
      gradient_tile<T, WIDTH, (KINDS & DROPS) != 0>(
          sides.gradient, gradient / sides.blocks, gradient % sides.blocks, first_rank, queue, barrier);
      return false;
    }
  }
  if constexpr (KINDS & SHRINKS) {
    shrink_tile<T, WIDTH, (KINDS & DROPS) != 0>(sides.shrink, turn * shrinks_a_turn + within, first_rank, queue, barrier);
  }
  return true;
}

}  // namespace fastlora

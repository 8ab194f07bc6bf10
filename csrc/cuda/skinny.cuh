// The two thin products of an adapter, a block of eight warps each tile: x aᵀ with few columns, and pᵀ x with few rows.
//
// Both are bound by reading x, so x goes from memory to the lanes that multiply it, up to 16 bytes at a time, and nothing is exchanged: a sum may
// take its terms in any order, so a lane's own columns (or rows) are called the depths that the tensor core expects of it. Shared memory is a queue
// of copies. Where there are up to 16 ranks a warp reads its own only, hardly with a barrier; where there are more, the warps divide what they
// compute and read the same, a barrier a step. Every sum has one order, whoever computes it. Two blocks a multiprocessor, 16 warps: with fewer, what
// an instruction waits for the one before shows.
//
// They are launches of their own. Beside the product, on the same multiprocessors, they had been slower (an H200, 2026-11-29): a product of one warp
// (mma.sync) waits some 360 cycles for tensor cores that warpgroups' products (wgmma) keep busy, however little it asks of them.
#pragma once

#include <type_traits>

#include "ptx.cuh"

namespace fastlora {

constexpr int WARPS = 8;           // of a block
constexpr int TEAM = 32 * WARPS;   // threads
constexpr int AT_ONCE = 2;         // blocks on a multiprocessor
constexpr int QUEUE = 96 << 10;    // bytes of a block's shared memory
constexpr int RANKS = 64;          // at most in one tile
constexpr int PLACES = 32;         // an adapter's places begin at a multiple of these

template <class I>
constexpr __host__ __device__ I divide_up(I a, std::type_identity_t<I> b) { return (a + b - 1) / b; }
template <class I>
constexpr __host__ __device__ I round_up(I a, std::type_identity_t<I> b) { return divide_up(a, b) * b; }
/// The ranks of a tile where R is the largest rank, which those of each adapter are padded with zeros to a multiple of.
constexpr __host__ __device__ int ranks_a_pass(int R) { return R <= 16 ? 16 : RANKS; }
constexpr __host__ __device__ int padded_rank(int R) { return round_up(R, ranks_a_pass(R)); }

// Tiles by their ranks, 16 or RANKS. Both matrices come from the second-level cache for each tile anew, whichever tile brings them there: of 16 ranks
// `a` is half as much as x, of 64 ranks twice. Beyond 64 ranks x is read again, too, by the next tile: of 128 that is x twice and `a` four times x,
// less than a tile of 128 ranks and 16 rows would read, x and eight times x.
constexpr int SHRINK_ROWS = 32;                                                               // of a tile of x aᵀ
constexpr __host__ __device__ int shrink_columns(int ranks) { return ranks == 16 ? 512 : 256; }  // of x, that a block takes at a time
constexpr __host__ __device__ int grad_columns(int ranks) { return ranks == 16 ? 64 : 256; }    // of a tile of pᵀ x
static_assert(PLACES % SHRINK_ROWS == 0);
/// To what the rows of `a`, of so many columns, are padded with zeros.
constexpr __host__ __device__ int a_columns(int64_t columns, int R) { return static_cast<int>(round_up(columns, shrink_columns(ranks_a_pass(R)))); }

/// The same number. What is made of it is made anew in each round of a loop, or it would keep registers all along.
__device__ __forceinline__ int anew(int number) {
  uint32_t same = static_cast<uint32_t>(number);
  forget(same);
  return static_cast<int>(same);
}

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

/// 16-bit numbers that lie side by side in memory.
template <int COUNT>
struct alignas(COUNT * 2) Numbers { uint32_t pair[COUNT / 2]; };
using Eight = Numbers<8>;

/// What is read of COUNT numbers of which only the first `left` are in the matrix.
template <int COUNT = 8>
__device__ inline int bytes_inside(int left) { return max(0, min(COUNT, left)) * 2; }

/// Zeros where `bits` has them.
template <int COUNT>
__device__ inline void drop(Numbers<COUNT>& numbers, uint32_t bits) {
#pragma unroll
  for (int i = 0; i < COUNT / 4; ++i) {
    const uint32_t signs = (bits >> 4 * i & 15) * 0x10204080u;  // four bits, each the sign of a byte
    numbers.pair[2 * i] &= from_signs<0x9988>(signs), numbers.pair[2 * i + 1] &= from_signs<0xBBAA>(signs);
  }
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
  int padded;             // `begin` where each adapter's places begin at a multiple of PLACES
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
};

/// out = factor * d(x) aᵀ, a tile of SHRINK_ROWS places.
template <class T, class G>
struct Shrink {
  const T* x;  // [M, K]
  int64_t x_stride;
  const T* a;  // [padded ranks of all adapters, K], rows padded with zeros, see a_columns
  int a_stride;
  float* out;           // [M, R] in float32, rows of out_stride, 0 beyond a row's own ranks; or null
  int64_t out_stride;
  T* rounded;           // [M, padded R]: scale * out, for the product that adds it
  T* transposed;        // [padded R, places]: the same, for the gradient; or null
  uint8_t* keep;        // [M, 8 ceil(K / 64)]: the mask drawn, or null: nothing is dropped
  const int64_t* seed;  // read where keep is given
  int M, K, R;          // R: the largest rank
  int places;           // a multiple of PLACES
  G groups;
};

/// With a WIDTH of 16 each warp takes columns of its own, and the sums meet; with RANKS each brings a share of the columns for all, and takes eight
/// of the ranks.
template <class T, int WIDTH, class G>
__device__ void shrink_tile(const Shrink<T, G>& task, int tile, int first_rank, unsigned char* queue) {
  constexpr bool MEET = WIDTH == 16;
  constexpr int ROWS = SHRINK_ROWS, EIGHTS = ROWS / 8, SHARE = shrink_columns(WIDTH) / WARPS;  // columns that a warp brings in a step
  constexpr int COPIES = EIGHTS * SHARE / 32, STAGES = QUEUE / (COPIES * TEAM * 16);            // a lane's in a step
  constexpr int CHUNKS = MEET ? SHARE / 32 : WARPS, BLOCKS = MEET ? WIDTH / 8 : 1;              // of 32 columns, of 8 ranks, that a warp multiplies
  static_assert(MEET || (WARPS * 8 == WIDTH && SHARE == 32));
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, g = thread % 32 / 4, t = thread % 4, lane = thread % 32;
  const Piece piece = task.groups.piece(tile, ROWS);
  const Adapter& adapter = task.groups.of(piece.group);
  const int ranks = adapter.R - first_rank, steps = ranks > 0 && piece.begin < piece.end ? divide_up(task.K, WARPS * SHARE) : 0;
  int row[EIGHTS];
#pragma unroll
  for (int i = 0; i < EIGHTS; ++i) row[i] = task.groups.row(piece, piece.begin + i * 8 + g);
  const bool draws = task.keep && task.groups.drops(adapter);
  // Where 16 bytes lie: columns 8 of_t to 8 of_t + 7 of chunk c, 32 columns of the share that a warp has brought, of row 8 i + of_g. Those that lanes
  // copy, and read, at a time are in different banks.
  const auto place = [&](int step, int of_warp, int c, int i, int of_g, int of_t) {
    return queue + ((step % STAGES * COPIES + c * EIGHTS + i) * TEAM + of_warp * 32 + (of_g ^ c % 2) * 4 + of_t) * 16;
  };
  const auto share = [&](int step) { return (step * WARPS + warp) * SHARE; };  // its first column
  // Eight lanes after one another copy as much of a row as lies side by side: what is asked for in pieces costs the cache more.
  constexpr int SIDE_BY_SIDE = SHARE / 8, ROWS_A_COPY = 32 / SIDE_BY_SIDE;
  int copied[COPIES];  // rows, those that the lane multiplies where four lanes copy one
#pragma unroll
  for (int k = 0; k < COPIES; ++k) copied[k] = MEET ? task.groups.row(piece, piece.begin + k * ROWS_A_COPY + lane / SIDE_BY_SIDE) : row[k];
  const auto fetch = [&](int step) {
    const int column = share(step) + lane % SIDE_BY_SIDE * 8;
#pragma unroll
    for (int k = 0; k < COPIES; ++k) {
      const int within = k * ROWS_A_COPY + lane / SIDE_BY_SIDE, m = anew(copied[k]);
      const int bytes = m < task.M ? bytes_inside(task.K - column) : 0;
      unsigned char* const to = place(step, warp, lane % SIDE_BY_SIDE / 4, within / 8, within % 8, lane % 4);
      if (step < steps) copy_async<16>(to, task.x + m * task.x_stride + column, bytes);
    }
    commit_copies();
  };
  const uint64_t seed = draws ? static_cast<uint64_t>(*task.seed) : 0;
  const int64_t calls = divide_up(task.K, 8);
  const int keep_stride = divide_up(task.K, 64) * 8;
  // Zeros what is dropped of 32 columns of a lane's rows. The four lanes that have a row's have a word of keep, too, which one of them writes.
  const auto drop_chunk = [&](int column, Eight (&numbers)[EIGHTS]) {
    uint32_t kept = 0;
    int kept_row = task.M;
#pragma unroll
    for (int i = 0; i < EIGHTS; ++i) {
      const int m = anew(row[i]);
      uint32_t bits = draw(seed, m * calls + column / 8 + t, adapter.threshold);
      if (G::MANY && i % 2) forget(bits);  // two are drawn together: of four there are no registers for all that is between
      drop(numbers[i], bits);
      uint32_t word = bits << 8 * t;
      word |= __shfl_xor_sync(~0u, word, 1);
      word |= __shfl_xor_sync(~0u, word, 2);
      if (t == i) kept = word, kept_row = m;
    }
    if (first_rank || kept_row >= task.M || column / 8 >= keep_stride) return;
    *reinterpret_cast<uint32_t*>(task.keep + static_cast<int64_t>(kept_row) * keep_stride + column / 8) = kept;
  };
  const T* const a = task.a + static_cast<int64_t>(adapter.first + first_rank + g) * task.a_stride + t * 8;
  const auto block = [&](int i) { return (MEET ? i : warp) * 8; };  // its first rank
  uint4 right[CHUNKS][BLOCKS];  // parts of `a`, each asked for a step ahead
  const auto load = [&](int step, int c, int i) {
    const int column = (MEET ? share(step) : step * WARPS * SHARE) + c * 32;
    if (block(i) < min(WIDTH, ranks) && column < task.a_stride) {
      right[c][i] = *reinterpret_cast<const uint4*>(a + anew(block(i)) * task.a_stride + column);
    }
  };
  float sum[EIGHTS / 2][BLOCKS][4] = {};

#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) fetch(step);
#pragma unroll
  for (int k = 0; k < CHUNKS * BLOCKS; ++k) load(0, k / BLOCKS, k % BLOCKS);
  for (int step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    __syncwarp();  // what the warp has copied is there for this step, and the step before is read
    if constexpr (MEET) {
      fetch(step + STAGES - 1);
    } else {
      if (draws) {  // where it lies, for all warps
        Eight mine[EIGHTS];
#pragma unroll
        for (int i = 0; i < EIGHTS; ++i) mine[i] = *reinterpret_cast<const Eight*>(place(step, warp, 0, i, g, t));
        drop_chunk(share(step), mine);
#pragma unroll
        for (int i = 0; i < EIGHTS; ++i) *reinterpret_cast<Eight*>(place(step, warp, 0, i, g, t)) = mine[i];
      }
      __syncthreads();  // all shares of this step are there, and the step before is read
      fetch(step + STAGES - 1);
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      Eight left[EIGHTS];
#pragma unroll
      for (int i = 0; i < EIGHTS; ++i) left[i] = *reinterpret_cast<const Eight*>(place(step, MEET ? warp : c, MEET ? c : 0, i, g, t));
      if (MEET && draws) drop_chunk(share(step) + c * 32, left);
#pragma unroll
      for (int j = 0; j < BLOCKS; ++j) {
        if (block(j) >= min(WIDTH, ranks)) break;
        const auto [x, y, z, w] = right[c][j];
#pragma unroll
        for (int i = 0; i < EIGHTS / 2; ++i) {
          const Eight &u = left[2 * i], &v = left[2 * i + 1];
          const uint32_t first[4] = {u.pair[0], v.pair[0], u.pair[1], v.pair[1]}, second[4] = {u.pair[2], v.pair[2], u.pair[3], v.pair[3]};
          multiply<T>(sum[i][j], first, x, y);
          multiply<T>(sum[i][j], second, z, w);
        }
        load(step + 1, c, j);
      }
    }
  }
  __syncthreads();  // the queue becomes the place where the sums meet

  constexpr int SUMS = MEET ? WARPS : 1;                   // of each number
  float* const meeting = reinterpret_cast<float*>(queue);  // [SUMS, ROWS, WIDTH]
  int* const met_rows = reinterpret_cast<int*>(queue + QUEUE) - ROWS;
  static_assert(SUMS * ROWS * WIDTH * sizeof(float) <= QUEUE - ROWS * sizeof(int));
#pragma unroll
  for (int i = 0; i < EIGHTS; ++i) {
    if (warp == 0 && t == 0) met_rows[i * 8 + g] = row[i];
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      float* const to = meeting + ((MEET ? warp * ROWS : 0) + i * 8 + g) * WIDTH + block(j) + t * 2;
      *reinterpret_cast<float2*>(to) = make_float2(sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]);
    }
  }
  __syncthreads();
  if (thread < ROWS && met_rows[thread] < task.M) task.groups.note(met_rows[thread], piece.group);
  const Adapter& again = task.groups.of(piece.group);  // or it keeps registers all along
  const float factor = draws ? again.factor : 1.f;
  for (int i = thread; i < ROWS * WIDTH / 2; i += TEAM) {
    const int place = i * 2 / WIDTH, m = met_rows[place], r = first_rank + i * 2 % WIDTH;
    float total[2] = {};
    for (int from = 0; from < SUMS; ++from) {
      total[0] += meeting[from * ROWS * WIDTH + i * 2];
      total[1] += meeting[from * ROWS * WIDTH + i * 2 + 1];
    }
    const uint32_t pair = m < task.M ? pack<T>(again.scale * (factor * total[0]), again.scale * (factor * total[1])) : 0;
    if (task.transposed) {
      uint16_t* const to = reinterpret_cast<uint16_t*>(task.transposed) + static_cast<int64_t>(r) * task.places + piece.padded + place;
      to[0] = static_cast<uint16_t>(pair);
      to[task.places] = static_cast<uint16_t>(pair >> 16);
    }
    if (m >= task.M) continue;
    *reinterpret_cast<uint32_t*>(task.rounded + static_cast<int64_t>(m) * round_up(task.R, WIDTH) + r) = pair;
    if (!task.out) continue;
    float* const out = task.out + m * task.out_stride + r;
    if (r < task.R) out[0] = r < again.R ? factor * total[0] : 0.f;
    if (r + 1 < task.R) out[1] = r + 1 < again.R ? factor * total[1] : 0.f;
  }
}

/// sums[part] = pᵀ d(x) over a part of an adapter's places, a tile of grad_columns; without the factor of d.
template <class T, class G>
struct Gradient {
  const T* x;  // [M, columns]
  int64_t x_stride;
  const uint8_t* keep;  // [M, 8 ceil(columns / 64)], or null: nothing is dropped
  const T* p;           // [padded R, places], transposed
  float* sums;          // [padded ranks of all adapters + slots * padded R, sums_stride]: first parts, all other parts
  int M, span;          // span: places a part, a multiple of PLACES
  int columns, R;       // R: the largest rank
  int places, ranks;    // places: a multiple of PLACES; ranks: of all adapters, padded
  G groups;
};

/// Where the ranks of a part of an adapter begin in `sums`, by the part's Piece::number and slot.
__device__ inline int sums_row(const Adapter& adapter, int number, int slot, int ranks, int padded) {
  return number == 0 ? adapter.first : ranks + slot * padded;
}
/// From row to row of `sums`.
constexpr __host__ __device__ int64_t sums_stride(int64_t columns, int R) { return round_up(columns, grad_columns(ranks_a_pass(R))); }

/// With a WIDTH of 16 each warp takes rows of its own, and their sums meet; with RANKS it takes columns of its own, an eighth of the tile's, and all
/// read the same of p.
template <class T, int WIDTH, class G>
__device__ void gradient_tile(const Gradient<T, G>& task, int number, int block, int first_rank, unsigned char* queue) {
  constexpr bool MEET = WIDTH == 16;
  constexpr int COLUMNS = grad_columns(WIDTH), MINE = (MEET ? COLUMNS : COLUMNS / WARPS) / 8;  // of a tile; a lane's in a row
  constexpr int STEP = MEET ? 16 * WARPS : 16;                                                 // rows that the block takes at a time
  // Bytes of a step: four rows of each lane's; sixteen rows' bits, a warp's; sixteen rows of p, 512 bytes for sixteen ranks.
  constexpr int X = 4 * TEAM * MINE * 2, BITS = 16 * MINE, P = 512 * (MEET ? WARPS : WIDTH / 16);
  constexpr int STAGE = X + WARPS * BITS + P, STAGES = QUEUE / STAGE;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, g = thread % 32 / 4, t = thread % 4, lane = thread % 32;
  const int own = block * COLUMNS + (MEET ? 0 : warp * 8 * MINE);  // the first of the warp's columns
  const Piece part = task.groups.piece(number, task.span);
  const Adapter& adapter = task.groups.of(part.group);
  const int ranks = min(WIDTH, adapter.R - first_rank);
  if (ranks <= 0 || part.begin >= part.end) return;
  const int begin = part.begin, end = part.end, steps = divide_up(end - begin, STEP), keep_stride = divide_up(task.columns, 64) * 8;
  uint32_t sums_begin = static_cast<uint32_t>(sums_row(adapter, part.number, part.slot, task.ranks, round_up(task.R, WIDTH)));
  forget(sums_begin);  // or what it is made of keeps more registers all along
  const bool masks = task.keep && task.groups.drops(adapter);
  // Where 16 bytes lie, columns 8 c to 8 c + 7 of the warp's in row r of its sixteen: those that lanes copy, and read, at a time are in different banks.
  const auto x_place = [&](int step, int r, int c) {
    const int place = MINE == 8 ? r * 8 + (c + r / 4 * 2) % 8 : (r ^ r / 4 % 2) * 4 + (c + r / 8 * 2) % 4;
    return queue + step % STAGES * STAGE + (warp * 16 * MINE + place) * 16;
  };
  const auto bits_place = [&](int step) { return queue + step % STAGES * STAGE + X + warp * BITS; };
  const auto p_place = [&](int step, int i) { return queue + step % STAGES * STAGE + X + WARPS * BITS + (MEET ? warp : i) * 512; };
  const auto row_of = [&](int step) { return begin + step * STEP + (MEET ? warp * 16 : 0); };  // the first of sixteen
  const T* const p = task.p + static_cast<int64_t>(first_rank + lane / 2) * task.places + (part.padded - begin) + lane % 2 * 8;
  // A row of the warp's columns is MINE copies of x, which lanes after one another make, and of MINE bytes of bits, four of them a copy.
  constexpr int COPIES = MINE / 2, WORDS = MINE / 4;
  int rows[COPIES], bits_row;  // of the step that is fetched next: their numbers may have to come from memory first
  const auto look = [&](int first) {
    const auto row = [&](int place) { return place < end ? task.groups.row(part, place) : task.M; };
#pragma unroll
    for (int k = 0; k < COPIES; ++k) rows[k] = row(first + (k * 32 + lane) / MINE);
    bits_row = row(first + lane / WORDS);
  };
  const auto fetch = [&](int step) {
    const int first = anew(own), copied = first + lane % MINE * 8, bits_at = first / 8 + lane % WORDS * 4;
    const int bytes = bytes_inside(task.columns - copied);
#pragma unroll
    for (int k = 0; k < COPIES; ++k) {
      if (step >= steps) break;
      const int r = (k * 32 + lane) / MINE;
      copy_async<16>(x_place(step, r, lane % MINE), task.x + rows[k] * task.x_stride + copied, rows[k] < task.M ? bytes : 0);
    }
    if (masks && step < steps && lane < 16 * WORDS) {
      const bool inside = bits_row < task.M && bits_at < keep_stride;
      copy_async<4>(bits_place(step) + lane * 4, task.keep + (inside ? static_cast<int64_t>(bits_row) * keep_stride + bits_at : 0), inside ? 4 : 0);
    }
#pragma unroll
    for (int k = 0; k < divide_up(WIDTH / 16, WARPS); ++k) {
      const int i = MEET ? 0 : k * WARPS + warp;
      if (step >= steps || i * 16 >= ranks) break;
      const T* const sixteen = p + i * 16 * static_cast<int64_t>(task.places) + row_of(step);
      copy_async<16>(p_place(step, i) + lane * 16, sixteen, !MEET || row_of(step) < end ? 16 : 0);
    }
    commit_copies();
    look(row_of(step + 1));
  };
  float sum[WIDTH / 16][MINE][4] = {};

  look(row_of(0));
#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) fetch(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    if constexpr (MEET) {  // all of p is there for this step, and the step before is read
      __syncwarp();
    } else {
      __syncthreads();
    }
    fetch(step + STAGES - 1);
    if (MEET && row_of(step) >= end) break;
    Numbers<MINE> right[4];  // rows 4 t to 4 t + 3, columns MINE g to MINE g + MINE - 1
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      right[i] = *reinterpret_cast<const Numbers<MINE>*>(x_place(step, t * 4 + i, g * MINE / 8) + g * MINE % 8 * 2);
      if (masks) drop(right[i], bits_place(step)[(t * 4 + i) * MINE + g * MINE / 8] >> g * MINE % 8);
    }
#pragma unroll
    for (int i = 0; i < WIDTH / 16; ++i) {
      if (i * 16 >= ranks) break;
      const uint2* const fragment = reinterpret_cast<const uint2*>(p_place(step, i)) + lane;
      const uint2 low = fragment[0], high = fragment[32];  // ranks g and g + 8
      const uint32_t left[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
      for (int j = 0; j < MINE / 2; ++j) {
        const uint32_t row0 = right[0].pair[j], row1 = right[1].pair[j], row2 = right[2].pair[j], row3 = right[3].pair[j];
        multiply<T>(sum[i][2 * j], left, low_halves(row0, row1), low_halves(row2, row3));
        multiply<T>(sum[i][2 * j + 1], left, high_halves(row0, row1), high_halves(row2, row3));
      }
    }
  }
  if constexpr (MEET) __syncthreads();  // the queue becomes the place where the warps' sums meet

  // sum[i][j] holds ranks 16 i + g and 16 i + g + 8, columns 2 MINE t + j and 2 MINE t + MINE + j of the warp's.
  const int64_t stride = round_up(task.columns, COLUMNS);
  float* const sums = task.sums + (static_cast<int64_t>(sums_begin) + first_rank) * stride + own;
  float* const meeting = reinterpret_cast<float*>(queue) + warp * 16 * COLUMNS;  // [WARPS, 16 ranks, COLUMNS]
#pragma unroll
  for (int i = 0; i < WIDTH / 16 * 4; ++i) {  // of sixteen ranks, rank g or g + 8, the first or the last of the columns
    const int rank = i / 4 * 16 + i % 4 / 2 * 8 + g;
    if (i / 4 * 16 >= ranks) break;
    float* const to = (MEET ? meeting + rank * COLUMNS : sums + rank * stride) + t * 2 * MINE + i % 2 * MINE;
#pragma unroll
    for (int j = 0; j < MINE; j += 4) {
      *reinterpret_cast<float4*>(to + j) = make_float4(sum[i / 4][j][i % 4], sum[i / 4][j + 1][i % 4], sum[i / 4][j + 2][i % 4], sum[i / 4][j + 3][i % 4]);
    }
  }
  if constexpr (MEET) {
    __syncthreads();
    for (int i = thread; i < 16 * COLUMNS; i += TEAM) {
      float total = 0;
#pragma unroll
      for (int from = 0; from < WARPS; ++from) total += reinterpret_cast<const float*>(queue)[from * 16 * COLUMNS + i];
      sums[i / COLUMNS * stride + i % COLUMNS] = total;
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
    gradient = task, blocks = divide_up(task.columns, grad_columns(ranks_a_pass(R)));
    grads = parts * blocks, grads_a_turn = parts_a_turn * blocks;
  }

  __host__ __device__ int tiles() const { return (shrinks + grads) * passes; }
};

/// Computes tile `number`.
template <class T, int WIDTH, class G>
__device__ void side_tile(const Sides<T, G>& sides, int number, unsigned char* queue) {
  const int first_rank = number % sides.passes * WIDTH, all = number / sides.passes;
  const int turn = all / (sides.shrinks_a_turn + sides.grads_a_turn), within = all % (sides.shrinks_a_turn + sides.grads_a_turn);
  const int shrinks = max(0, min(sides.shrinks_a_turn, sides.shrinks - turn * sides.shrinks_a_turn));
  if (within >= shrinks) {
    const int gradient = turn * sides.grads_a_turn + within - shrinks;
    gradient_tile<T, WIDTH>(sides.gradient, gradient / sides.blocks, gradient % sides.blocks, first_rank, queue);
  } else {
    shrink_tile<T, WIDTH>(sides.shrink, turn * sides.shrinks_a_turn + within, first_rank, queue);
  }
}

}  // namespace fastlora

// The two thin products of an adapter, each a tile by a team of three warps: x aᵀ with few columns, and pᵀ x with few rows.
//
// Both are bound by reading x, so x goes from memory to the lanes that multiply it, up to 16 bytes at a time, and nothing is exchanged: a sum may
// take its terms in any order, so a lane's own columns (or rows) are called the depths that the tensor core expects of it. Shared memory is a queue
// of copies. Where there are up to 16 ranks a warp reads its own only, hardly with a barrier; where there are more, the warps divide what they
// compute and read the same, a barrier a step. Every sum has one order, whoever computes it.
#pragma once

#include <type_traits>

#include "ptx.cuh"

namespace fastlora {

constexpr int WARPS = 3;               // a team; on Hopper the fourth of its warpgroup brings tiles
constexpr int TEAM = 32 * WARPS;       // threads
constexpr int QUEUE = 18 * TEAM * 16;  // bytes of shared memory a team
constexpr int RANKS = 64;              // at most in one tile
constexpr int PLACES = 32;             // an adapter's places begin at a multiple of these

template <class I>
constexpr __host__ __device__ I divide_up(I a, std::type_identity_t<I> b) { return (a + b - 1) / b; }
template <class I>
constexpr __host__ __device__ I round_up(I a, std::type_identity_t<I> b) { return divide_up(a, b) * b; }
/// The ranks of a tile where R is the largest rank, which those of each adapter are padded with zeros to a multiple of.
constexpr __host__ __device__ int ranks_a_pass(int R) { return R <= 16 ? 16 : RANKS; }
constexpr __host__ __device__ int padded_rank(int R) { return round_up(R, ranks_a_pass(R)); }

// Tiles by their ranks, 16 or RANKS. Both matrices come from the second-level cache for each tile anew, whichever tile brings them there. Of 16 ranks
// and rows `a` is as much as x, of 64 ranks it would be four times as much, with 32 rows it is twice. Beyond 64 ranks x is read again, too, by the
// next tile: of 128 that is x twice and `a` four times x, less than a tile of 128 ranks and 16 rows would read, x and eight times x, and there
// are no registers for more.
constexpr __host__ __device__ int shrink_rows(int ranks) { return ranks == 16 ? 16 : 32; }      // of a tile of x aᵀ
constexpr __host__ __device__ int shrink_columns(int ranks) { return ranks == 16 ? 384 : 96; }  // of x, that a team takes at a time
constexpr __host__ __device__ int grad_columns(int ranks) { return ranks == 16 ? 64 : 48; }     // of a tile of pᵀ x
static_assert(PLACES % shrink_rows(16) == 0 && PLACES % shrink_rows(RANKS) == 0);
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
  for (int i = 0; i < COUNT / 2; ++i) numbers.pair[i] &= (bits >> 2 * i & 1) * 0xFFFFu | (bits >> (2 * i + 1) & 1) * 0xFFFF0000u;
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

  /// The rows at four places of a piece, looked up before they are asked for.
  struct FourRows {
    __device__ void look(const OneAdapter&, const Piece&, int) {}
    __device__ int row(int first, int i) const { return first + i; }
  };
};

/// out = factor * d(x) aᵀ, a tile of shrink_rows places.
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

/// Where shrink_tile leaves the rows of its tile's places, M or more where there is none, until the queue is filled again.
__device__ inline int* shrunk_rows(unsigned char* queue) { return reinterpret_cast<int*>(queue + QUEUE) - PLACES; }

/// With a WIDTH of 16 each warp takes columns of its own, and the sums meet; with RANKS each brings a share of the columns for all, and takes eight
/// ranks of each twenty-four. DRAWS: whether `keep` may be given.
template <class T, int WIDTH, bool DRAWS, class G>
__device__ void shrink_tile(const Shrink<T, G>& task, int tile, int first_rank, unsigned char* queue, int barrier) {
  constexpr bool MEET = WIDTH == 16;
  constexpr int ROWS = shrink_rows(WIDTH), EIGHTS = ROWS / 8, SHARE = shrink_columns(WIDTH) / WARPS;  // columns that a warp brings in a step
  constexpr int COPIES = EIGHTS * SHARE / 32, STAGES = 16 / COPIES;                                   // a lane's in a step
  constexpr int CHUNKS = MEET ? SHARE / 32 : WARPS, BLOCKS = divide_up(WIDTH / 8, MEET ? 1 : WARPS);  // a warp multiplies with in a step
  const int thread = anew(threadIdx.x % TEAM), warp = thread / 32, g = thread % 32 / 4, t = thread % 4, lane = thread % 32;
  const Piece piece = task.groups.piece(tile, ROWS);
  const Adapter& adapter = task.groups.of(piece.group);
  const int ranks = adapter.R - first_rank, steps = ranks > 0 && piece.begin < piece.end ? divide_up(task.K, WARPS * SHARE) : 0;
  int row[EIGHTS];
#pragma unroll
  for (int i = 0; i < EIGHTS; ++i) row[i] = task.groups.row(piece, piece.begin + i * 8 + g);
  const bool draws = DRAWS && task.keep && task.groups.drops(adapter);
  // Sixteen bytes a lane, those of 32 columns (chunk c of the share that a warp has brought) of eight rows.
  const auto place = [&](int step, int of_warp, int c, int i) {
    return queue + ((step % STAGES * COPIES + c * EIGHTS + i) * TEAM + of_warp * 32 + lane) * 16;
  };
  const auto share = [&](int step) { return (step * WARPS + warp) * SHARE; };  // its first column
  const auto fetch = [&](int step) {
#pragma unroll
    for (int k = 0; k < COPIES; ++k) {
      const int column = share(step) + k / EIGHTS * 32 + t * 8, m = anew(row[k % EIGHTS]);
      const int bytes = m < task.M ? bytes_inside(task.K - column) : 0;
      if (step < steps) copy_async<16>(place(step, warp, k / EIGHTS, k % EIGHTS), task.x + m * task.x_stride + column, bytes);
    }
    commit_copies();
  };
  const uint64_t seed = draws ? static_cast<uint64_t>(*task.seed) : 0;
  const int64_t calls = divide_up(task.K, 8);
  const int keep_stride = divide_up(task.K, 64) * 8;
  // Zeros what is dropped where it lies. The four lanes that have 32 columns of a row have a word of keep, too, which one of them writes.
  const auto drop_share = [&](int step) {
#pragma unroll 1
    for (int c = 0; c < SHARE / 32; ++c) {
      const int column = share(step) + c * 32;
      uint32_t kept = 0;
      int kept_row = task.M;
#pragma unroll
      for (int i = 0; i < EIGHTS; ++i) {
        const int m = anew(row[i]);
        uint32_t bits = draw(seed, m * calls + column / 8 + t, adapter.threshold);
        if (i % 2) forget(bits);  // two are drawn together: of four there are no registers for all that is between
        drop(*reinterpret_cast<Eight*>(place(step, warp, c, i)), bits);
        uint32_t word = bits << 8 * t;
        word |= __shfl_xor_sync(~0u, word, 1);
        word |= __shfl_xor_sync(~0u, word, 2);
        if (t == i) kept = word, kept_row = m;
      }
      if (first_rank || kept_row >= task.M || column / 8 >= keep_stride) continue;
      *reinterpret_cast<uint32_t*>(task.keep + static_cast<int64_t>(kept_row) * keep_stride + column / 8) = kept;
    }
  };
  const T* const a = task.a + static_cast<int64_t>(adapter.first + first_rank + g) * task.a_stride + t * 8;
  const auto block = [&](int i) { return (MEET ? i : i * WARPS + warp) * 8; };  // its first rank
  constexpr int AHEAD = MEET ? 2 : DRAWS && !G::MANY ? CHUNKS : 1;  // chunks whose part of `a` is asked for ahead, as registers allow
  uint4 right[AHEAD][BLOCKS];
  const auto load = [&](int step, int c, int i) {
    const int column = (MEET ? share(step) : step * WARPS * SHARE) + c * 32;
    if (block(i) < min(WIDTH, ranks) && column < task.a_stride) {
      right[c % AHEAD][i] = *reinterpret_cast<const uint4*>(a + anew(block(i)) * task.a_stride + column);
    }
  };
  float sum[EIGHTS / 2][BLOCKS][4] = {};

#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) fetch(step);
#pragma unroll
  for (int k = 0; k < AHEAD * BLOCKS; ++k) load(0, k / BLOCKS, k % BLOCKS);
  for (int step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    if (draws) drop_share(step);
    if constexpr (!MEET) team_sync(barrier, TEAM);  // all shares of this step are there, and the step before is read
    fetch(step + STAGES - 1);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      Eight left[EIGHTS];
#pragma unroll
      for (int i = 0; i < EIGHTS; ++i) left[i] = *reinterpret_cast<const Eight*>(place(step, MEET ? warp : c, MEET ? c : 0, i));
#pragma unroll
      for (int j = 0; j < BLOCKS; ++j) {
        if (block(j) >= min(WIDTH, ranks)) break;
        const auto [x, y, z, w] = right[c % AHEAD][j];
#pragma unroll
        for (int i = 0; i < EIGHTS / 2; ++i) {
          const Eight &u = left[2 * i], &v = left[2 * i + 1];
          const uint32_t first[4] = {u.pair[0], v.pair[0], u.pair[1], v.pair[1]}, second[4] = {u.pair[2], v.pair[2], u.pair[3], v.pair[3]};
          multiply<T>(sum[i][j], first, x, y);
          multiply<T>(sum[i][j], second, z, w);
        }
        load(step + (c + AHEAD) / CHUNKS, (c + AHEAD) % CHUNKS, j);
      }
    }
  }
  team_sync(barrier, TEAM);  // the queue becomes the place where the sums meet

  constexpr int SUMS = MEET ? WARPS : 1;                   // of each number
  float* const meeting = reinterpret_cast<float*>(queue);  // [SUMS, ROWS, WIDTH]
  int* const met_rows = shrunk_rows(queue);
  static_assert(SUMS * ROWS * WIDTH * sizeof(float) <= QUEUE - PLACES * sizeof(int));
#pragma unroll
  for (int i = 0; i < EIGHTS; ++i) {
    if (warp == 0 && t == 0) met_rows[i * 8 + g] = row[i];
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      float* const to = meeting + ((MEET ? warp * ROWS : 0) + i * 8 + g) * WIDTH + block(j) + t * 2;
      if (block(j) < WIDTH) *reinterpret_cast<float2*>(to) = make_float2(sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]);
    }
  }
  team_sync(barrier, TEAM);
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

/// With a WIDTH of 16 each warp takes rows of its own, and their sums meet; with RANKS it takes columns of its own, a third of the tile's, and all
/// read the same of p. MASKS: whether `keep` may be given.
template <class T, int WIDTH, bool MASKS, class G>
__device__ void gradient_tile(const Gradient<T, G>& task, int number, int block, int first_rank, unsigned char* queue, int barrier) {
  constexpr bool MEET = WIDTH == 16;
  constexpr int COLUMNS = grad_columns(WIDTH), MINE = (MEET ? COLUMNS : COLUMNS / WARPS) / 8;  // of a tile; a lane's in a row
  constexpr int STEP = MEET ? 16 * WARPS : 16;                                                 // rows that the team takes at a time
  // Bytes of a step: four rows of each lane's, their bits, and sixteen rows of p, 512 bytes for sixteen ranks.
  constexpr int X = 4 * TEAM * MINE * 2, BITS = TEAM * 16, P = 512 * (MEET ? WARPS : WIDTH / 16), STAGES = MEET ? 3 : 4;
  static_assert(STAGES * (X + BITS + P) <= QUEUE);
  const int thread = anew(threadIdx.x % TEAM), warp = thread / 32, g = thread % 32 / 4, t = thread % 4, lane = thread % 32;
  const int own = block * COLUMNS + (MEET ? 0 : warp * 8 * MINE), column = own + g * MINE;  // the warp's first; the lane's
  const int bytes = bytes_inside<MINE>(task.columns - column);
  const Piece part = task.groups.piece(number, task.span);
  const Adapter& adapter = task.groups.of(part.group);
  const int ranks = min(WIDTH, adapter.R - first_rank);
  if (ranks <= 0 || part.begin >= part.end) return team_sync(barrier, TEAM);
  const int begin = part.begin, end = part.end, steps = divide_up(end - begin, STEP), keep_stride = divide_up(task.columns, 64) * 8;
  uint32_t sums_begin = static_cast<uint32_t>(sums_row(adapter, part.number, part.slot, task.ranks, round_up(task.R, WIDTH)));
  forget(sums_begin);  // or what it is made of keeps more registers all along
  const bool masks = MASKS && task.keep && task.groups.drops(adapter);
  const auto x_place = [&](int step, int i) { return queue + step % STAGES * (X + BITS + P) + (i * TEAM + thread) * MINE * 2; };
  const auto bits_place = [&](int step, int i) { return queue + step % STAGES * (X + BITS + P) + X + thread * 16 + i * 4; };
  const auto p_place = [&](int step, int i) { return queue + step % STAGES * (X + BITS + P) + X + BITS + (MEET ? warp : i) * 512; };
  const auto row_of = [&](int step) { return begin + step * STEP + (MEET ? warp * 16 : 0); };  // the first of sixteen
  const T* const p = task.p + static_cast<int64_t>(first_rank + lane / 2) * task.places + (part.padded - begin) + lane % 2 * 8;
  typename G::FourRows rows;  // of the step that is fetched next: their numbers may have to come from memory first
  const auto fetch = [&](int step) {
    const int first = anew(row_of(step)) + t * 4;
    const T* const x = task.x + first * task.x_stride + column;  // of one adapter's rows, which follow one another
    const uint8_t* const keep = task.keep + static_cast<int64_t>(first) * keep_stride + column / 32 * 4;  // the lane's bits are in four bytes
    const int there = bytes ? end - first : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (step >= steps) break;
      const int64_t ahead = G::MANY ? rows.row(first, i) - first : i;
      const bool inside = i < there && (!G::MANY || rows.row(first, i) < task.M);
      copy_async<MINE * 2>(x_place(step, i), x + ahead * task.x_stride, inside ? bytes : 0);
      if (masks) copy_async<4>(bits_place(step, i), keep + ahead * keep_stride, inside ? 4 : 0);
    }
#pragma unroll
    for (int k = 0; k < divide_up(WIDTH / 16, WARPS); ++k) {
      const int i = MEET ? 0 : k * WARPS + warp;
      if (step >= steps || i * 16 >= ranks) break;
      const T* const sixteen = p + i * 16 * static_cast<int64_t>(task.places) + row_of(step);
      copy_async<16>(p_place(step, i) + lane * 16, sixteen, !MEET || row_of(step) < end ? 16 : 0);
    }
    commit_copies();
    rows.look(task.groups, part, first + STEP);
  };
  float sum[WIDTH / 16][MINE][4] = {};

  rows.look(task.groups, part, row_of(0) + t * 4);
#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) fetch(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    if constexpr (MEET) {
      __syncwarp();
    } else {
      team_sync(barrier, TEAM);  // all of p is there for this step, and the step before is read
    }
    fetch(step + STAGES - 1);
    if (MEET && row_of(step) >= end) break;
    Numbers<MINE> right[4];  // rows 4 t to 4 t + 3, columns MINE g to MINE g + MINE - 1
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      right[i] = *reinterpret_cast<const Numbers<MINE>*>(x_place(step, i));
      if (masks) drop(right[i], *reinterpret_cast<const uint32_t*>(bits_place(step, i)) >> column % 32);
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
  if constexpr (MEET) team_sync(barrier, TEAM);  // the queue becomes the place where the warps' sums meet

  // sum[i][j] holds ranks 16 i + g and 16 i + g + 8, columns 2 MINE t + j and 2 MINE t + MINE + j of the warp's.
  const int64_t stride = round_up(task.columns, COLUMNS);
  float* const sums = task.sums + (static_cast<int64_t>(sums_begin) + first_rank) * stride + own;
  float* const meeting = reinterpret_cast<float*>(queue) + warp * 16 * COLUMNS;  // [WARPS, 16 ranks, COLUMNS]
#pragma unroll
  for (int i = 0; i < WIDTH / 16 * 4; ++i) {  // of sixteen ranks, rank g or g + 8, the first or the last of the columns
    const int rank = i / 4 * 16 + i % 4 / 2 * 8 + g;
    if (i / 4 * 16 >= ranks) break;
    float* const to = (MEET ? meeting + rank * COLUMNS : sums + rank * stride) + t * 2 * MINE + i % 2 * MINE;
    using Some = std::conditional_t<MEET, float4, float2>;
    constexpr int SOME = sizeof(Some) / sizeof(float);
#pragma unroll
    for (int j = 0; j < MINE; j += SOME) {
      alignas(Some) float some[SOME];
#pragma unroll
      for (int k = 0; k < SOME; ++k) some[k] = sum[i / 4][j + k][i % 4];
      *reinterpret_cast<Some*>(to + j) = *reinterpret_cast<const Some*>(some);
    }
  }
  if constexpr (MEET) {
    team_sync(barrier, TEAM);
    for (int i = thread; i < 16 * COLUMNS; i += TEAM) {
      float total = 0;
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

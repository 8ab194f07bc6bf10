// What the products with the frozen weight share, on whichever card.
#pragma once

#include "skinny.cuh"

namespace fastlora {

/// y [M, N] = x [M, depth] w + p [M, R] q + bias, the rank steps p q last: of each row with its own adapter's part of q. How q lies: [N, ranks] in the
/// forward (y = x Wᵀ), [ranks, N] in BACK (dx = dy W). How w lies is apart from that: [N, depth], or [depth, N] where it is ACROSS, as that of nn.Linear
/// is in BACK and that of Conv1D in the forward. In BACK, an adapter that drops something counts its factor times where the bit of keep is set, and
/// not at all elsewhere.
template <class T, class G>
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
  const uint8_t* keep;  // [M, 8 ceil(N / 64)], where an adapter drops something
  T* y;                 // rows of N
  int M, N, depth;
  int R, ranks;  // the largest rank; of all adapters, padded
  G groups;
  bool adds = false;  // in BACK, to what y holds
};

constexpr int ROW_BLOCK = 128;  // rows of a tile on any card

/// A part of the product's rank steps: what some of an adapter's ranks add to the rows of a tile that have it.
struct RankStep {
  int group, p, q, depths;  // p, q: where these ranks begin in them; depths: how many they are, 0: no row of the tile has an adapter
  float factor;
  bool drops;  // by the bits of keep
  bool alone;  // all rows of the tile have it, and nothing is dropped
};

/// The rank steps of the tile that begins with `row`, up to DEPTH ranks at a time, one adapter after the other. The whole warp walks.
template <class G, bool BACK, int DEPTH>
class RankSteps {
  const G& groups;
  int row, group, rank = 0;

 public:
  __device__ RankSteps(const G& groups, int row) : groups(groups), row(row), group(groups.after(row, 0)) {}

  __device__ bool left() const { return group != 0; }
  __device__ RankStep step() const {
    if (!left()) return {0, 0, 0, 0, 1.f, false, true};
    // Where there is no such adapter a row is NaN: NaN times any rank of any adapter.
    if (!groups.exists(group)) return {group, 0, 0, 1, __uint_as_float(0x7FC00000), false, false};
    const Adapter& adapter = groups.of(group);
    const bool drops = BACK && adapter.threshold, alone = !drops && groups.alone(row, group);
    return {group, rank, adapter.first + rank, min(adapter.R - rank, DEPTH), drops ? adapter.factor : 1.f, drops, alone};
  }
  __device__ void next() {
    rank += DEPTH;
    if (groups.exists(group) && rank < groups.of(group).R) return;
    rank = 0;
    group = groups.after(row, group);
  }
};

// Row-blocks whose tiles follow one another, so that they read a block of w while it is in the cache. The tiles that run at a time, one a
// multiprocessor of 128 x 256 (132 of them) or two of 128 x 128 (216), read the fewest bytes of x and w where they are about 16 rows high.
constexpr int TILES_TOGETHER = 16;

struct Tile { int row, column; };  // the first ones

/// Tile `number` of ceil(M / height) * ceil(N / width): TILES_TOGETHER row-blocks at a time, down each block of columns.
__device__ inline Tile tile_of(int number, int M, int N, int height, int width) {
  const int rows = divide_up(M, height), columns = divide_up(N, width), first = number / (TILES_TOGETHER * columns) * TILES_TOGETHER;
  const int together = min(rows - first, TILES_TOGETHER), within = number - first * columns;
  return {(first + within % together) * height, within / together * width};
}

/// Columns `column` and the next of a row of y as they are, where they are inside; else 0. `column` is even.
template <class T, class G>
__device__ inline float2 read_two(const Product<T, G>& task, int row, int column) {
  if (row >= task.M || column >= task.N) return make_float2(0, 0);
  const T* const from = task.y + static_cast<int64_t>(row) * task.N + column;
  T two[2];
  if (task.N % 2 == 0) {
    *reinterpret_cast<uint32_t*>(two) = *reinterpret_cast<const uint32_t*>(from);
  } else {
    two[0] = from[0], two[1] = column + 1 < task.N ? from[1] : T(0.f);
  }
  return make_float2(static_cast<float>(two[0]), static_cast<float>(two[1]));
}

/// Which columns of a row a rank step counts for, as bits from `column` on, to the end of the 64 that it is among, for rows some steps below `row`.
template <class T, class G, bool BACK>
struct KeptRows {
  const Product<T, G>& task;
  const uint8_t* at;
  int row, stride, rows, shift;

  __device__ KeptRows(const Product<T, G>& task, int row, int column)
      : task(task), row(row), stride(divide_up(task.N, 64) * 8), rows(column / 64 * 64 < task.N ? task.M - row : 0), shift(column % 64) {
    at = task.keep + static_cast<int64_t>(row) * stride + column / 64 * 8;
  }

  /// The bits of keep, which there must be, of all 64 columns: who has asked for them early shifts them late, or waits for them.
  __device__ uint64_t word(int below) const {
    return below < rows ? *reinterpret_cast<const uint64_t*>(at + below * stride) : 0;
  }
  __device__ uint64_t bits(const RankStep& step, int below) const {
    if constexpr (G::MANY) {
      if (!task.groups.has(row + below, step.group)) return 0;
      if (!BACK || !step.drops) return ~uint64_t{0};
    }
    return word(below) >> shift;
  }
};

/// Two columns of a sum, those with bits `at` and `at + 1`, plus the rank step where the bits keep it.
__device__ inline void add_kept(float& first, float& second, float p0, float p1, uint64_t bits, int at, float factor) {
  const uint32_t half = static_cast<uint32_t>(bits >> at / 32 * 32), bit = 1u << at % 32;
  if (half & bit) first = fmaf(factor, p0, first);
  if (half & 2 * bit) second = fmaf(factor, p1, second);
}

}  // namespace fastlora

// The passes of adapter_passes.h over bfloat16 v [M, L], for ranks R in tiles (tiles.h); all else is AVX512-BF16's. setup.py compiles this file for
// CPUs that have AMX, and once more with emulated tiles.
//
//     read    projected [M, R] = d(v) Pᵀ    2 M L R FLOPs; v once, 2 M L bytes, and its bits, M L / 8; the panel, 2 R L, once every 128 rows
//             gradient [R, L] = cᵀ d(v)     2 M L R FLOPs; v, from the second-level cache if it was projected; the sums, 8 R L, once every 128 rows
//     add     v += s d'(c P)                2 M L R FLOPs; v read and written, 4 M L bytes, and its bits; the panel, 2 R L, once every 32 rows
//
// A dot of tiles is 16,384 FLOPs, of 2 KB of operands. The panels come in tiles, packed once a call. v is laid into tiles as it is read, masked on the
// way: rows as they are where it is projected, two rows interleaved where rows are summed. Ranks, rows and columns that are not there are zeros.
// A tile of sums lasts for one strip: it is stored, and vectors scale it and add it to the result. The order of all sums is fixed.
#include "adapter_passes.h"
#include "tiles.h"

namespace fastlora {

namespace avx512bf16 {
extern const Kernels passes;
}

namespace FASTLORA_ISA {
namespace {

constexpr int64_t PART_ROWS = 128;  // of a read: 2048 columns of them stay in the second-level cache
constexpr int64_t PAIR = 2 * TILE_LANES;  // rows, ranks or columns that a product of two by two tiles has
constexpr int64_t PROJECTED_COLUMNS = 256, GRADIENT_COLUMNS = 128;  // of a strip: its tiles stay in the first-level cache
static_assert(TILE_DEPTH == PAIR && WIDTH == TILE_LANES);

inline int64_t tiles_of(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

/// One row of tiles, or two, `stride` apart, each as long as there are steps.
struct Operand {
  const Tile* first;
  int64_t stride;
  int64_t rows;
};

struct Sums {
  Tile tile[2][2];

  Floats row(int64_t i, int64_t j) const { return read<Floats>(tile[i / 16][j].row[i % 16]); }
};

/// sums[i][j] = the sum over steps of left[i][step] · right[j][step].
inline void multiply(Tiles& tiles, const Operand& left, const Operand& right, int64_t steps, Sums& sums) {
  with_count<2>(left.rows, [&](auto rows) {
    with_count<2>(right.rows, [&](auto columns) {
      constexpr bool TALL = rows() == 2, WIDE = columns() == 2;
      tiles.zero<0>();
      if constexpr (WIDE) tiles.zero<1>();
      if constexpr (TALL) tiles.zero<2>();
      if constexpr (TALL && WIDE) tiles.zero<3>();
      for (int64_t step = 0; step < steps; ++step) {
        tiles.load<4>(left.first[step]);
        tiles.load<6>(right.first[step]);
        tiles.dot<0, 4, 6>();
        if constexpr (WIDE) {
          tiles.load<7>(right.first[right.stride + step]);
          tiles.dot<1, 4, 7>();
        }
        if constexpr (TALL) {
          tiles.load<5>(left.first[left.stride + step]);
          tiles.dot<2, 5, 6>();
        }
        if constexpr (TALL && WIDE) tiles.dot<3, 5, 7>();
      }
      tiles.store<0>(sums.tile[0][0]);
      if constexpr (WIDE) tiles.store<1>(sums.tile[0][1]);
      if constexpr (TALL) tiles.store<2>(sums.tile[1][0]);
      if constexpr (TALL && WIDE) tiles.store<3>(sums.tile[1][1]);
    });
  });
}

/// 32 columns from l on of row i, zero where dropped, or where there is no such row.
template <bool DROPS>
inline __m512i load_row(const Block<const BFloat16, PART_ROWS>& block, int64_t rows, int64_t i, int64_t l, int64_t columns) {
  return i < rows ? load_pairs(block.v[i] + l, lanes_of<DROPS>(block, i, l, columns - l)) : __m512i{};
}

template <bool DROPS>
void project_part(Tiles& tiles, const Read& pass, const Part& part, const Block<const BFloat16, PART_ROWS>& block) {
  const Segment& segment = part.segment;
  const int64_t rows = part.end - part.begin, panel_tiles = pass.panel_stride / TILE_DEPTH;
  const BFloat16* rows_of_panel = static_cast<const BFloat16*>(pass.panel) + segment.panel_row * pass.panel_stride;
  const Tile* panel = reinterpret_cast<const Tile*>(rows_of_panel) + part.column / TILE_DEPTH;
  const float factor = DROPS ? segment.factor : 1;
  Tile strip[2][PROJECTED_COLUMNS / TILE_DEPTH];
  Sums sums;
  for (int64_t column = 0; column < part.columns; column += PROJECTED_COLUMNS) {
    const int64_t steps = tiles_of(at_most(PROJECTED_COLUMNS, part.columns - column), TILE_DEPTH);
    for (int64_t first = 0; first < rows; first += PAIR) {
      const int64_t count = at_most(PAIR, rows - first);
      for (int64_t i = 0; i < PAIR; ++i) {
        for (int64_t step = 0; step < steps; ++step) {
          write(strip[i / 16][step].row[i % 16], load_row<DROPS>(block, rows, first + i, column + step * TILE_DEPTH, part.columns));
        }
      }
      for (int64_t r = 0; r < segment.rank; r += PAIR) {
        const int64_t ranks = at_most(PAIR, segment.rank - r);
        const Operand left{strip[0], PROJECTED_COLUMNS / TILE_DEPTH, tiles_of(count, TILE_LANES)};
        const Operand right{panel + r / TILE_LANES * panel_tiles + column / TILE_DEPTH, panel_tiles, tiles_of(ranks, TILE_LANES)};
        multiply(tiles, left, right, steps, sums);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t row = segment.first_row + row_at(pass.order, part.begin + first + i);
          for (int64_t j = 0; j < right.rows; ++j) {
            float* to = pass.projected + row * pass.projected_stride + r + j * TILE_LANES;
            const __mmask16 there = static_cast<__mmask16>(lanes_below(ranks - j * TILE_LANES));
            Floats total = factor * sums.row(i, j);
            if (column > 0 || !part.first) total += (Floats)_mm512_maskz_loadu_ps(there, to);
            _mm512_mask_storeu_ps(to, there, (__m512)total);
          }
        }
      }
    }
  }
}

/// The coefficients of a part by rank, as left operands: [ranks / 16][steps].
using ByRank = Tile[TILED_RANK / TILE_LANES][PART_ROWS / TILE_DEPTH];

inline void turn_coefficients(const Read& pass, const Part& part, ByRank& turned) {
  const int64_t rows = part.end - part.begin;
  for (int64_t r = 0; r < part.segment.rank; r += TILE_LANES) {
    const __mmask16 there = static_cast<__mmask16>(lanes_below(part.segment.rank - r));
    const auto load_coefficients = [&](int64_t i) {
      if (i >= rows) return __m512i{};
      const int64_t row = part.segment.first_row + row_at(pass.order, part.begin + i);
      const BFloat16* from = static_cast<const BFloat16*>(pass.coefficients) + row * pass.coefficient_stride + r;
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from));
    };
    for (int64_t first = 0; first < rows; first += TILE_DEPTH) {
      Floats pairs[WIDTH];
      for (int k = 0; k < WIDTH; ++k) {
        pairs[k] = (Floats)_mm512_or_si512(load_coefficients(first + 2 * k), _mm512_slli_epi32(load_coefficients(first + 2 * k + 1), 16));
      }
      transpose(pairs);
      for (int k = 0; k < WIDTH; ++k) write(turned[r / TILE_LANES][first / TILE_DEPTH].row[k], pairs[k]);
    }
  }
}

template <bool DROPS>
void sum_gradient(Tiles& tiles, const Read& pass, const Part& part, const Block<const BFloat16, PART_ROWS>& block) {
  constexpr int64_t STEPS = PART_ROWS / TILE_DEPTH;
  const Segment& segment = part.segment;
  const int64_t rows = part.end - part.begin, steps = tiles_of(rows, TILE_DEPTH);
  const float factor = DROPS ? segment.factor : 1;
  float* gradient = pass.gradient + segment.gradient_row * pass.gradient_stride + part.column;
  ByRank turned;
  turn_coefficients(pass, part, turned);
  Tile strip[GRADIENT_COLUMNS / PAIR][2][STEPS];  // of 32 columns two tiles, which unpacklo and unpackhi fill
  Sums sums;
  for (int64_t column = 0; column < part.columns; column += GRADIENT_COLUMNS) {
    const int64_t columns = at_most(GRADIENT_COLUMNS, part.columns - column);
    for (int64_t i = 0; i < steps * TILE_DEPTH; i += 2) {
      for (int64_t l = 0; l < columns; l += PAIR) {
        const __m512i first = load_row<DROPS>(block, rows, i, column + l, part.columns);
        const __m512i second = load_row<DROPS>(block, rows, i + 1, column + l, part.columns);
        auto& pair = strip[l / PAIR];
        write(pair[0][i / TILE_DEPTH].row[i % TILE_DEPTH / 2], _mm512_unpacklo_epi16(first, second));
        write(pair[1][i / TILE_DEPTH].row[i % TILE_DEPTH / 2], _mm512_unpackhi_epi16(first, second));
      }
    }
    for (int64_t l = 0; l < columns; l += PAIR) {
      for (int64_t r = 0; r < segment.rank; r += PAIR) {
        const int64_t ranks = at_most(PAIR, segment.rank - r);
        multiply(tiles, {turned[r / TILE_LANES], STEPS, tiles_of(ranks, TILE_LANES)}, {strip[l / PAIR][0], STEPS, 2}, steps, sums);
        float* to = gradient + r * pass.gradient_stride + column + l;
        for (int64_t k = 0; k < ranks; ++k) add_unpacked(to + k * pass.gradient_stride, sums.row(k, 0), sums.row(k, 1), factor);
      }
    }
  }
}

template <bool DROPS>
void read_part_in_tiles(Tiles& tiles, const Read& pass, const Part& part) {
  Block<const BFloat16, PART_ROWS> block;
  block.column = part.column;
  for (int64_t i = 0; i < part.end - part.begin; ++i) {
    const int64_t row = row_at(pass.order, part.begin + i);
    block.v[i] = static_cast<const BFloat16*>(pass.v) + row * pass.stride + part.column;
    if (DROPS) block.keep[i] = pass.keep + (part.segment.first_row + row) * pass.keep_stride;
  }
  if (pass.panel) project_part<DROPS>(tiles, pass, part, block);
  if (pass.coefficients) sum_gradient<DROPS>(tiles, pass, part, block);
}

inline Floats widened(__m256i values) { return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16); }

/// v[i][l .. l + 31] += (low, high) where kept, in the `count` columns that are there.
template <bool DROPS>
inline void add_pair(const Block<BFloat16, PAIR>& block, int64_t i, int64_t l, int64_t count, Floats low, Floats high) {
  const __mmask32 there = lanes_below(count);
  if constexpr (DROPS) {
    const __mmask32 kept = lanes_of<true>(block, i, l, count);
    low = (Floats)_mm512_maskz_mov_ps(static_cast<__mmask16>(kept), (__m512)low);
    high = (Floats)_mm512_maskz_mov_ps(static_cast<__mmask16>(kept >> 16), (__m512)high);
  }
  BFloat16* to = block.v[i] + l;
  low += widened(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(there), to));
  high += widened(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(there >> 16), to + WIDTH));
  _mm512_mask_storeu_epi16(to, there, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

template <bool DROPS>
void add_part_in_tiles(Tiles& tiles, const Add& pass, const Part& part) {
  const Segment& segment = part.segment;
  const int64_t rows = part.end - part.begin, steps = tiles_of(segment.rank, TILE_DEPTH);
  const uint32_t* pairs = static_cast<const uint32_t*>(pass.panel) + segment.pair_row * pass.panel_stride;
  const Tile* panel = reinterpret_cast<const Tile*>(pairs) + part.column / TILE_LANES * steps;
  Block<BFloat16, PAIR> block;
  block.column = part.column;
  Tile coefficients[2][TILED_RANK / TILE_DEPTH];
  for (int64_t i = 0; i < PAIR; ++i) {
    const BFloat16* from = nullptr;
    if (i < rows) {
      const int64_t row = row_at(pass.order, part.begin + i);
      block.v[i] = static_cast<BFloat16*>(pass.v) + row * pass.stride + part.column;
      if (DROPS) block.keep[i] = pass.keep + (segment.first_row + row) * pass.keep_stride;
      from = static_cast<const BFloat16*>(pass.coefficients) + (segment.first_row + row) * pass.coefficient_stride;
    }
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t r = step * TILE_DEPTH;
      write(coefficients[i / 16][step].row[i % 16], from ? load_pairs(from + r, lanes_below(segment.rank - r)) : __m512i{});
    }
  }
  const Operand left{coefficients[0], TILED_RANK / TILE_DEPTH, tiles_of(rows, TILE_LANES)};
  const float factor = segment.factor;
  Sums sums;
  for (int64_t column = 0; column < part.columns; column += PAIR) {
    multiply(tiles, left, {panel + column / TILE_LANES * steps, steps, 2}, steps, sums);
    for (int64_t i = 0; i < rows; ++i) {
      add_pair<DROPS>(block, i, column, part.columns - column, factor * sums.row(i, 0), factor * sums.row(i, 1));
    }
  }
}

/// Calls body(tiles, whether elements are dropped, part) for the parts that are tiled, and `others` for all segments if none is, or for each that is not.
template <class Pass, class Body>
void in_tiles(
    const Pass& pass, const Segments& segments, const Cell& cell, int64_t rows_at_once, void (*others)(const Pass&, const Segments&, const Cell&), const Body& body) {
  int64_t tiled = 0;
  for (int64_t i = 0; i < segments.count; ++i) tiled += segments.first[i].tiled;
  if (tiled == 0) return others(pass, segments, cell);
  for (int64_t i = 0; tiled < segments.count && i < segments.count; ++i) {
    if (!segments.first[i].tiled) others(pass, {segments.first + i, 1}, cell);
  }
  Tiles tiles;
  for_each_part(segments, cell, rows_at_once, COLUMN_BLOCK, [&](const Part& part) {
    if (!part.segment.tiled) return;
    if (pass.keep && part.segment.threshold != 0) return body(tiles, std::true_type{}, part);
    body(tiles, std::false_type{}, part);
  });
}

void read_in_tiles(const Read& pass, const Segments& segments, const Cell& cell) {
  in_tiles(pass, segments, cell, PART_ROWS, avx512bf16::passes.read, [&](Tiles& tiles, auto drops, const Part& part) {
    read_part_in_tiles<drops()>(tiles, pass, part);
  });
}

void add_in_tiles(const Add& pass, const Segments& segments, const Cell& cell) {
  in_tiles(pass, segments, cell, PAIR, avx512bf16::passes.add, [&](Tiles& tiles, auto drops, const Part& part) {
    add_part_in_tiles<drops()>(tiles, pass, part);
  });
}

}  // namespace

#define FASTLORA_TEXT(name) #name
#define FASTLORA_NAME_OF(name) FASTLORA_TEXT(name)
Kernels with_tiles() {
  Kernels kernels = avx512bf16::passes;
  kernels.isa = FASTLORA_NAME_OF(FASTLORA_ISA);
  kernels.tiles = true;
  kernels.read = read_in_tiles;
  kernels.add = add_in_tiles;
  return kernels;
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

// The adapters' products in float32. v is widened and masked once, a strip at a time, which every product then reads from the first-level cache;
// panels lie as kernels.h says, a register tile's lanes side by side. Compiled once per instruction set, as vector.h.
//
//     project    2 M L R FLOPs; v, and the strip written; a chunk of the panel, 4 KB of it a strip, once every 64 rows
//     gradient   2 M L R FLOPs; the strip; the sums, 8 R L, once every 64 rows
//     add        2 M L R FLOPs; v read and written; the panel, 4 R L bytes, once every 4 to 6 rows from the second-level cache
#pragma once

#include "adapter_block.h"
#include "few_rows.h"
#include "kernels.h"
#include "register_tile.h"
#include "rows.h"
#include "vector.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t STRIP = COLUMN_UNIT;     // columns: of 64 rows, they fill half of the first-level cache
constexpr int64_t FEW_COLUMNS = 8;         // whose products are summed by themselves: where K is small, every rounding counts
constexpr int64_t RANKS_AT_ONCE = 256;     // of a read
constexpr int64_t RANK_BLOCK = 128;        // ranks whose products are summed by themselves, so that rounding grows with the blocks, not the ranks
constexpr int64_t PANEL_FLOATS = 1 << 15;  // of a panel that stay in the second-level cache

/// Columns that a pass takes of v before it goes on to the next rows: a multiple of STRIP.
inline int64_t columns_at_once(int64_t rank) {
  const int64_t columns = PANEL_FLOATS / (rank + 1) / STRIP * STRIP;
  return columns < STRIP ? STRIP : at_most(columns, COLUMN_BLOCK);
}

/// d(v) of a block of rows and `count` columns from l on, without the factor; zeros up to a whole vector.
template <bool DROPS, class T>
void widen_strip(const Block<const T, ROW_BLOCK>& block, int64_t rows, int64_t l, int64_t count, float (*strip)[STRIP]) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < count; j += WIDTH) {
      store(strip[i] + j, block.template load<DROPS>(i, l + j, count - j));
      if (j % PANEL_LANES == 0) __builtin_prefetch(block.v[i] + l + j + STRIP);
    }
  }
}

/// Vector J of row k of a panel, from the chunk on that `panel` is in.
template <int J>
inline Floats vector_of(const float* panel, int64_t chunk, int64_t k) {
  constexpr int64_t LANE = J * WIDTH;
  return load(panel + LANE / PANEL_LANES * chunk + k * PANEL_LANES + LANE % PANEL_LANES);
}

/// sums[i][r] = the sum over `count` columns of strip[i][l] P[r][l], for I rows and V vectors of ranks.
template <int I, int V>
[[gnu::noinline]] void project_tile(const float (*strip)[STRIP], int64_t count, const float* panel, int64_t chunk, float (*sums)[TILE_COLUMNS]) {
  const auto left = [&](auto i, int64_t l) __attribute__((always_inline)) { return strip[i()][l]; };
  const auto right = [&](int64_t l, auto j) __attribute__((always_inline)) { return vector_of<j()>(panel, chunk, l); };
  for (int64_t l = 0; l < count; l += FEW_COLUMNS) {
    Floats total[I * V] = {};
    add_products<I, V>(l, at_most(l + FEW_COLUMNS, count), left, right, total);
    for_each<I * V>([&](auto n) __attribute__((always_inline)) {
      float* sum = sums[n() / V] + n() % V * WIDTH;
      store(sum, l == 0 ? total[n()] : load(sum) + total[n()]);
    });
  }
}

/// projected[i][r] (+)= factor · sum over the strip's columns of strip[i][l] P[r][l].
inline void project_strip(
    const float (*strip)[STRIP], int64_t rows, int64_t count, const float* panel, int64_t chunk, int64_t ranks, float factor, bool first,
    float* const* projected) {
  alignas(64) float sums[2 * TILE_ROWS][TILE_COLUMNS];
  for (int64_t r = 0; r < ranks; r += TILE_COLUMNS) {
    const int64_t lanes = at_most(TILE_COLUMNS, ranks - r);
    const float* from = panel + r / PANEL_LANES * chunk + r % PANEL_LANES;
    with_count<TILE_VECTORS>((lanes + WIDTH - 1) / WIDTH, [&](auto vectors) {
      constexpr int V = vectors(), ROWS = rows_of_tile(V);
      for (int64_t begin = 0; begin < rows; begin += ROWS) {
        const int64_t several = at_most(ROWS, rows - begin);
        with_count<ROWS>(several, [&](auto count_of) { project_tile<count_of(), V>(strip + begin, count, from, chunk, sums); });
        for (int64_t i = 0; i < several; ++i) {
          float* to = projected[begin + i] + r;
          for (int64_t lane = 0; lane < lanes; lane += WIDTH) {
            const Floats sum = factor * load(sums[i] + lane);
            store_up_to(to + lane, first ? sum : load_up_to(to + lane, lanes - lane) + sum, lanes - lane);
          }
        }
      }
    });
  }
}

/// The coefficients of a block of rows: an odd number of lines a row, as rows of a power of two would share a few lines of the first-level cache.
using Coefficients = float[RANKS_AT_ONCE + PANEL_LANES];

/// gradient[r][l] += factor · sum over rows of coefficients[i][r] strip[i][l], for I ranks and V vectors of columns.
template <int I, int V>
[[gnu::noinline]] void gradient_tile(
    const float (*strip)[STRIP], int64_t rows, int64_t l, const Coefficients* coefficients, int64_t r, float factor, float* gradient,
    int64_t stride) {
  const auto left = [&](auto i, int64_t row) __attribute__((always_inline)) { return coefficients[row][r + i()]; };
  const auto right = [&](int64_t row, auto j) __attribute__((always_inline)) { return load(strip[row] + l + j() * WIDTH); };
  Floats total[I * V] = {};
  add_products<I, V>(0, rows, left, right, total);
  for_each<I * V>([&](auto n) __attribute__((always_inline)) {
    float* sum = gradient + (r + n() / V) * stride + l + n() % V * WIDTH;
    store(sum, load(sum) + factor * total[n()]);
  });
}

/// The same for all ranks and columns, in whole vectors.
inline void gradient_of_strip(
    const float (*strip)[STRIP], int64_t rows, int64_t count, const Coefficients* coefficients, int64_t ranks, float factor, float* gradient,
    int64_t stride) {
  for (int64_t r = 0; r < ranks; r += TILE_ROWS) {
    with_count<TILE_ROWS>(at_most(TILE_ROWS, ranks - r), [&](auto several) {
      for (int64_t l = 0; l < count; l += TILE_COLUMNS) {
        with_count<TILE_VECTORS>(at_most(TILE_VECTORS, (count - l + WIDTH - 1) / WIDTH), [&](auto vectors) {
          gradient_tile<several(), vectors()>(strip, rows, l, coefficients, r, factor, gradient, stride);
        });
      }
    });
  }
}

/// Both of a block of rows and `columns` columns, or either: a null panel projects nothing, null coefficients make no gradient.
template <bool DROPS, class T>
void read_floats(
    const Block<const T, ROW_BLOCK>& block, int64_t rows, int64_t columns, int64_t rank, float factor, bool first, const float* panel,
    int64_t chunk, float* const* projected, const float* const* coefficients, float* gradient, int64_t gradient_stride) {
  alignas(64) float strip[ROW_BLOCK][STRIP];
  alignas(64) Coefficients own[ROW_BLOCK];
  for (int64_t r = 0; r < rank; r += RANKS_AT_ONCE) {
    const int64_t ranks = at_most(RANKS_AT_ONCE, rank - r);
    float* out[ROW_BLOCK];
    for (int64_t i = 0; i < rows; ++i) {
      if (panel) out[i] = projected[i] + r;
      if (coefficients) for_each_vector(ranks, [&](int64_t k, int64_t left) { store(own[i] + k, load_up_to(coefficients[i] + r + k, left)); });
    }
    for (int64_t l = 0; l < columns; l += STRIP) {
      const int64_t count = at_most(STRIP, columns - l);
      widen_strip<DROPS>(block, rows, l, count, strip);
      if (panel) project_strip(strip, rows, count, panel + r * chunk / PANEL_LANES + l * PANEL_LANES, chunk, ranks, factor, first && l == 0, out);
      if (coefficients) gradient_of_strip(strip, rows, count, own, ranks, factor, gradient + r * gradient_stride + l, gradient_stride);
    }
  }
}

/// sums[i][l] = the sum over ranks of coefficients[i][r] P[r][l], for I rows and V vectors of columns.
template <int I, int V>
[[gnu::noinline]] void add_tile(const float* const* coefficients, int64_t rank, const float* panel, int64_t chunk, float (*sums)[TILE_COLUMNS]) {
  const float* own[I];
  for_each<I>([&](auto i) __attribute__((always_inline)) { own[i()] = coefficients[i()]; });
  const auto left = [&](auto i, int64_t r) __attribute__((always_inline)) { return own[i()][r]; };
  const auto right = [&](int64_t r, auto j) __attribute__((always_inline)) { return vector_of<j()>(panel, chunk, r); };
  Floats total[I * V] = {};
  add_products<I, V>(0, at_most(RANK_BLOCK, rank), left, right, total);
  for (int64_t r = RANK_BLOCK; r < rank; r += RANK_BLOCK) {
    Floats more[I * V] = {};
    add_products<I, V>(r, at_most(r + RANK_BLOCK, rank), left, right, more);
    for_each<I * V>([&](auto n) __attribute__((always_inline)) { total[n()] += more[n()]; });
  }
  for_each<I * V>([&](auto n) __attribute__((always_inline)) { store(sums[n() / V] + n() % V * WIDTH, total[n()]); });
}

/// v[i][l] += factor · sum over ranks of coefficients[i][r] P[r][l] where kept, for TILE_ROWS rows at most.
template <bool DROPS, class T>
void add_floats(
    const Block<T, TILE_ROWS>& block, int64_t rows, int64_t columns, int64_t rank, float factor, const float* panel, int64_t chunk,
    const float* const* coefficients) {
  with_count<TILE_ROWS>(rows, [&](auto several) {
    alignas(64) float sums[TILE_ROWS][TILE_COLUMNS];
    for (int64_t l = 0; l < columns; l += TILE_COLUMNS) {
      const float* from = panel + l / PANEL_LANES * chunk + l % PANEL_LANES;
      const int64_t count = at_most(TILE_COLUMNS, columns - l);
      with_count<TILE_VECTORS>((count + WIDTH - 1) / WIDTH, [&](auto vectors) {
        add_tile<several(), vectors()>(coefficients, rank, from, chunk, sums);
      });
      for (int64_t i = 0; i < several(); ++i) {
        for (int64_t j = 0; j < count; j += WIDTH) add_to<DROPS>(block, i, l + j, count - j, factor * load(sums[i] + j));
      }
    }
  });
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

// What products in float32 are made of: a tile of sums in registers, and a panel that its right operand is read from. Compiled once per instruction
// set, as vector.h.
#pragma once

#include "few_rows.h"
#include "vector.h"

namespace fastlora::FASTLORA_ISA {
namespace {

// A tile's sums, a row of the panel, and elements of the left operand fill the registers.
constexpr int TILE_VECTORS = REGISTERS / 8;
#if defined(__AVX2__)
constexpr int TILE_ROWS = 6;
#elif defined(__aarch64__)
constexpr int TILE_ROWS = 5;  // the compiler loads the elements of all rows beforehand
#else
constexpr int TILE_ROWS = 4;  // a product takes a register before it is added
#endif
constexpr int TILE_COLUMNS = TILE_VECTORS * WIDTH;

/// How many rows a tile has whose rows are so many vectors: as many sums, where they are narrow, up to twice the rows.
constexpr int rows_of_tile(int vectors) {
  const int rows = TILE_ROWS * TILE_VECTORS / vectors;
  return rows < 2 * TILE_ROWS ? rows : 2 * TILE_ROWS;
}

/// total[i V + j] += left(i, k) right(k, j), an element and a vector, for every k from begin to end in turn; i below I, j below V.
template <int I, int V, class Left, class Right>
__attribute__((always_inline)) inline void add_products(int64_t begin, int64_t end, const Left& left, const Right& right, Floats* total) {
  Floats sum[I * V];
  for_each<I * V>([&](auto n) __attribute__((always_inline)) { sum[n()] = total[n()]; });
  for (int64_t k = begin; k < end; ++k) {
    Floats values[V];
    for_each<V>([&](auto j) __attribute__((always_inline)) { values[j()] = right(k, j); });
    for_each<I>([&](auto i) __attribute__((always_inline)) {
      const float value = left(i, k);
      for_each<V>([&](auto j) __attribute__((always_inline)) { sum[i() * V + j()] += value * values[j()]; });
    });
  }
  for_each<I * V>([&](auto n) __attribute__((always_inline)) { total[n()] = sum[n()]; });
}

/// panel[k][lane] = from[lane · lane_stride + k · depth_stride], LANES floats a row, for `depth` rows; zeros for lanes beyond `lanes`.
template <int LANES, class T>
void pack_panel(const T* from, int64_t lane_stride, int64_t depth_stride, int64_t lanes, int64_t depth, float* panel) {
  if (lane_stride == 1) {
    for (int64_t k = 0; k < depth; ++k, from += depth_stride, panel += LANES) {
      for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
        __builtin_prefetch(from + 8 * depth_stride + lane);
        store(panel + lane, lane + WIDTH <= lanes ? load(from + lane) : lane < lanes ? load_some(from + lane, lanes - lane) : Floats{});
      }
    }
    return;
  }
  for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
    for (int64_t k = 0; k < depth; k += WIDTH) {
      Floats rows[WIDTH];
      const int64_t count = depth - k < WIDTH ? depth - k : WIDTH;
      if (depth_stride == 1 && lane + WIDTH <= lanes && count == WIDTH) {
        for_each<WIDTH>([&](auto i) __attribute__((always_inline)) {
          const T* row = from + (lane + i()) * lane_stride + k;
          rows[i()] = load(row);
          __builtin_prefetch(row + 8 * WIDTH);
        });
      } else {
        for (int64_t i = 0; i < WIDTH; ++i) {
          T row[WIDTH] = {};
          for (int64_t l = 0; lane + i < lanes && l < count; ++l) row[l] = from[(lane + i) * lane_stride + (k + l) * depth_stride];
          rows[i] = load(row);
        }
      }
      transpose(rows);
      float* to = panel + k * LANES + lane;
      if (count == WIDTH) {
        for_each<WIDTH>([&](auto i) __attribute__((always_inline)) { store(to + i() * LANES, rows[i()]); });
      } else {
        for (int64_t i = 0; i < count; ++i) store(to + i * LANES, rows[i]);
      }
    }
  }
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

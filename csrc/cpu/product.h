// y = x Wᵀ + b, or y += x Wᵀ, in float32 for many rows. Compiled once per instruction set, as vector.h.
//
// The columns of y are computed in panels: the panel's rows of W are copied to [K, TILE_COLUMNS], and widened to float32 on the way; the copy stays in
// the second-level cache while the rows of x stream by, TILE_ROWS at a time, and a tile of y stays in registers. (Goto and van de Geijn, Anatomy of High-Performance
// Matrix Multiplication, 2008.) An element is the sum of the sums of DEPTH_BLOCK products each, one block after the other, whoever computes it.
#pragma once

#include "kernels.h"
#include "few_rows.h"
#include "register_tile.h"
#include "rows.h"
#include "vector.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t DEPTH_BLOCK = 128;  // products summed by themselves, so that rounding grows with the blocks, not with K
static_assert(PRODUCT_DEPTH % DEPTH_BLOCK == 0 && PRODUCT_DEPTH % WIDTH == 0 && TILE_COLUMNS <= PANEL_COLUMNS);

/// y[i][c] = start[i][c] + sum over l of x[i][l] panel[l][c], for I rows and TILE_COLUMNS columns; the start of every row start_stride apart.
template <int I>
[[gnu::noinline]] void product_tile(
    const float* x, int64_t x_stride, const float* panel, int64_t depth, const float* start, int64_t start_stride, float* y, int64_t y_stride) {
  int64_t l = 0;
  do {
    const int64_t end = depth - l < DEPTH_BLOCK ? depth : l + DEPTH_BLOCK;
    Floats total[I * TILE_VECTORS] = {};
    const auto left = [&](auto i, int64_t k) __attribute__((always_inline)) { return x[i() * x_stride + k]; };
    const auto right = [&](int64_t k, auto j) __attribute__((always_inline)) { return load(panel + k * TILE_COLUMNS + j() * WIDTH); };
    add_products<I, TILE_VECTORS>(l, end, left, right, total);
    l = end;
    for_each<I>([&](auto i) __attribute__((always_inline)) {
      for_each<TILE_VECTORS>([&](auto j) __attribute__((always_inline)) {
        store(y + i() * y_stride + j() * WIDTH, load(start + i() * start_stride + j() * WIDTH) + total[i() * TILE_VECTORS + j()]);
      });
    });
    start = y;
    start_stride = y_stride;
  } while (l < depth);
}

inline void copy(const float* from, float* to, int64_t count) {
  for (int64_t c = 0; c < count; ++c) to[c] = from[c];
}

/// The tiles `begin` to `end` of the panel of columns from n on: its products from k on, added to what y has unless they begin it.
void product_panel(const Product& task, int64_t n, int64_t begin, int64_t end, int64_t k, int64_t depth, const float* panel) {
  const int64_t columns = task.out - n < TILE_COLUMNS ? task.out - n : TILE_COLUMNS;
  const bool whole = columns == TILE_COLUMNS;  // else a tile is computed beside y
  alignas(64) float bias[TILE_COLUMNS] = {}, beside[TILE_ROWS * TILE_COLUMNS] = {};
  if (task.bias) copy(task.bias + n, bias, columns);
  const bool adds = task.adds || k;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t row = tile * TILE_ROWS, rows = task.rows - row < TILE_ROWS ? task.rows - row : TILE_ROWS;
    const float* x = task.x + row * task.x_stride + k;
    float* y = task.y + row * task.out + n;
    float* to = whole ? y : beside;
    const int64_t stride = whole ? task.out : TILE_COLUMNS;
    if (!whole && adds) {
      for (int64_t i = 0; i < rows; ++i) copy(y + i * task.out, beside + i * TILE_COLUMNS, columns);
    }
    with_count<TILE_ROWS>(rows, [&](auto count) {
      product_tile<count()>(x, task.x_stride, panel, depth, adds ? to : bias, adds ? stride : 0, to, stride);
    });
    if (!whole) {
      for (int64_t i = 0; i < rows; ++i) copy(beside + i * TILE_COLUMNS, y + i * task.out, columns);
    }
  }
}

inline int64_t tiles_down(const Product& task) { return (task.rows + TILE_ROWS - 1) / TILE_ROWS; }

int64_t product_tiles(const Product& task) { return tiles_down(task) * ((task.out + TILE_COLUMNS - 1) / TILE_COLUMNS); }

void product(const Product& task, int64_t begin, int64_t end, float* panel) {
  const int64_t tiles = tiles_down(task);
  while (begin < end) {
    const int64_t n = begin / tiles * TILE_COLUMNS, first = begin % tiles;
    const int64_t last = first + end - begin < tiles ? first + end - begin : tiles;
    int64_t k = 0;
    do {
      const int64_t depth = task.in - k < PRODUCT_DEPTH ? task.in - k : PRODUCT_DEPTH;
      with_kind(task.kind, [&](auto* of) {
        using T = std::remove_pointer_t<decltype(of)>;
        const int64_t row_stride = task.by_column ? 1 : task.weight_stride, column_stride = task.by_column ? task.weight_stride : 1;
        const T* w = static_cast<const T*>(task.weight) + n * row_stride + k * column_stride;
        pack_panel<TILE_COLUMNS>(w, row_stride, column_stride, task.out - n, depth, panel);
      });
      product_panel(task, n, first, last, k, depth, panel);
      k += depth;
    } while (k < task.in);
    begin += last - first;
  }
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

// The norms of the rows of W + s B A, which is never stored: a few rows and columns of it at a time are added up in registers, squared and summed.
// Compiled once per instruction set, as vector.h.
#pragma once

#include <type_traits>

#include "rows.h"

namespace fastlora::FASTLORA_ISA {
namespace {

/// norm [ROWS] of the rows from `row` on.
template <int ROWS, class T>
void dora_norm_rows(const DoraNorm& task, int64_t row) {
  constexpr int VECTORS = 2;
  Floats squares[ROWS][VECTORS] = {};
  const auto add = [&](int64_t l, auto vectors, int64_t count) {  // the columns from l on: whole vectors, or `count` elements of one
    constexpr int MANY = decltype(vectors)::value;
    Floats sum[ROWS][MANY];
    for (int i = 0; i < ROWS; ++i) {
      for (int v = 0; v < MANY; ++v) sum[i][v] = load_up_to(static_cast<const T*>(task.weight) + (row + i) * task.weight_stride + l + v * WIDTH, count);
    }
    for (int64_t r = 0; r < task.rank; ++r) {
      Floats a[MANY];
      for (int v = 0; v < MANY; ++v) a[v] = load_up_to(task.lora_a + r * task.width + l + v * WIDTH, count);
      for (int i = 0; i < ROWS; ++i) {
        const float b = task.scale * task.lora_b[(row + i) * task.rank + r];
        for (int v = 0; v < MANY; ++v) sum[i][v] += b * a[v];
      }
    }
    for (int i = 0; i < ROWS; ++i) {
      for (int v = 0; v < MANY; ++v) squares[i][v] += sum[i][v] * sum[i][v];
    }
  };
  int64_t l = 0;
  for (; l + VECTORS * WIDTH <= task.width; l += VECTORS * WIDTH) add(l, std::integral_constant<int, VECTORS>{}, WIDTH);
  for (; l < task.width; l += WIDTH) add(l, std::integral_constant<int, 1>{}, task.width - l);
  for (int i = 0; i < ROWS; ++i) {
    float total = 0;
    const Floats lanes = squares[i][0] + squares[i][1];
    for (int lane = 0; lane < WIDTH; ++lane) total += lanes[lane];
    task.norm[row + i] = __builtin_sqrtf(total);
  }
}

void dora_norm(const DoraNorm& task, int64_t begin, int64_t end) {
  constexpr int ROWS = 4;
  with_kind(task.kind, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    int64_t row = begin;
    for (; row + ROWS <= end; row += ROWS) dora_norm_rows<ROWS, T>(task, row);
    for (; row < end; ++row) dora_norm_rows<1, T>(task, row);
  });
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

// The passes over a big activation that the adapters' part of a layer is made of, each reading it once:
//
//     read    v [M, L] -> projected = d(v) Pᵀ [M, R]  and  gradient = cᵀ d(v) [R, L], either or both
//     add     v [M, L] += s d'(c P)
//
// with a panel P [R, L] in float32 (A, or Bᵀ) and coefficients c [M, R] in float32. Kernels work on one cell of the problem,
// a range of rows and a range of columns, alone and in a fixed order; who calls them splits the work and sums the cells.
// No torch here: adapter_passes.cpp is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace fastlora {

enum class Kind { FLOAT32, BFLOAT16, FLOAT16 };

/// The rows of one adapter, in sorted order, and its place among the stacked panels.
struct Segment {
  int64_t begin, end;   // places in the order of rows
  int64_t rank;
  int64_t panel_row;    // its first row in the stacked panels [sum R_i, L]
  uint32_t threshold;   // half-words below it are dropped; 0: no dropout
  float factor;         // of a kept element in a read with dropout; of everything that is added
};

/// What both passes share.
struct Rows {
  Kind kind;
  int64_t stride;        // elements from one row of v to the next
  int64_t width;         // L
  const int64_t* order;  // the row at each place; null: row i is at place i
  uint64_t seed;
  int64_t panel_stride;
  int64_t coefficient_stride;
};

struct Read : Rows {
  const void* v;
  const float* panel;         // null: nothing is projected
  float* projected;           // [M, projected_stride], by row
  int64_t projected_stride;
  const float* coefficients;  // null: there is no gradient
  float* gradient;            // [sum R_i, panel_stride], added to
};

struct Add : Rows {
  void* v;
  const float* panel;
  const float* coefficients;
};

constexpr int64_t COLUMN_UNIT = 64;  // cells begin at a multiple of this; panels are padded with zeros to one

struct Cell {
  int64_t begin, end;                // places, within the segment
  int64_t column_begin, column_end;
};

struct Kernels {
  const char* isa;
  void (*read)(const Read&, const Segment&, const Cell&);
  void (*add)(const Add&, const Segment&, const Cell&);
};

/// The kernels for the instruction set that this machine has, or that FASTLORA_ISA (portable, avx2, avx512) names.
const Kernels& kernels();

}  // namespace fastlora

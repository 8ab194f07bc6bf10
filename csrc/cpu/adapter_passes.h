// The passes over a big activation that the adapters' part of a layer is made of (kernels.h). Compiled once per instruction set, as vector.h.
#pragma once

#include "adapter_block.h"
#include "adapter_dots.h"
#include "adapter_floats.h"
#include "kernels.h"
#include "vector.h"

namespace fastlora::FASTLORA_ISA {
namespace {

inline int64_t row_at(const int64_t* order, int64_t place) { return order ? order[place] : place; }

/// The places begin to end of one adapter, and columns of v.
struct Part {
  const Segment& segment;
  int64_t begin, end;
  int64_t column, columns;
  bool first;  // what it projects begins with it
};

/// A part's rows, and each one's coefficients.
template <bool DROPS, class Void, class T, class Coefficient, int COUNT>
void find_rows(const Rows& pass, const Part& part, Void* v, Block<T, COUNT>& block, const Coefficient** coefficients) {
  block.column = part.column;
  for (int64_t i = 0; i < part.end - part.begin; ++i) {
    const int64_t row = row_at(pass.order, part.begin + i), of_layer = part.segment.first_row + row;
    block.v[i] = static_cast<T*>(v) + row * pass.stride + part.column;
    if (DROPS) block.keep[i] = pass.keep + of_layer * pass.keep_stride;
    if (pass.coefficients) coefficients[i] = static_cast<const Coefficient*>(pass.coefficients) + of_layer * pass.coefficient_stride;
  }
}

template <bool DROPS, bool DOTS, class T>
void read_part(const Read& pass, const Part& part) {
  using Small = std::conditional_t<DOTS, BFloat16, float>;
  const Segment& segment = part.segment;
  const Small* panel = static_cast<const Small*>(pass.panel);
  if (panel) panel += segment.panel_row * pass.panel_stride;
  const int64_t rows = part.end - part.begin;
  Block<const T, ROW_BLOCK> block;
  const Small* of_rows[ROW_BLOCK];
  find_rows<DROPS>(pass, part, pass.v, block, of_rows);
  float* projected[ROW_BLOCK];
  for (int64_t i = 0; panel && i < rows; ++i) {
    projected[i] = pass.projected + (segment.first_row + row_at(pass.order, part.begin + i)) * pass.projected_stride;
  }
  const Small* const* coefficients = pass.coefficients ? of_rows : nullptr;
  float* gradient = pass.coefficients ? pass.gradient + segment.gradient_row * pass.gradient_stride + part.column : nullptr;
  const float factor = DROPS ? segment.factor : 1;
  if constexpr (DOTS) {
#if defined(__AVX512BF16__)
    read_dots<DROPS>(
        block, rows, part.columns, segment.rank, factor, part.first, panel ? panel + part.column : nullptr, pass.panel_stride, projected,
        coefficients, gradient, pass.gradient_stride);
#endif
  } else {
    read_floats<DROPS>(
        block, rows, part.columns, segment.rank, factor, part.first, panel ? panel + part.column * PANEL_LANES : nullptr,
        pass.panel_stride * PANEL_LANES, projected, coefficients, gradient, pass.gradient_stride);
  }
}

/// How many rows an add takes at a time.
template <bool DOTS>
constexpr int64_t added_rows() {
#if defined(__AVX512BF16__)
  if (DOTS) return ROWS;
#endif
  return TILE_ROWS;
}

template <bool DROPS, bool DOTS, class T>
void add_part(const Add& pass, const Part& part) {
  const Segment& segment = part.segment;
  const int64_t rows = part.end - part.begin;
  Block<T, added_rows<DOTS>()> block;
  const std::conditional_t<DOTS, BFloat16, float>* coefficients[added_rows<DOTS>()];
  find_rows<DROPS>(pass, part, pass.v, block, coefficients);
  if constexpr (DOTS) {
#if defined(__AVX512BF16__)
    const uint32_t* panel = static_cast<const uint32_t*>(pass.panel) + segment.pair_row * pass.panel_stride + part.column;
    add_dots<DROPS>(block, rows, part.columns, segment.rank, segment.factor, panel, pass.panel_stride, coefficients);
#endif
  } else {
    const int64_t chunk = padded_rank(segment.rank) * PANEL_LANES;
    const float* panel = static_cast<const float*>(pass.panel) + segment.panel_row * pass.panel_stride + part.column / PANEL_LANES * chunk;
    add_floats<DROPS>(block, rows, part.columns, segment.rank, segment.factor, panel, chunk, coefficients);
  }
}

/// Calls body(whether elements are dropped).
template <class Body>
void with_drops(const Rows& pass, const Segment& segment, const Body& body) {
  if (pass.keep && segment.threshold != 0) return body(std::true_type{});
  body(std::false_type{});
}

/// Calls body(part) for every adapter's share of every block of the cell, so many rows and columns. What adapters share of a block is still in the cache.
template <class Body>
void for_each_part(const Segments& segments, const Cell& cell, int64_t rows_at_once, int64_t columns_at_once, const Body& body) {
  for (int64_t column = cell.column_begin; column < cell.column_end; column += columns_at_once) {
    const int64_t columns = at_most(columns_at_once, cell.column_end - column);
    for (int64_t place = cell.begin; place < cell.end; place += rows_at_once) {
      const int64_t last = at_most(place + rows_at_once, cell.end);
      for (int64_t i = 0; i < segments.count; ++i) {
        const Segment& segment = segments.first[i];
        const int64_t begin = segment.begin > place ? segment.begin : place, end = at_most(segment.end, last);
        if (begin < end) body(Part{segment, begin, end, column, columns, column == cell.column_begin});
      }
    }
  }
}

inline int64_t most_ranks(const Segments& segments) {
  int64_t most = 0;
  for (int64_t i = 0; i < segments.count; ++i) most = segments.first[i].rank > most ? segments.first[i].rank : most;
  return most;
}

void draw(const Draw& pass, const Segments& segments, const Cell& cell) {
  for_each_part(segments, cell, ROW_BLOCK, COLUMN_BLOCK, [&](const Part& part) {
    if (part.segment.threshold == 0) return;
    for (int64_t place = part.begin; place < part.end; ++place) {
      const int64_t row = row_at(pass.order, place);
      uint8_t* keep = pass.keep + (part.segment.first_row + row) * pass.keep_stride;
      draw_keep(part.segment.seed, part.segment.threshold, row, (pass.width + 7) / 8, part.column, part.column + part.columns, keep);
    }
  });
}

void read_pass(const Read& pass, const Segments& segments, const Cell& cell) {
  if constexpr (HAS_DOTS) {
    if (pass.dots) {
      return for_each_part(segments, cell, ROW_BLOCK, COLUMN_BLOCK, [&](const Part& part) {
        with_drops(pass, part.segment, [&](auto drops) { read_part<drops(), true, BFloat16>(pass, part); });
      });
    }
  }
  for_each_part(segments, cell, ROW_BLOCK, columns_at_once(most_ranks(segments)), [&](const Part& part) {
    with_kind(pass.kind, [&](auto* type) {
      with_drops(pass, part.segment, [&](auto drops) { read_part<drops(), false, std::remove_pointer_t<decltype(type)>>(pass, part); });
    });
  });
}

void add_pass(const Add& pass, const Segments& segments, const Cell& cell) {
  if constexpr (HAS_DOTS) {
    if (pass.dots) {
      return for_each_part(segments, cell, added_rows<true>(), COLUMN_BLOCK, [&](const Part& part) {
        with_drops(pass, part.segment, [&](auto drops) { add_part<drops(), true, BFloat16>(pass, part); });
      });
    }
  }
  for_each_part(segments, cell, added_rows<false>(), columns_at_once(most_ranks(segments)), [&](const Part& part) {
    with_kind(pass.kind, [&](auto* type) {
      with_drops(pass, part.segment, [&](auto drops) { add_part<drops(), false, std::remove_pointer_t<decltype(type)>>(pass, part); });
    });
  });
}

void pack(Kind kind, const void* from, int64_t lane_stride, int64_t depth_stride, int64_t lanes, int64_t depth, float* to) {
  with_kind(kind, [&](auto* type) {
    pack_panel<PANEL_LANES>(static_cast<const std::remove_pointer_t<decltype(type)>*>(from), lane_stride, depth_stride, lanes, depth, to);
  });
}

void pack_pairs([[maybe_unused]] const Pairs& pairs) {
#if defined(__AVX512BF16__)
  with_kind(pairs.kind, [&](auto* type) { pack_pairs_of<std::remove_pointer_t<decltype(type)>>(pairs); });
#endif
}

void turn(Kind kind, const float* from, int64_t stride, int64_t rows, int64_t columns, float factor, void* to) {
  with_kind(kind, [&](auto* type) {
    auto* turned = static_cast<decltype(type)>(to);
    for (int64_t r = 0; r < rows; r += WIDTH) {
      for (int64_t l = 0; l < columns; l += WIDTH) {
        Floats block[WIDTH];
        for_each<WIDTH>([&](auto i) __attribute__((always_inline)) {
          block[i()] = r + i() < rows ? factor * load(from + (r + i()) * stride + l) : Floats{};
        });
        transpose(block);
        for (int64_t i = 0; i < at_most(WIDTH, columns - l); ++i) store_up_to(turned + (l + i) * rows + r, block[i], rows - r);
      }
    }
  });
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

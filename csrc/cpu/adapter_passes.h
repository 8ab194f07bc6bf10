// The passes over a big activation that the adapters' part of a layer is made of (kernels.h). Compiled once per instruction set, as vector.h.
#pragma once

#include "few_rows.h"
#include "kernels.h"
#include "vector.h"

namespace fastlora::FASTLORA_ISA {
namespace {

// Register tiles: ROWS x RANKS accumulators in a projection, RANKS x VECTORS and ROWS x VECTORS where columns are the lanes.
#if defined(__AVX512F__)
constexpr int ROWS = 4, RANKS = 4, VECTORS = 4;
#else
constexpr int ROWS = 4, RANKS = 2, VECTORS = 2;  // 16 registers
#endif

constexpr int64_t ROW_BLOCK = 64;       // rows whose gradient is summed by itself, so that rounding grows with the blocks, not the rows
constexpr int64_t RANK_BLOCK = 128;     // ranks whose products are summed by themselves, for the same reason
constexpr int64_t COLUMN_BLOCK = 2048;  // 64 rows of so many floats, or 64 ranks, stay in the second-level cache
static_assert(COLUMN_BLOCK % COLUMN_UNIT == 0 && COLUMN_UNIT % (VECTORS * WIDTH) == 0 && COLUMN_UNIT % DECISIONS == 0);

inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

inline int64_t row_at(const int64_t* order, int64_t place) { return order ? order[place] : place; }

/// What panels and coefficients are made of.
template <bool DOTS>
using Small = std::conditional_t<DOTS, BFloat16, float>;

/// Some rows of v from one column on, and the bits of their masks.
template <class T, int COUNT>
struct Block {
  T* v[COUNT];
  const uint8_t* keep[COUNT];  // of the whole row
  int64_t column;

  /// WIDTH elements l columns further on, or the `count` that are left; zero where dropped.
  template <bool DROPS>
  Floats load(int64_t i, int64_t l, int64_t count) const {
    const Floats value = count >= WIDTH ? FASTLORA_ISA::load(v[i] + l) : load_some(v[i] + l, count);
    return DROPS ? kept(value, keep[i], column + l) : value;
  }
};

/// projected[i][r] (+)= factor · sum over columns of v[i][l] panel[r][l], for one register tile.
template <int I, int R, bool DROPS, class T, int COUNT>
void project_tile(
    const Block<T, COUNT>& block, int64_t row, const float* panel, int64_t stride, int64_t columns, float factor, bool first,
    float* const* projected) {
  constexpr int SUMS = (I * R + WIDTH - 1) / WIDTH * WIDTH;
  Floats total[SUMS] = {};
  const auto step = [&](int64_t l, int64_t count) {
    Floats p[R];
    for (int r = 0; r < R; ++r) p[r] = load(panel + r * stride + l);
    for (int i = 0; i < I; ++i) {
      const Floats value = block.template load<DROPS>(row + i, l, count);
      for (int r = 0; r < R; ++r) total[i * R + r] += value * p[r];
    }
  };
  int64_t l = 0;
  for (; l + WIDTH <= columns; l += WIDTH) step(l, WIDTH);
  if (l < columns) step(l, columns - l);
  float flat[SUMS];
  for (int i = 0; i < SUMS; i += WIDTH) store(flat + i, sums(total + i));
  for (int i = 0; i < I; ++i) {
    for (int r = 0; r < R; ++r) projected[i][r] = factor * flat[i * R + r] + (first ? 0 : projected[i][r]);
  }
}

/// gradient[r][l] += factor · sum over rows of coefficients[i][r] v[i][l], for R x V vectors, `count` columns of them.
template <int R, int V, bool DROPS, class T, int COUNT>
void gradient_tile(
    const Block<T, COUNT>& block, int64_t rows, int64_t l, int64_t count, const float* const* coefficients, int64_t rank, float factor,
    float* gradient, int64_t stride) {
  Floats total[R][V] = {};
  for (int64_t i = 0; i < rows; ++i) {
    Floats value[V];
    for (int j = 0; j < V; ++j) value[j] = block.template load<DROPS>(i, l + j * WIDTH, V == 1 ? count : WIDTH);
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < V; ++j) total[r][j] += coefficients[i][rank + r] * value[j];
    }
  }
  for (int r = 0; r < R; ++r) {
    float* sum = gradient + (rank + r) * stride + l;
    for (int j = 0; j < V; ++j) store(sum + j * WIDTH, load(sum + j * WIDTH) + factor * total[r][j]);
  }
}

/// v[i][l] += change where kept, for one vector or the `count` columns that are left.
template <bool DROPS, class T, int COUNT>
inline void add_to(const Block<T, COUNT>& block, int64_t i, int64_t l, int64_t count, Floats change) {
  if (DROPS) change = kept(change, block.keep[i], block.column + l);
  T* to = block.v[i] + l;
  if (count >= WIDTH) {
    store(to, load(to) + change);
  } else {
    store_some(to, load_some(to, count) + change, count);
  }
}

/// v[i][l] += factor · sum over ranks of coefficients[i][r] panel[r][l] where kept, for I x V vectors, `count` columns of them.
template <int I, int V, bool DROPS, class T, int COUNT>
void add_tile(
    const Block<T, COUNT>& block, int64_t l, int64_t count, const float* const* coefficients, int64_t rank, const float* panel,
    int64_t stride, float factor) {
  Floats total[I][V] = {};
  for (int64_t begin = 0; begin < rank; begin += RANK_BLOCK) {
    Floats sum[I][V] = {};
    for (int64_t r = begin; r < at_most(begin + RANK_BLOCK, rank); ++r) {
      Floats p[V];
      for (int j = 0; j < V; ++j) p[j] = load(panel + r * stride + l + j * WIDTH);
      for (int i = 0; i < I; ++i) {
        for (int j = 0; j < V; ++j) sum[i][j] += coefficients[i][r] * p[j];
      }
    }
    for (int i = 0; i < I; ++i) {
      for (int j = 0; j < V; ++j) total[i][j] += sum[i][j];
    }
  }
  for (int i = 0; i < I; ++i) {
    for (int j = 0; j < V; ++j) add_to<DROPS>(block, i, l + j * WIDTH, V == 1 ? count : WIDTH, factor * total[i][j]);
  }
}

#if defined(__AVX512BF16__)
// The same tiles where v is bfloat16: two products a lane. Pairs run along what is summed.

constexpr int PAIR_RANKS = 8;  // of a gradient tile, beside two vectors of 16 columns

/// Which of the 32 columns from l on are there and kept.
template <bool DROPS, int COUNT>
inline __mmask32 lanes_of(const Block<const BFloat16, COUNT>& block, int64_t i, int64_t l, int64_t count) {
  __mmask32 lanes = lanes_below(count);
  if (DROPS) {
    uint32_t bits;
    __builtin_memcpy(&bits, block.keep[i] + (block.column + l) / 8, sizeof(bits));
    lanes &= bits;
  }
  return lanes;
}

template <int I, int R, bool DROPS, int COUNT>
void project_tile(
    const Block<const BFloat16, COUNT>& block, int64_t row, const BFloat16* panel, int64_t stride, int64_t columns, float factor, bool first,
    float* const* projected) {
  constexpr int SUMS = (I * R + WIDTH - 1) / WIDTH * WIDTH;
  Floats total[SUMS] = {};
  for (int64_t l = 0; l < columns; l += 32) {
    __m512i p[R];
    for (int r = 0; r < R; ++r) p[r] = _mm512_loadu_si512(panel + r * stride + l);
    for (int i = 0; i < I; ++i) {
      const __m512i value = load_pairs(block.v[row + i] + l, lanes_of<DROPS>(block, row + i, l, columns - l));
      for (int r = 0; r < R; ++r) total[i * R + r] = dot(total[i * R + r], value, p[r]);
    }
  }
  float flat[SUMS];
  for (int i = 0; i < SUMS; i += WIDTH) store(flat + i, sums(total + i));
  for (int i = 0; i < I; ++i) {
    for (int r = 0; r < R; ++r) projected[i][r] = factor * flat[i * R + r] + (first ? 0 : projected[i][r]);
  }
}

/// sum[0 .. 31] += factor · the sums of 32 columns whose pairs are of _mm512_unpacklo_epi16 and _mm512_unpackhi_epi16.
inline void add_unpacked(float* sum, Floats low, Floats high, float factor) {
  // unpack works within quarters: a quarter of `low` holds the first four of its eight columns, of `high` the others.
  const __m512i left = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i right = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  store(sum, load(sum) + factor * (Floats)_mm512_permutex2var_ps((__m512)low, left, (__m512)high));
  store(sum + WIDTH, load(sum + WIDTH) + factor * (Floats)_mm512_permutex2var_ps((__m512)low, right, (__m512)high));
}

/// For PAIR_RANKS ranks, of which R are there, and 32 columns, `count` of them there.
template <int R, bool DROPS, int COUNT>
void gradient_pairs(
    const Block<const BFloat16, COUNT>& block, int64_t rows, int64_t l, int64_t count, const uint32_t (*coefficients)[PAIR_RANKS], float factor,
    float* gradient, int64_t stride) {
  Floats total[R][2] = {};
  for (int64_t i = 0; i < rows; i += 2) {
    const __m512i first = load_pairs(block.v[i] + l, lanes_of<DROPS>(block, i, l, count));
    const __m512i second = i + 1 < rows ? load_pairs(block.v[i + 1] + l, lanes_of<DROPS>(block, i + 1, l, count)) : __m512i{};
    const __m512i low = _mm512_unpacklo_epi16(first, second), high = _mm512_unpackhi_epi16(first, second);
    for (int r = 0; r < R; ++r) {
      const __m512i c = _mm512_set1_epi32(static_cast<int>(coefficients[i / 2][r]));
      total[r][0] = dot(total[r][0], low, c);
      total[r][1] = dot(total[r][1], high, c);
    }
  }
  for (int r = 0; r < R; ++r) add_unpacked(gradient + r * stride + l, total[r][0], total[r][1], factor);
}

template <int I, int V, bool DROPS, int COUNT>
void add_tile(
    const Block<BFloat16, COUNT>& block, int64_t l, int64_t count, const BFloat16* const* coefficients, int64_t rank, const uint32_t* panel,
    int64_t stride, float factor) {
  Floats total[I][V] = {};
  for (int64_t pair = 0; 2 * pair < rank; ++pair) {
    __m512i p[V];
    for (int j = 0; j < V; ++j) p[j] = _mm512_loadu_si512(panel + pair * stride + l + j * WIDTH);
    for (int i = 0; i < I; ++i) {
      uint32_t both;
      __builtin_memcpy(&both, coefficients[i] + 2 * pair, sizeof(both));
      const __m512i c = _mm512_set1_epi32(static_cast<int>(both));
      for (int j = 0; j < V; ++j) total[i][j] = dot(total[i][j], p[j], c);
    }
  }
  for (int i = 0; i < I; ++i) {
    for (int j = 0; j < V; ++j) add_to<DROPS>(block, i, l + j * WIDTH, V == 1 ? count : WIDTH, factor * total[i][j]);
  }
}
#endif

template <bool DROPS, bool DOTS, class T>
void gradient_of_block(
    const Block<const T, ROW_BLOCK>& block, int64_t rows, int64_t columns, const Small<DOTS>* const* coefficients, int64_t rank, float factor,
    float* gradient, int64_t stride) {
  if constexpr (DOTS) {
#if defined(__AVX512BF16__)
    for (int64_t r = 0; r < rank; r += PAIR_RANKS) {
      alignas(64) uint32_t pairs[ROW_BLOCK / 2][PAIR_RANKS];
      for (int64_t i = 0; i < rows; i += 2) {
        const __m128i first = read<__m128i>(coefficients[i] + r);
        const __m128i second = i + 1 < rows ? read<__m128i>(coefficients[i + 1] + r) : __m128i{};
        write(pairs[i / 2], _mm_unpacklo_epi16(first, second));
        write(pairs[i / 2] + 4, _mm_unpackhi_epi16(first, second));
      }
      with_count<PAIR_RANKS>(at_most(PAIR_RANKS, rank - r), [&](auto ranks) {
        for (int64_t l = 0; l < columns; l += 32) {
          gradient_pairs<ranks(), DROPS>(block, rows, l, columns - l, pairs, factor, gradient + r * stride, stride);
        }
      });
    }
#endif
  } else {
    int64_t l = 0;
    for (; l + VECTORS * WIDTH <= columns; l += VECTORS * WIDTH) {
      for (int64_t r = 0; r < rank; r += RANKS) {
        with_count<RANKS>(at_most(RANKS, rank - r), [&](auto ranks) {
          gradient_tile<ranks(), VECTORS, DROPS>(block, rows, l, WIDTH, coefficients, r, factor, gradient, stride);
        });
      }
    }
    for (; l < columns; l += WIDTH) {
      for (int64_t r = 0; r < rank; r += RANKS) {
        with_count<RANKS>(at_most(RANKS, rank - r), [&](auto ranks) {
          gradient_tile<ranks(), 1, DROPS>(block, rows, l, columns - l, coefficients, r, factor, gradient, stride);
        });
      }
    }
  }
}

/// The places begin to end of one adapter, and columns of v.
struct Part {
  const Segment& segment;
  int64_t begin, end;
  int64_t column, columns;
  bool first;  // what it projects begins with it
};

template <bool DROPS, bool DOTS, class T>
void read_part(const Read& pass, const Part& part) {
  const Segment& segment = part.segment;
  const Small<DOTS>* panel = static_cast<const Small<DOTS>*>(pass.panel);
  if (panel) panel += segment.panel_row * pass.panel_stride + part.column;
  const int64_t rows = part.end - part.begin;
  Block<const T, ROW_BLOCK> block;
  const Small<DOTS>* coefficients[ROW_BLOCK];
  float* projected[ROW_BLOCK];
  block.column = part.column;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = row_at(pass.order, part.begin + i);
    block.v[i] = static_cast<const T*>(pass.v) + row * pass.stride + part.column;
    if (DROPS) block.keep[i] = pass.keep + (segment.first_row + row) * pass.keep_stride;
    if (pass.coefficients) {
      coefficients[i] = static_cast<const Small<DOTS>*>(pass.coefficients) + (segment.first_row + row) * pass.coefficient_stride;
    }
    if (panel) projected[i] = pass.projected + (segment.first_row + row) * pass.projected_stride;
  }
  const float factor = DROPS ? segment.factor : 1;
  for (int64_t i = 0; panel && i < rows; i += ROWS) {
    with_count<ROWS>(at_most(ROWS, rows - i), [&](auto count) {
      for (int64_t r = 0; r < segment.rank; r += RANKS) {
        float* out[ROWS];
        for (int k = 0; k < count(); ++k) out[k] = projected[i + k] + r;
        with_count<RANKS>(at_most(RANKS, segment.rank - r), [&](auto ranks) {
          project_tile<count(), ranks(), DROPS>(
              block, i, panel + r * pass.panel_stride, pass.panel_stride, part.columns, factor, part.first, out);
        });
      }
    });
  }
  if (pass.coefficients) {
    float* gradient = pass.gradient + segment.gradient_row * pass.gradient_stride + part.column;
    gradient_of_block<DROPS, DOTS, T>(block, rows, part.columns, coefficients, segment.rank, factor, gradient, pass.gradient_stride);
  }
}

template <bool DROPS, bool DOTS, class T>
void add_part(const Add& pass, const Part& part) {
  const Segment& segment = part.segment;
  using Panel = std::conditional_t<DOTS, uint32_t, float>;
  const Panel* panel = static_cast<const Panel*>(pass.panel) + (DOTS ? segment.pair_row : segment.panel_row) * pass.panel_stride + part.column;
  const int64_t rows = part.end - part.begin;
  Block<T, ROWS> block;
  const Small<DOTS>* coefficients[ROWS];
  block.column = part.column;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = row_at(pass.order, part.begin + i);
    block.v[i] = static_cast<T*>(pass.v) + row * pass.stride + part.column;
    if (DROPS) block.keep[i] = pass.keep + (segment.first_row + row) * pass.keep_stride;
    coefficients[i] = static_cast<const Small<DOTS>*>(pass.coefficients) + (segment.first_row + row) * pass.coefficient_stride;
  }
  with_count<ROWS>(rows, [&](auto count) {
    int64_t l = 0;
    for (; l + VECTORS * WIDTH <= part.columns; l += VECTORS * WIDTH) {
      add_tile<count(), VECTORS, DROPS>(block, l, WIDTH, coefficients, segment.rank, panel, pass.panel_stride, segment.factor);
    }
    for (; l < part.columns; l += WIDTH) {
      add_tile<count(), 1, DROPS>(block, l, part.columns - l, coefficients, segment.rank, panel, pass.panel_stride, segment.factor);
    }
  });
}

/// Calls body(whether elements are dropped, whether products are dots, a null pointer of v's type).
template <class Pass, class Body>
void with_types(const Pass& pass, const Segment& segment, const Body& body) {
  const auto with_drops = [&](auto drops) {
    switch (pass.kind) {
      case Kind::FLOAT32: return body(drops, std::false_type{}, static_cast<float*>(nullptr));
      case Kind::FLOAT16: return body(drops, std::false_type{}, static_cast<Float16*>(nullptr));
      case Kind::BFLOAT16:
        if constexpr (HAS_DOTS) {
          if (pass.dots) return body(drops, std::true_type{}, static_cast<BFloat16*>(nullptr));
        }
        return body(drops, std::false_type{}, static_cast<BFloat16*>(nullptr));
    }
  };
  if (pass.keep && segment.threshold != 0) return with_drops(std::true_type{});
  with_drops(std::false_type{});
}

/// Calls body(part) for every adapter's share of every block of the cell. What adapters share of a block is still in the cache.
template <int64_t BLOCK, class Body>
void for_each_part(const Segments& segments, const Cell& cell, const Body& body) {
  for (int64_t column = cell.column_begin; column < cell.column_end; column += COLUMN_BLOCK) {
    const int64_t columns = at_most(COLUMN_BLOCK, cell.column_end - column);
    for (int64_t place = cell.begin; place < cell.end; place += BLOCK) {
      const int64_t last = at_most(place + BLOCK, cell.end);
      for (int64_t i = 0; i < segments.count; ++i) {
        const Segment& segment = segments.first[i];
        const int64_t begin = segment.begin > place ? segment.begin : place, end = at_most(segment.end, last);
        if (begin < end) body(Part{segment, begin, end, column, columns, column == cell.column_begin});
      }
    }
  }
}

void draw(const Draw& pass, const Segments& segments, const Cell& cell) {
  for_each_part<ROW_BLOCK>(segments, cell, [&](const Part& part) {
    if (part.segment.threshold == 0) return;
    for (int64_t place = part.begin; place < part.end; ++place) {
      const int64_t row = row_at(pass.order, place);
      uint8_t* keep = pass.keep + (part.segment.first_row + row) * pass.keep_stride;
      draw_keep(part.segment.seed, part.segment.threshold, row, (pass.width + 7) / 8, part.column, part.column + part.columns, keep);
    }
  });
}

void read_pass(const Read& pass, const Segments& segments, const Cell& cell) {
  for_each_part<ROW_BLOCK>(segments, cell, [&](const Part& part) {
    with_types(pass, part.segment, [&](auto drops, auto dots, auto* type) {
      read_part<drops(), dots(), std::remove_pointer_t<decltype(type)>>(pass, part);
    });
  });
}

void add_pass(const Add& pass, const Segments& segments, const Cell& cell) {
  for_each_part<ROWS>(segments, cell, [&](const Part& part) {
    with_types(pass, part.segment, [&](auto drops, auto dots, auto* type) {
      add_part<drops(), dots(), std::remove_pointer_t<decltype(type)>>(pass, part);
    });
  });
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

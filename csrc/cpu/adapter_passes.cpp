// The passes of adapter_passes.h. setup.py compiles this file once per instruction set, with FASTLORA_ISA naming the namespace.
#include "adapter_passes.h"

#include "vector.h"

namespace fastlora::FASTLORA_ISA {
namespace {

// Register tiles: ROWS x RANKS accumulators in a projection, RANKS x VECTORS and ROWS x VECTORS where columns are the lanes.
#if defined(__AVX512F__)
constexpr int ROWS = 4, RANKS = 4, VECTORS = 4;
#else
constexpr int ROWS = 4, RANKS = 2, VECTORS = 2;  // 16 registers
#endif

constexpr int64_t ROW_BLOCK = 16;
constexpr int64_t COLUMN_BLOCK = 512;  // a tile of 16 x 512 floats stays in the first-level cache
static_assert(COLUMN_BLOCK % COLUMN_UNIT == 0 && COLUMN_UNIT % (VECTORS * WIDTH) == 0 && COLUMN_UNIT % DECISIONS == 0);

inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

inline int64_t row_at(const Rows& rows, int64_t place) { return rows.order ? rows.order[place] : place; }

/// to[0 : count] = from[0 : count] in float32, scaled and dropped where a mask is given; zeros up to a multiple of COLUMN_UNIT.
template <class T>
void widen(const T* from, int64_t count, const uint32_t* keep, float factor, float* to) {
  const auto put = [&](int64_t i, Floats value) {
    if (keep) value = (Floats)((Words)(value * factor) & read<Words>(keep + i));
    store(to + i, value);
  };
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) put(i, load(from + i));
  if (i < count) {
    put(i, load_some(from + i, count - i));
    i += WIDTH;
  }
  for (; i < round_up(count, COLUMN_UNIT); i += WIDTH) store(to + i, Floats{});
}

/// projected[i][r] (+)= sum over columns of v[i][l] panel[r][l], for one register tile.
template <int I, int R>
void project_tile(const float* const* v, const float* panel, int64_t panel_stride, int64_t columns, float* const* projected, bool first) {
  constexpr int SUMS = (I * R + WIDTH - 1) / WIDTH * WIDTH;
  Floats total[SUMS] = {};
  for (int64_t l = 0; l < columns; l += WIDTH) {
    Floats p[R];
    for (int r = 0; r < R; ++r) p[r] = load(panel + r * panel_stride + l);
    for (int i = 0; i < I; ++i) {
      const Floats value = load(v[i] + l);
      for (int r = 0; r < R; ++r) total[i * R + r] += value * p[r];
    }
  }
  float flat[SUMS];
  for (int i = 0; i < SUMS; i += WIDTH) store(flat + i, sums(total + i));
  for (int i = 0; i < I; ++i) {
    for (int r = 0; r < R; ++r) projected[i][r] = first ? flat[i * R + r] : projected[i][r] + flat[i * R + r];
  }
}

/// gradient[r][l] += sum over rows of coefficients[i][r] v[i][l], for RANKS x VECTORS vectors. The rows of a block are summed by themselves, so
/// that rounding grows with the number of blocks, not of rows.
template <int R>
void gradient_tile(const float* const* v, const float* const* coefficients, int64_t rows, float* gradient, int64_t stride) {
  Floats total[R][VECTORS] = {};
  for (int64_t i = 0; i < rows; ++i) {
    Floats value[VECTORS];
    for (int j = 0; j < VECTORS; ++j) value[j] = load(v[i] + j * WIDTH);
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < VECTORS; ++j) total[r][j] += coefficients[i][r] * value[j];
    }
  }
  for (int r = 0; r < R; ++r) {
    float* sum = gradient + r * stride;
    for (int j = 0; j < VECTORS; ++j) store(sum + j * WIDTH, load(sum + j * WIDTH) + total[r][j]);
  }
}

/// out[i][l] = sum over ranks of coefficients[i][r] panel[r][l], for I x VECTORS vectors.
template <int I>
void expand_tile(const float* const* coefficients, int64_t rank, const float* panel, int64_t stride, float* const* out) {
  Floats total[I][VECTORS] = {};
  for (int64_t r = 0; r < rank; ++r) {
    Floats p[VECTORS];
    for (int j = 0; j < VECTORS; ++j) p[j] = load(panel + r * stride + j * WIDTH);
    for (int i = 0; i < I; ++i) {
      for (int j = 0; j < VECTORS; ++j) total[i][j] += coefficients[i][r] * p[j];
    }
  }
  for (int i = 0; i < I; ++i) {
    for (int j = 0; j < VECTORS; ++j) store(out[i] + j * WIDTH, total[i][j]);
  }
}

/// Calls body with the compile-time number that equals count, 1 to MOST.
template <int MOST, class Body>
inline void with_count(int64_t count, const Body& body) {
  if constexpr (MOST > 1) {
    if (count < MOST) return with_count<MOST - 1>(count, body);
  }
  body(std::integral_constant<int, MOST>{});
}

template <class T>
void read_cell(const Read& pass, const Segment& segment, const Cell& cell) {
  alignas(64) float tile[ROW_BLOCK * COLUMN_BLOCK];
  alignas(64) uint32_t keep[COLUMN_BLOCK];
  const int64_t groups = (pass.width + 7) / 8;
  const float* panel = pass.panel ? pass.panel + segment.panel_row * pass.panel_stride : nullptr;
  float* gradient = pass.coefficients ? pass.gradient + segment.panel_row * pass.panel_stride : nullptr;
  const bool drops = segment.threshold != 0;
  for (int64_t column = cell.column_begin; column < cell.column_end; column += COLUMN_BLOCK) {
    const int64_t columns = at_most(COLUMN_BLOCK, cell.column_end - column);
    const int64_t padded = round_up(columns, COLUMN_UNIT);
    for (int64_t place = cell.begin; place < cell.end; place += ROW_BLOCK) {
      const int64_t rows = at_most(ROW_BLOCK, cell.end - place);
      const float* v[ROW_BLOCK];
      const float* coefficients[ROW_BLOCK];
      float* projected[ROW_BLOCK];
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = row_at(pass, place + i);
        if (drops) draw_keep(pass.seed, segment.threshold, row, groups, column, column + columns, keep);
        const T* from = static_cast<const T*>(pass.v) + row * pass.stride + column;
        widen(from, columns, drops ? keep : nullptr, segment.factor, tile + i * COLUMN_BLOCK);
        v[i] = tile + i * COLUMN_BLOCK;
        if (gradient) coefficients[i] = pass.coefficients + row * pass.coefficient_stride;
        if (panel) projected[i] = pass.projected + row * pass.projected_stride;
      }
      const bool first = column == cell.column_begin;
      for (int64_t r = 0; panel && r < segment.rank; r += RANKS) {
        const float* ranks_of_panel = panel + r * pass.panel_stride + column;
        with_count<RANKS>(at_most(RANKS, segment.rank - r), [&](auto ranks) {
          for (int64_t i = 0; i < rows; i += ROWS) {
            float* out[ROWS];
            for (int64_t k = 0; k < at_most(ROWS, rows - i); ++k) out[k] = projected[i + k] + r;
            with_count<ROWS>(at_most(ROWS, rows - i), [&](auto count) {
              project_tile<count(), ranks()>(v + i, ranks_of_panel, pass.panel_stride, padded, out, first);
            });
          }
        });
      }
      for (int64_t r = 0; gradient && r < segment.rank; r += RANKS) {
        const float* factors[ROW_BLOCK];
        for (int64_t i = 0; i < rows; ++i) factors[i] = coefficients[i] + r;
        with_count<RANKS>(at_most(RANKS, segment.rank - r), [&](auto ranks) {
          for (int64_t l = 0; l < padded; l += VECTORS * WIDTH) {
            const float* values[ROW_BLOCK];
            for (int64_t i = 0; i < rows; ++i) values[i] = v[i] + l;
            gradient_tile<ranks()>(values, factors, rows, gradient + r * pass.panel_stride + column + l, pass.panel_stride);
          }
        });
      }
    }
  }
}

/// to[0 : count] += factor · change, dropped where a mask is given.
template <class T>
void add_row(T* to, int64_t count, const float* change, const uint32_t* keep, float factor) {
  const auto changed = [&](int64_t i, Floats old) {
    const Floats value = load(change + i) * factor;
    return keep ? old + (Floats)((Words)value & read<Words>(keep + i)) : old + value;
  };
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) store(to + i, changed(i, load(to + i)));
  if (i < count) store_some(to + i, changed(i, load_some(to + i, count - i)), count - i);
}

template <class T>
void add_cell(const Add& pass, const Segment& segment, const Cell& cell) {
  alignas(64) float change[ROWS * COLUMN_BLOCK];
  alignas(64) uint32_t keep[COLUMN_BLOCK];
  const int64_t groups = (pass.width + 7) / 8;
  const float* panel = pass.panel + segment.panel_row * pass.panel_stride;
  const bool drops = segment.threshold != 0;
  for (int64_t column = cell.column_begin; column < cell.column_end; column += COLUMN_BLOCK) {
    const int64_t columns = at_most(COLUMN_BLOCK, cell.column_end - column);
    for (int64_t place = cell.begin; place < cell.end; place += ROWS) {
      const int64_t rows = at_most(ROWS, cell.end - place);
      const float* coefficients[ROWS];
      for (int64_t i = 0; i < rows; ++i) coefficients[i] = pass.coefficients + row_at(pass, place + i) * pass.coefficient_stride;
      with_count<ROWS>(rows, [&](auto count) {
        for (int64_t l = 0; l < columns; l += VECTORS * WIDTH) {
          float* out[ROWS];
          for (int64_t i = 0; i < rows; ++i) out[i] = change + i * COLUMN_BLOCK + l;
          expand_tile<count()>(coefficients, segment.rank, panel + column + l, pass.panel_stride, out);
        }
      });
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = row_at(pass, place + i);
        if (drops) draw_keep(pass.seed, segment.threshold, row, groups, column, column + columns, keep);
        T* to = static_cast<T*>(pass.v) + row * pass.stride + column;
        add_row(to, columns, change + i * COLUMN_BLOCK, drops ? keep : nullptr, segment.factor);
      }
    }
  }
}

void read_pass(const Read& pass, const Segment& segment, const Cell& cell) {
  switch (pass.kind) {
    case Kind::FLOAT32: return read_cell<float>(pass, segment, cell);
    case Kind::BFLOAT16: return read_cell<BFloat16>(pass, segment, cell);
    case Kind::FLOAT16: return read_cell<Float16>(pass, segment, cell);
  }
}

void add_pass(const Add& pass, const Segment& segment, const Cell& cell) {
  switch (pass.kind) {
    case Kind::FLOAT32: return add_cell<float>(pass, segment, cell);
    case Kind::BFLOAT16: return add_cell<BFloat16>(pass, segment, cell);
    case Kind::FLOAT16: return add_cell<Float16>(pass, segment, cell);
  }
}

}  // namespace

#define FASTLORA_TEXT(name) #name
#define FASTLORA_NAME_OF(name) FASTLORA_TEXT(name)
extern const Kernels passes;
const Kernels passes = {FASTLORA_NAME_OF(FASTLORA_ISA), read_pass, add_pass};

}  // namespace fastlora::FASTLORA_ISA

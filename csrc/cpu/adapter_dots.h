// The adapters' products where v is bfloat16 and the instruction set has dot products of it: two products a lane. Pairs run along what is summed.
// Compiled once per instruction set, as vector.h.
#pragma once

#include "adapter_block.h"
#include "few_rows.h"
#include "kernels.h"
#include "vector.h"

#if defined(__AVX512BF16__)
namespace fastlora::FASTLORA_ISA {
namespace {

// Register tiles: ROWS x RANKS sums in a projection, ROWS x VECTORS where columns are the lanes.
constexpr int ROWS = 4, RANKS = 4, VECTORS = 4;
constexpr int PAIR_RANKS = 8;  // of a gradient tile, beside two vectors of 16 columns

/// Which of the 32 columns from l on are there and kept.
template <bool DROPS, class T, int COUNT>
inline __mmask32 lanes_of(const Block<T, COUNT>& block, int64_t i, int64_t l, int64_t count) {
  __mmask32 lanes = lanes_below(count);
  if (DROPS) {
    uint32_t bits;
    __builtin_memcpy(&bits, block.keep[i] + (block.column + l) / 8, sizeof(bits));
    lanes &= bits;
  }
  return lanes;
}

/// 32 numbers that lie together, or the `count` that are there.
template <class T>
inline __m512i load_depth(const T* from, int64_t count) {
  if constexpr (std::is_same_v<T, BFloat16>) return load_pairs(from, lanes_below(count));
  const Floats low = load_up_to(from, count), high = count > WIDTH ? load_up_to(from + WIDTH, count - WIDTH) : Floats{};
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

/// Number 2 p of 16 lanes that lie together beside number 2 p + 1 of each.
template <class T>
inline __m512i load_lanes(const Pairs& pairs, int64_t p) {
  const auto of_number = [&](int64_t k) {
    const T* from = static_cast<const T*>(pairs.from) + k * pairs.depth_stride;
    if constexpr (std::is_same_v<T, BFloat16>) {
      return k < pairs.depth ? _mm256_maskz_loadu_epi16(first_lanes(pairs.lanes), from) : __m256i{};
    } else {
      return k < pairs.depth ? (__m256i)_mm512_cvtneps_pbh((__m512)load_up_to(from, pairs.lanes)) : __m256i{};
    }
  };
  return _mm512_or_si512(_mm512_cvtepu16_epi32(of_number(2 * p)), _mm512_slli_epi32(_mm512_cvtepu16_epi32(of_number(2 * p + 1)), 16));
}

template <class T>
void pack_pairs_of(const Pairs& pairs) {
  const bool lanes_lie_together = pairs.lane_stride == 1 && pairs.depth_stride != 1;
  Floats block[WIDTH];
  for (int64_t i = 0; i < WIDTH; ++i) {
    if (lanes_lie_together) {
      block[i] = (Floats)load_lanes<T>(pairs, i);
    } else if (i >= pairs.lanes) {
      block[i] = Floats{};
    } else {
      const T* lane = static_cast<const T*>(pairs.from) + i * pairs.lane_stride;
      T together[TILE_DEPTH];
      if (pairs.depth_stride != 1) {
        for (int64_t k = 0; k < pairs.depth; ++k) together[k] = lane[k * pairs.depth_stride];
        lane = together;
      }
      block[i] = (Floats)load_depth(lane, pairs.depth);
    }
  }
  if (lanes_lie_together == pairs.by_lane) transpose(block);
  for (int64_t i = 0; i < pairs.rows; ++i) write(pairs.to + i * pairs.row_stride, block[i]);
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

/// What read_floats computes; panel rows lie `panel_stride` apart.
template <bool DROPS>
void read_dots(
    const Block<const BFloat16, ROW_BLOCK>& block, int64_t rows, int64_t columns, int64_t rank, float factor, bool first, const BFloat16* panel,
    int64_t panel_stride, float* const* projected, const BFloat16* const* coefficients, float* gradient, int64_t gradient_stride) {
  for (int64_t i = 0; panel && i < rows; i += ROWS) {
    with_count<ROWS>(at_most(ROWS, rows - i), [&](auto count) {
      for (int64_t r = 0; r < rank; r += RANKS) {
        float* out[ROWS];
        for (int k = 0; k < count(); ++k) out[k] = projected[i + k] + r;
        with_count<RANKS>(at_most(RANKS, rank - r), [&](auto ranks) {
          project_tile<count(), ranks(), DROPS>(block, i, panel + r * panel_stride, panel_stride, columns, factor, first, out);
        });
      }
    });
  }
  for (int64_t r = 0; coefficients && r < rank; r += PAIR_RANKS) {
    alignas(64) uint32_t pairs[ROW_BLOCK / 2][PAIR_RANKS];
    for (int64_t i = 0; i < rows; i += 2) {
      const __m128i first_row = read<__m128i>(coefficients[i] + r);
      const __m128i second_row = i + 1 < rows ? read<__m128i>(coefficients[i + 1] + r) : __m128i{};
      write(pairs[i / 2], _mm_unpacklo_epi16(first_row, second_row));
      write(pairs[i / 2] + 4, _mm_unpackhi_epi16(first_row, second_row));
    }
    with_count<PAIR_RANKS>(at_most(PAIR_RANKS, rank - r), [&](auto ranks) {
      for (int64_t l = 0; l < columns; l += 32) {
        gradient_pairs<ranks(), DROPS>(block, rows, l, columns - l, pairs, factor, gradient + r * gradient_stride, gradient_stride);
      }
    });
  }
}

/// What add_floats computes, of ROWS rows at most; the panel holds pairs of ranks.
template <bool DROPS>
void add_dots(
    const Block<BFloat16, ROWS>& block, int64_t rows, int64_t columns, int64_t rank, float factor, const uint32_t* panel, int64_t panel_stride,
    const BFloat16* const* coefficients) {
  with_count<ROWS>(rows, [&](auto count) {
    int64_t l = 0;
    for (; l + VECTORS * WIDTH <= columns; l += VECTORS * WIDTH) {
      add_tile<count(), VECTORS, DROPS>(block, l, WIDTH, coefficients, rank, panel, panel_stride, factor);
    }
    for (; l < columns; l += WIDTH) add_tile<count(), 1, DROPS>(block, l, columns - l, coefficients, rank, panel, panel_stride, factor);
  });
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA
#endif

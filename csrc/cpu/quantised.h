// Weights in 4 bits or 8, made floating-point numbers again a vector at a time: into memory, or straight into the dot products of a few rows.
// Compiled once per instruction set, as vector.h.
#pragma once

#include "few_rows.h"
#include "kernels.h"
#include "rows.h"
#include "vector.h"

namespace fastlora::FASTLORA_ISA {
namespace {

/// The factor of a block. The product is rounded by itself: as one expression it would be a fused multiplication and addition.
inline float factor_of(const Quantised& weight, int64_t block) {
  if (!weight.factor_codes) return weight.factor[block];
  const volatile float product = weight.factor_code[weight.factor_codes[block]] * weight.factor[block / weight.factor_block];
  return product + weight.factor_offset;
}

/// code[q] of the WIDTH elements in WIDTH / 2 bytes.
inline Floats decoded(const uint8_t* from, const float* code) {
#if defined(__AVX512F__)
  const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  const __m512i numbers = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));  // the higher bits are not looked at
  return (Floats)_mm512_permutexvar_ps(numbers, _mm512_loadu_ps(code));
#elif defined(__AVX2__)
  const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(read<int>(from)));
  const __m256i numbers = _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(code), numbers), high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(code + 8), numbers);
  return (Floats)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(numbers, 28)));  // by bit 3 of each number
#else
  Floats values;
  for (int i = 0; i < WIDTH; ++i) values[i] = code[i % 2 ? from[i / 2] & 15 : from[i / 2] >> 4];
  return values;
#endif
}

/// The WIDTH elements from `place` on, or the `count` that are left, without their factor.
template <bool FOUR_BITS>
inline Floats elements(const Quantised& weight, int64_t place, int64_t count) {
  const uint8_t* from = weight.packed + (FOUR_BITS ? place / 2 : place);
  constexpr int64_t BYTES = FOUR_BITS ? WIDTH / 2 : WIDTH;
  uint8_t some[BYTES] = {};
  if (count < WIDTH) {
    const int64_t bytes = FOUR_BITS ? (count + 1) / 2 : count;
    for (int64_t i = 0; i < bytes; ++i) some[i] = from[i];
    from = some;
  }
  if constexpr (FOUR_BITS) return decoded(from, weight.code);
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(read<__m128i>(from)));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(__builtin_convertvector(read<Bytes>(from), Integers), Floats);
#endif
}

/// Calls body(place, count, block) for the parts of a row's columns that lie in one block each.
template <class Body>
inline void for_each_block(const Quantised& weight, int64_t row, int64_t column_begin, int64_t column_end, const Body& body) {
  const int64_t begin = row * weight.in + column_begin, end = row * weight.in + column_end;
  int64_t block = begin / weight.block;
  for (int64_t place = begin; place < end; ++block) {
    const int64_t next = (block + 1) * weight.block, last = next < end ? next : end;
    body(place, last - place, block);
    place = last;
  }
}

// Stored as they are, unlike with the instructions for bfloat16, which take a subnormal number for zero.
template <class T>
inline void store_exactly(T* to, Floats value) {
  store(to, value);
}
inline void store_exactly(BFloat16* to, Floats value) { write(to, __builtin_convertvector(to_bfloat16(value), Halves)); }

template <bool FOUR_BITS, class T>
void dequantise_rows(const Dequantise& task, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* to = static_cast<T*>(task.to) + (row - task.first_row) * task.to_stride;
    for_each_block(task.weight, row, task.column_begin, task.column_end, [&](int64_t place, int64_t count, int64_t block) {
      const float factor = factor_of(task.weight, block);
      for_each_vector(count, [&](int64_t l, int64_t left) __attribute__((always_inline)) {
        const Floats value = elements<FOUR_BITS>(task.weight, place + l, left) * factor;
        if (left >= WIDTH) return store_exactly(to + l, value);
        T some[WIDTH];
        store_exactly(some, value);
        for (int64_t i = 0; i < left; ++i) to[l + i] = some[i];
      });
      to += count;
    });
  }
}

void dequantise(const Dequantise& task, int64_t begin, int64_t end) {
  with_kind(task.kind, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    task.weight.code ? dequantise_rows<true, T>(task, begin, end) : dequantise_rows<false, T>(task, begin, end);
  });
}

/// sum[i G + g] += x[i] · W[g] over the STEP columns from `column` on, or the `left` that there are, which lie in one block of each of G rows of W.
template <int I, int G, bool FOUR_BITS, class T>
struct FewRowsStep {
  static constexpr int64_t STEP = WIDTH;

  static inline __attribute__((always_inline)) void add(
      const Quantised& weight, int64_t place, const Floats* factor, const T* const* x, int64_t column, int64_t left, Floats* sum) {
    Floats rows[G], values[I];
    for_each<G>([&](auto g) __attribute__((always_inline)) {
      T some[WIDTH];
      store(some, elements<FOUR_BITS>(weight, place + g * weight.in, left) * factor[g]);
      rows[g] = load(some);
    });
    for_each<I>([&](auto i) __attribute__((always_inline)) { values[i] = load_up_to(x[i] + column, left); });
    for_each<I * G>([&](auto j) __attribute__((always_inline)) { sum[j] += values[j / G] * rows[j % G]; });
  }
};

#if defined(__AVX512BF16__)
/// The same in bfloat16: two products a lane.
template <int I, int G, bool FOUR_BITS>
struct FewRowsStep<I, G, FOUR_BITS, BFloat16> {
  static constexpr int64_t STEP = 2 * WIDTH;

  static inline __attribute__((always_inline)) void add(
      const Quantised& weight, int64_t place, const Floats* factor, const BFloat16* const* x, int64_t column, int64_t left, Floats* sum) {
    const __mmask32 lanes = lanes_below(left);
    __m512i rows[G], values[I];
    for_each<G>([&](auto g) __attribute__((always_inline)) {
      const int64_t first = place + g * weight.in;
      const Floats low = elements<FOUR_BITS>(weight, first, left) * factor[g];
      const Floats high = elements<FOUR_BITS>(weight, first + WIDTH, left - WIDTH) * factor[g];
      rows[g] = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    });
    for_each<I>([&](auto i) __attribute__((always_inline)) { values[i] = load_pairs(x[i] + column, lanes); });
    for_each<I * G>([&](auto j) __attribute__((always_inline)) { sum[j] = dot(sum[j], values[j / G], rows[j % G]); });
  }
};
#endif

/// The columns n to n + G of y, for I rows. Several at once only where the blocks of the weight's rows begin alike.
template <int I, int G, bool FOUR_BITS, class T>
void few_rows_quantised_tile(const FewRows& task, const Quantised& weight, int64_t n) {
  using Step = FewRowsStep<I, G, FOUR_BITS, T>;
  constexpr int SUMS = (I * G + WIDTH - 1) / WIDTH * WIDTH;
  Floats total[SUMS] = {};
  const T* x[I];
  for (int i = 0; i < I; ++i) x[i] = static_cast<const T*>(task.x) + i * task.x_stride;
  const int64_t start = n * weight.in;
  for_each_block(weight, n, 0, weight.in, [&](int64_t place, int64_t count, int64_t block) __attribute__((always_inline)) {
    Floats sum[I * G], factor[G];
    for_each<I * G>([&](auto j) __attribute__((always_inline)) { sum[j] = total[j]; });
    for_each<G>([&](auto g) __attribute__((always_inline)) { factor[g] = Floats{} + factor_of(weight, block + g * (weight.in / weight.block)); });
    const int64_t column = place - start;
    int64_t l = 0;
    for (; l + Step::STEP <= count; l += Step::STEP) Step::add(weight, place + l, factor, x, column + l, Step::STEP, sum);
    if (l < count) Step::add(weight, place + l, factor, x, column + l, count - l, sum);
    for_each<I * G>([&](auto j) __attribute__((always_inline)) { total[j] = sum[j]; });
  });
  float flat[SUMS];
  for (int i = 0; i < SUMS; i += WIDTH) store(flat + i, sums(total + i));
  for (int i = 0; i < I; ++i) finish<T>(task, i, n, load_some(flat + i * G, G), G);
}

template <bool FOUR_BITS, class T>
void few_rows_quantised_of(const FewRows& task, const Quantised& weight, int64_t begin, int64_t end) {
  with_count<FEW_ROWS>(task.rows, [&](auto rows) {
    constexpr int AT_ONCE = rows() <= 2 ? 4 : 2;
    const bool alike = weight.in % weight.block == 0;
    int64_t n = begin;
    for (; alike && n + AT_ONCE <= end; n += AT_ONCE) few_rows_quantised_tile<rows(), AT_ONCE, FOUR_BITS, T>(task, weight, n);
    for (; n < end; ++n) few_rows_quantised_tile<rows(), 1, FOUR_BITS, T>(task, weight, n);
  });
}

void few_rows_quantised(const FewRows& task, const Quantised& weight, int64_t begin, int64_t end) {
  with_kind(task.kind, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    weight.code ? few_rows_quantised_of<true, T>(task, weight, begin, end) : few_rows_quantised_of<false, T>(task, weight, begin, end);
  });
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

// The vector layer: loads that widen, stores that round, sums across lanes, dropout's Philox bits, and dot products of
// bfloat16 where the instruction set has them.
//
// Included by files that are compiled once per instruction set, with FASTLORA_ISA naming the namespace. No standard library function may be
// called here: the linker keeps one copy of those, and it could be the one compiled for a newer CPU than the user's.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastlora {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

namespace FASTLORA_ISA {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

// What register tiles are sized by.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

typedef float Floats __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t Words __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Integers __attribute__((vector_size(WIDTH * 4)));
typedef uint64_t Longs __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t Halves __attribute__((vector_size(WIDTH * 2)));
typedef int8_t Bytes __attribute__((vector_size(WIDTH)));

template <class Vector>
inline Vector read(const void* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(Vector));
  return vector;
}

template <class Vector>
inline void write(void* to, Vector vector) {
  __builtin_memcpy(to, &vector, sizeof(Vector));
}

inline Words choose(Integers condition, Words yes, Words no) { return ((Words)condition & yes) | (~(Words)condition & no); }

inline Floats load(const float* from) { return read<Floats>(from); }

inline void store(float* to, Floats value) { write(to, value); }

inline Floats load(const BFloat16* from) { return (Floats)(__builtin_convertvector(read<Halves>(from), Words) << 16); }

/// The bits of the nearest bfloat16, ties to even; subnormal numbers are what they are.
inline Words to_bfloat16(Floats value) {
  const Words bits = (Words)value;
  return choose(value == value, (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Words{} + 0x7fc0);
}

#if defined(__AVX512BF16__)
/// The instructions for bfloat16 round to nearest, ties to even, and take a subnormal number for zero.
constexpr bool HAS_DOTS = true;
inline void store(BFloat16* to, Floats value) { write(to, _mm512_cvtneps_pbh((__m512)value)); }
#else
constexpr bool HAS_DOTS = false;
inline void store(BFloat16* to, Floats value) { write(to, __builtin_convertvector(to_bfloat16(value), Halves)); }
#endif

#if defined(__AVX512F__)
inline Floats load(const Float16* from) { return (Floats)_mm512_cvtph_ps(read<__m256i>(from)); }
inline void store(Float16* to, Floats value) { write(to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__F16C__)
inline Floats load(const Float16* from) { return (Floats)_mm256_cvtph_ps(read<__m128i>(from)); }
inline void store(Float16* to, Floats value) { write(to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__aarch64__)
inline Floats load(const Float16* from) { return (Floats)vcvt_f32_f16((float16x4_t)read<Halves>(from)); }
inline void store(Float16* to, Floats value) { write(to, vcvt_f16_f32((float32x4_t)value)); }
#else
inline Floats load(const Float16* from) {
  const Words half = __builtin_convertvector(read<Halves>(from), Words);
  const Words exponent = half & 0x7c00, magnitude = (half & 0x7fff) << 13;
  const Words normal = magnitude + (112 << 23);
  const Words special = magnitude + (224 << 23);  // infinity and NaN
  const Floats subnormal = (Floats)(magnitude + (113 << 23)) - (Floats)(Words{} + (113 << 23));
  const Words finite = choose(exponent == 0, (Words)subnormal, normal);
  return (Floats)(choose(exponent == 0x7c00, special, finite) | (half & 0x8000) << 16);
}

inline void store(Float16* to, Floats value) {
  const Words sign = (Words)value & 0x80000000, magnitude = (Words)value ^ sign;
  const Words large = choose(magnitude > 0x7f800000, Words{} + 0x7e00, Words{} + 0x7c00);  // NaN; overflow and infinity
  const Words normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;  // to nearest, ties to even
  const Words magic = Words{} + (126u << 23);  // adding 0.5 shifts a subnormal half into place, rounded
  const Words small = (Words)((Floats)magnitude + (Floats)magic) - magic;
  const Words finite = choose(magnitude < (113u << 23), small, normal);
  const Words half = choose(magnitude >= (143u << 23), large, finite);
  write(to, __builtin_convertvector(half | (sign >> 16), Halves));
}
#endif

#if defined(__AVX512F__)
/// The first `count` lanes of a vector, at most all.
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((uint32_t{1} << count) - 1); }
#elif defined(__AVX2__)
/// The first `count` lanes of a vector, at most all.
inline __m256i first_lanes(int64_t count) {
  alignas(64) static constexpr int32_t LANES[2 * WIDTH] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return read<__m256i>(LANES + WIDTH - count);
}
#endif

/// The first `count` elements of a vector; zeros beyond, where nothing is read.
template <class T>
inline Floats load_some(const T* from, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return (Floats)_mm512_maskz_loadu_ps(first_lanes(count), from);
  } else {
    T buffer[WIDTH];
    write(buffer, _mm256_maskz_loadu_epi16(first_lanes(count), from));
    return load(buffer);
  }
#else
#if defined(__AVX2__)
  // Not by way of memory: a vector that is read where its lanes have just been written waits for all of them.
  if constexpr (sizeof(T) == sizeof(float)) return (Floats)_mm256_maskload_ps(from, first_lanes(count));
#endif
  T buffer[WIDTH] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
  return load(buffer);
#endif
}

template <class T>
inline void store_some(T* to, Floats value, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    _mm512_mask_storeu_ps(to, first_lanes(count), (__m512)value);
  } else {
    T buffer[WIDTH];
    store(buffer, value);
    _mm256_mask_storeu_epi16(to, first_lanes(count), read<__m256i>(buffer));
  }
#else
  T buffer[WIDTH];
  store(buffer, value);
  for (int64_t i = 0; i < count; ++i) to[i] = buffer[i];
#endif
}

/// e^x to about an ulp: 2^n e^r with |r| <= ln(2) / 2, e^r by its Taylor series, whose eighth term is 5e-9. Not below e^-87; infinity where float32
/// holds no more.
inline Floats exponential(Floats x) {
  constexpr float LOWEST = -87.0f, HIGHEST = 88.72f, TO_INTEGER = 12582912.0f;  // 1.5 2^23: its last bit is worth 1
  constexpr float LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f;             // n LN2_HIGH is exact
  x = (Floats)choose(x < LOWEST, (Words)(Floats{} + LOWEST), (Words)x);           // NaN is neither
  const Integers beyond = x > HIGHEST;
  x = (Floats)choose(beyond, (Words)(Floats{} + HIGHEST), (Words)x);
  const Floats shifted = x * 0x1.715476p+0f + TO_INTEGER, n = shifted - TO_INTEGER;
  const Floats r = x - n * LN2_HIGH - n * LN2_LOW;
  constexpr float TERMS[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f};
  Floats series = Floats{} + 1.0f / 5040;
  for (const float term : TERMS) series = series * r + term;
  const Words power = (Words)series + ((Words)shifted << 23);  // the low bits of TO_INTEGER are 0: n lands in the exponent
  return (Floats)choose(beyond, Words{} + 0x7f800000, power);
}

/// Which lane of (a, b) goes to `lane` of the lower or upper operand where blocks of 2 STEP lanes are folded in two and added.
template <int STEP>
constexpr unsigned folded(unsigned lane, bool upper) {
  const unsigned block = lane / (2 * STEP) * (2 * STEP), within = lane % (2 * STEP);
  return block + within % STEP + (upper ? STEP : 0) + (within < STEP ? 0 : WIDTH);
}

#if defined(__clang__)
#define FASTLORA_SHUFFLE(Mask, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTLORA_SHUFFLE(Mask, a, b, ...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#endif

template <int STEP, bool UPPER, unsigned... LANE>
inline Floats exchanged(Floats a, Floats b, std::integer_sequence<unsigned, LANE...>) {
  return FASTLORA_SHUFFLE(Words, a, b, folded<STEP>(LANE, UPPER)...);
}

/// The lower or the upper operand.
template <int STEP, bool UPPER>
inline Floats exchanged(Floats a, Floats b) {
  return exchanged<STEP, UPPER>(a, b, std::make_integer_sequence<unsigned, WIDTH>{});
}

/// Lane i of the result is the sum of the lanes of vectors[i]. The order of the additions is fixed.
template <int STEP = WIDTH / 2>
inline Floats sums(Floats* vectors) {
  if constexpr (STEP == 0) {
    return vectors[0];
  } else {
    for (int i = 0; i < STEP; ++i) {
      vectors[i] = exchanged<STEP, false>(vectors[i], vectors[i + STEP]) + exchanged<STEP, true>(vectors[i], vectors[i + STEP]);
    }
    return sums<STEP / 2>(vectors);
  }
}

/// Calls body with each compile-time number below COUNT: what it indexes stays in registers, which unrolled loops do not ensure.
template <int COUNT, class Body>
inline void for_each(const Body& body) {
  [&]<int... NUMBER>(std::integer_sequence<int, NUMBER...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, NUMBER>{}), ...);
  }(std::make_integer_sequence<int, COUNT>{});
}

/// Lane j of vectors[i] and lane i of vectors[j] change places.
template <int STEP = WIDTH / 2>
inline void transpose(Floats* vectors) {
  if constexpr (STEP > 0) {
    for_each<WIDTH>([&](auto i) __attribute__((always_inline)) {
      if constexpr (i() / STEP % 2 == 0) {
        const Floats low = exchanged<STEP, false>(vectors[i()], vectors[i() + STEP]);
        vectors[i() + STEP] = exchanged<STEP, true>(vectors[i()], vectors[i() + STEP]);
        vectors[i()] = low;
      }
    });
    transpose<STEP / 2>(vectors);
  }
}

#if defined(__AVX512BF16__)
/// The pairs of bfloat16 in the lanes that are set; zeros elsewhere, where nothing is read.
inline __m512i load_pairs(const BFloat16* from, __mmask32 lanes) { return _mm512_maskz_loadu_epi16(lanes, from); }

inline __mmask32 lanes_below(int64_t count) { return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1; }

/// total + a · b, two products of bfloat16 a lane.
inline Floats dot(Floats total, __m512i a, __m512i b) { return (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b); }
#endif

/// The 64-bit products of the low halves of each lane.
inline Longs multiply_low(Longs a, uint32_t b) {
#if defined(__AVX512F__)
  return (Longs)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Longs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__)
  return (Longs)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffff) * b;
#endif
}

/// Lanes FIRST, FIRST + 1, ... of low and high, in turn.
template <uint64_t FIRST, uint64_t... LANE>
inline Longs interleave(Longs low, Longs high, std::integer_sequence<uint64_t, LANE...>) {
  return FASTLORA_SHUFFLE(Longs, low, high, (FIRST + LANE / 2 + (LANE % 2 ? sizeof...(LANE) : 0))...);
}

constexpr int DECISIONS = 4 * WIDTH;  // columns that one vector of philox decides: WIDTH / 2 counters, 8 half-words each

/// Philox4x32-10 for the counters from `counter` on: half-word j of the result decides column j of COUNT · DECISIONS. A round waits for the
/// one before it, so that several vectors take turns. fastlora/reference.py::keep_mask.
template <int COUNT>
inline void philox(uint64_t seed, uint64_t counter, uint16_t* decisions) {
  constexpr int COUNTERS = WIDTH / 2;
  Longs lanes{};
  for (int i = 0; i < COUNTERS; ++i) lanes[i] = i;
  // Each 64-bit lane holds one 32-bit word; what is above it is never read.
  Longs c0[COUNT], c1[COUNT], c2[COUNT] = {}, c3[COUNT] = {};
  for (int n = 0; n < COUNT; ++n) {
    c0[n] = lanes + (counter + n * COUNTERS);
    c1[n] = c0[n] >> 32;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int n = 0; n < COUNT; ++n) {
      const Longs p0 = multiply_low(c0[n], 0xD2511F53), p1 = multiply_low(c2[n], 0xCD9E8D57);
      c0[n] = (p1 >> 32) ^ c1[n] ^ k0;
      c1[n] = p1;
      c2[n] = (p0 >> 32) ^ c3[n] ^ k1;
      c3[n] = p0;
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  for (int n = 0; n < COUNT; ++n, decisions += DECISIONS) {
    const Longs low = (c0[n] & 0xffffffff) | (c1[n] << 32), high = (c2[n] & 0xffffffff) | (c3[n] << 32);
    write(decisions, interleave<0>(low, high, std::make_integer_sequence<uint64_t, COUNTERS>{}));
    write(decisions + DECISIONS / 2, interleave<COUNTERS / 2>(low, high, std::make_integer_sequence<uint64_t, COUNTERS>{}));
  }
}

/// Bit i of the result: whether half-word i of DECISIONS is at least the threshold (at most 65535).
inline uint64_t at_least(const uint16_t* half_words, uint16_t threshold) {
#if defined(__AVX512BW__)
  const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(threshold));
  const uint64_t low = _mm512_cmpge_epu16_mask(_mm512_loadu_si512(half_words), limit);
  return low | static_cast<uint64_t>(_mm512_cmpge_epu16_mask(_mm512_loadu_si512(half_words + 32), limit)) << 32;
#elif defined(__AVX2__)
  const __m256i limit = _mm256_set1_epi16(static_cast<int16_t>(threshold));
  const __m256i a = read<__m256i>(half_words), b = read<__m256i>(half_words + 16);
  const __m256i low = _mm256_cmpeq_epi16(_mm256_max_epu16(a, limit), a), high = _mm256_cmpeq_epi16(_mm256_max_epu16(b, limit), b);
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);  // packs works within halves
  return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
#else
  uint64_t bits = 0;
  for (int i = 0; i < DECISIONS; ++i) bits |= static_cast<uint64_t>(half_words[i] >= threshold) << i;
  return bits;
#endif
}

/// The bits of COUNT · DECISIONS columns, those of `counter` first.
template <int COUNT>
inline void draw_some(uint64_t seed, uint32_t threshold, uint64_t counter, uint8_t* keep) {
  uint16_t half_words[COUNT * DECISIONS];
  philox<COUNT>(seed, counter, half_words);
  for (int n = 0; n < COUNT; ++n) {
    const uint64_t bits = at_least(half_words + n * DECISIONS, static_cast<uint16_t>(threshold));
    __builtin_memcpy(keep + n * DECISIONS / 8, &bits, DECISIONS / 8);  // the first byte holds the first columns: little-endian machines only
  }
}

/// Bit `column` of a row's bits says whether dropout keeps that element. Writes the columns begin to end of one row (begin a multiple of 64), and
/// whole vectors of philox. `eights` is ceil(columns of a row / 8).
inline void draw_keep(uint64_t seed, uint32_t threshold, int64_t row, int64_t eights, int64_t begin, int64_t end, uint8_t* keep) {
  if (threshold > 65535) {  // keeps nothing
    for (int64_t column = begin; column < end; column += 8) keep[column / 8] = 0;
    return;
  }
  const auto counter = [&](int64_t column) { return static_cast<uint64_t>(row * eights + column / 8); };
  int64_t column = begin;
  for (; column + 4 * DECISIONS <= end; column += 4 * DECISIONS) draw_some<4>(seed, threshold, counter(column), keep + column / 8);
  for (; column < end; column += DECISIONS) draw_some<1>(seed, threshold, counter(column), keep + column / 8);
}

/// value, and zero in the lanes whose bit is not set; `keep` holds the bits of the columns from `column` on, a multiple of WIDTH.
inline Floats kept(Floats value, const uint8_t* keep, int64_t column) {
#if defined(__AVX512F__)
  uint16_t bits;
  __builtin_memcpy(&bits, keep + column / 8, sizeof(bits));
  return (Floats)_mm512_maskz_mov_ps(bits, (__m512)value);
#else
  Words lane;
  for (int i = 0; i < WIDTH; ++i) lane[i] = 1u << i;
  const uint32_t bits = keep[column / 8] >> (column % 8);
  return (Floats)((Words)value & (Words)(((Words{} + bits) & lane) != 0));
#endif
}

}  // namespace FASTLORA_ISA
}  // namespace fastlora

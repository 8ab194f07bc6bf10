// AVX-512's instructions that csrc/cpu uses, element by element, for CPUs that have AVX2 alone. `make emulate-avx512` includes it before each file
// that is compiled for AVX-512, which then takes the machine for one that has it. The compiler splits the vectors of 64 bytes.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace emulated_avx512 {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint64_t Longs __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(64)));

template <class To, class From>
inline To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Memory: an element whose bit of the mask is not set is neither read nor written.

template <class Vector, class Element>
inline Vector load_lanes(uint32_t mask, const void* from) {
  Element lanes[sizeof(Vector) / sizeof(Element)] = {};
  for (size_t i = 0; i < sizeof(Vector) / sizeof(Element); ++i) {
    if (mask >> i & 1) std::memcpy(lanes + i, static_cast<const Element*>(from) + i, sizeof(Element));
  }
  return bits_of<Vector>(lanes);
}

template <class Element, class Vector>
inline void store_lanes(void* to, uint32_t mask, const Vector& vector) {
  Element lanes[sizeof(Vector) / sizeof(Element)];
  std::memcpy(lanes, &vector, sizeof(Vector));
  for (size_t i = 0; i < sizeof(Vector) / sizeof(Element); ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<Element*>(to) + i, lanes + i, sizeof(Element));
  }
}

inline __m512 maskz_loadu_ps(__mmask16 mask, const void* from) { return load_lanes<__m512, float>(mask, from); }
inline __m512i maskz_loadu_epi16(__mmask32 mask, const void* from) { return load_lanes<__m512i, uint16_t>(mask, from); }
inline __m256i maskz_loadu_epi16_of_half(__mmask16 mask, const void* from) { return load_lanes<__m256i, uint16_t>(mask, from); }
inline void mask_storeu_ps(void* to, __mmask16 mask, __m512 value) { store_lanes<float>(to, mask, value); }
inline void mask_storeu_epi16_of_half(void* to, __mmask16 mask, __m256i value) { store_lanes<uint16_t>(to, mask, value); }
inline __m512 loadu_ps(const void* from) { return load_lanes<__m512, float>(0xffff, from); }
inline __m512i loadu_si512(const void* from) { return load_lanes<__m512i, uint32_t>(0xffff, from); }
inline void mask_storeu_epi16(void* to, __mmask32 mask, __m512i value) { store_lanes<uint16_t>(to, mask, value); }
inline __m512 maskz_mov_ps(__mmask16 mask, __m512 value) { return load_lanes<__m512, float>(mask, &value); }

// Integers.

inline __m512i set1_epi64(uint64_t value) { return (__m512i)(Longs{} + value); }
inline __m512i set1_epi32(int32_t value) { return (__m512i)(Integers{} + value); }
inline __m512i set1_epi16(int16_t value) { return (__m512i)(Halves{} + static_cast<uint16_t>(value)); }

template <class... Lane>
inline __m512i setr_epi32(Lane... lane) {
  return (__m512i)(Integers{lane...});
}

inline __m512i or_si512(__m512i a, __m512i b) { return (__m512i)((Longs)a | (Longs)b); }
inline __m512i srli_epi64(__m512i a, int count) { return (__m512i)((Longs)a >> count); }
inline __m512i slli_epi64(__m512i a, int count) { return (__m512i)((Longs)a << count); }
inline __m512i slli_epi32(__m512i a, int count) { return (__m512i)((Words)a << count); }
inline __m512i mul_epu32(__m512i a, __m512i b) { return (__m512i)(((Longs)a & 0xffffffff) * ((Longs)b & 0xffffffff)); }

inline __mmask32 cmpge_epu16_mask(__m512i a, __m512i b) {
  __mmask32 mask = 0;
  for (int i = 0; i < 32; ++i) mask |= __mmask32{((Halves)a)[i] >= ((Halves)b)[i]} << i;
  return mask;
}

/// The elements of `from`, widened.
template <class Vector, class From, class Source>
inline Vector widened(const Source& from) {
  From elements[sizeof(Source) / sizeof(From)];
  std::memcpy(elements, &from, sizeof(Source));
  Vector vector;
  for (size_t i = 0; i < sizeof(Vector) / sizeof(vector[0]); ++i) vector[i] = elements[i];
  return vector;
}

inline __m512i cvtepu8_epi64(__m128i from) { return (__m512i)widened<Longs, uint8_t>(from); }
inline __m512i cvtepi8_epi32(__m128i from) { return (__m512i)widened<Integers, int8_t>(from); }
inline __m512i cvtepu16_epi32(__m256i from) { return (__m512i)widened<Words, uint16_t>(from); }
inline __m512 cvtepi32_ps(__m512i from) { return (__m512) __builtin_convertvector((Integers)from, Floats); }

// Lanes that change places; unpack works within quarters.

inline __m512 permutexvar_ps(__m512i places, __m512 a) {
  Floats to;
  for (int i = 0; i < 16; ++i) to[i] = ((Floats)a)[((Words)places)[i] % 16];
  return (__m512)to;
}

inline __m512 permutex2var_ps(__m512 a, __m512i places, __m512 b) {
  Floats to;
  for (int i = 0; i < 16; ++i) {
    const uint32_t place = ((Words)places)[i] % 32;
    to[i] = place < 16 ? ((Floats)a)[place] : ((Floats)b)[place - 16];
  }
  return (__m512)to;
}

template <int FIRST>
inline __m512i unpacked(__m512i a, __m512i b) {
  Halves to;
  for (int i = 0; i < 32; ++i) to[i] = ((Halves)(i % 2 ? b : a))[i / 8 * 8 + FIRST + i % 8 / 2];
  return (__m512i)to;
}

inline __m512i unpacklo_epi16(__m512i a, __m512i b) { return unpacked<0>(a, b); }
inline __m512i unpackhi_epi16(__m512i a, __m512i b) { return unpacked<4>(a, b); }

// Floats of 32 and 16 bits.

inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  Floats to;
  for (int i = 0; i < 16; ++i) to[i] = std::fma(((Floats)a)[i], ((Floats)b)[i], ((Floats)c)[i]);
  return (__m512)to;
}

struct Pair {
  __m256 low, high;
};

inline __m512 cvtph_ps(__m256i from) {
  return bits_of<__m512>(Pair{_mm256_cvtph_ps(_mm256_castsi256_si128(from)), _mm256_cvtph_ps(_mm256_extracti128_si256(from, 1))});
}

inline __m256i cvtps_ph(__m512 from, int) {  // to nearest, ties to even
  const Pair halves = bits_of<Pair>(from);
  return _mm256_set_m128i(_mm256_cvtps_ph(halves.high, _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(halves.low, _MM_FROUND_TO_NEAREST_INT));
}

// bfloat16: rounded to nearest, ties to even; a subnormal number, taken or made, is zero.

inline float flushed(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }

inline uint16_t to_bfloat16(float value) {
  if (value != value) return 0x7fc0;
  const uint32_t bits = bits_of<uint32_t>(flushed(value));
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float of_bfloat16(uint32_t bits) { return flushed(bits_of<float>(bits << 16)); }

inline __m256bh cvtneps_pbh(__m512 from) {
  uint16_t to[16];
  for (int i = 0; i < 16; ++i) to[i] = to_bfloat16(((Floats)from)[i]);
  return bits_of<__m256bh>(to);
}

inline __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  uint16_t to[32];
  for (int i = 0; i < 32; ++i) to[i] = to_bfloat16(i < 16 ? ((Floats)low)[i] : ((Floats)high)[i - 16]);
  return bits_of<__m512bh>(to);
}

inline __m512 dpbf16_ps(__m512 total, __m512bh a, __m512bh b) {
  const Words left = bits_of<Words>(a), right = bits_of<Words>(b);
  Floats to = (Floats)total;
  for (int i = 0; i < 16; ++i) {
    for (const int shift : {16, 0}) {
      const float product = flushed(of_bfloat16(left[i] >> shift & 0xffff) * of_bfloat16(right[i] >> shift & 0xffff));
      to[i] = flushed(flushed(to[i]) + product);
    }
  }
  return (__m512)to;
}

}  // namespace emulated_avx512

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#define _mm256_mask_storeu_epi16 emulated_avx512::mask_storeu_epi16_of_half
#define _mm256_maskz_loadu_epi16 emulated_avx512::maskz_loadu_epi16_of_half
#define _mm512_cmpge_epu16_mask emulated_avx512::cmpge_epu16_mask
#define _mm512_cvtepi32_ps emulated_avx512::cvtepi32_ps
#define _mm512_cvtepi8_epi32 emulated_avx512::cvtepi8_epi32
#define _mm512_cvtepu16_epi32 emulated_avx512::cvtepu16_epi32
#define _mm512_cvtepu8_epi64 emulated_avx512::cvtepu8_epi64
#define _mm512_cvtne2ps_pbh emulated_avx512::cvtne2ps_pbh
#define _mm512_cvtneps_pbh emulated_avx512::cvtneps_pbh
#define _mm512_cvtph_ps emulated_avx512::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated_avx512::cvtps_ph
#define _mm512_dpbf16_ps emulated_avx512::dpbf16_ps
#define _mm512_fmadd_ps emulated_avx512::fmadd_ps
#define _mm512_loadu_ps emulated_avx512::loadu_ps
#define _mm512_loadu_si512 emulated_avx512::loadu_si512
#define _mm512_mask_storeu_epi16 emulated_avx512::mask_storeu_epi16
#define _mm512_mask_storeu_ps emulated_avx512::mask_storeu_ps
#define _mm512_maskz_loadu_epi16 emulated_avx512::maskz_loadu_epi16
#define _mm512_maskz_loadu_ps emulated_avx512::maskz_loadu_ps
#define _mm512_maskz_mov_ps emulated_avx512::maskz_mov_ps
#define _mm512_mul_epu32 emulated_avx512::mul_epu32
#define _mm512_or_si512 emulated_avx512::or_si512
#define _mm512_permutex2var_ps emulated_avx512::permutex2var_ps
#define _mm512_permutexvar_ps emulated_avx512::permutexvar_ps
#define _mm512_set1_epi16 emulated_avx512::set1_epi16
#define _mm512_set1_epi32 emulated_avx512::set1_epi32
#define _mm512_set1_epi64 emulated_avx512::set1_epi64
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated_avx512::setr_epi32
#define _mm512_slli_epi32 emulated_avx512::slli_epi32
#define _mm512_slli_epi64 emulated_avx512::slli_epi64
#define _mm512_srli_epi64 emulated_avx512::srli_epi64
#define _mm512_unpackhi_epi16 emulated_avx512::unpackhi_epi16
#define _mm512_unpacklo_epi16 emulated_avx512::unpacklo_epi16

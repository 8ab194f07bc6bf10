// Walks over the rows of a matrix, a vector at a time, with what is left at a row's end. Compiled once per instruction set, as vector.h.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace fastlora::FASTLORA_ISA {
namespace {

/// Calls body with a null pointer of the elements' type.
template <class Body>
inline void with_kind(Kind kind, const Body& body) {
  switch (kind) {
    case Kind::FLOAT32: return body(static_cast<float*>(nullptr));
    case Kind::BFLOAT16: return body(static_cast<BFloat16*>(nullptr));
    case Kind::FLOAT16: return body(static_cast<Float16*>(nullptr));
  }
}

/// A vector, or the `count` elements that are left; zeros beyond.
template <class T>
inline Floats load_up_to(const T* from, int64_t count) {
  return count >= WIDTH ? load(from) : load_some(from, count);
}

template <class T>
inline void store_up_to(T* to, Floats value, int64_t count) {
  if (count >= WIDTH) return store(to, value);
  store_some(to, value, count);
}

/// Calls body(l, count) for every vector of a row, with `count` elements from l on.
template <class Body>
inline void for_each_vector(int64_t width, const Body& body) {
  int64_t l = 0;
  for (; l + WIDTH <= width; l += WIDTH) body(l, WIDTH);
  if (l < width) body(l, width - l);
}

/// The sum of term(l, count) over a row's vectors; in four chains.
template <class Term>
inline float sum_over(int64_t width, const Term& term) {
  constexpr int CHAINS = 4;
  Floats total[WIDTH] = {};
  int64_t l = 0;
  for (; l + CHAINS * WIDTH <= width; l += CHAINS * WIDTH) {
    for (int i = 0; i < CHAINS; ++i) total[i] += term(l + i * WIDTH, WIDTH);
  }
  for (; l < width; l += WIDTH) total[0] += term(l, width - l);
  const Floats chains = sums(total);
  float sum = 0;
  for (int i = 0; i < CHAINS; ++i) sum += chains[i];
  return sum;
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

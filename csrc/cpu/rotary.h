// Pairs of columns (l, l + D / 2) turned by the angles of their tokens, all heads of a token together: its cosines and sines are read once. Compiled
// once per instruction set, as vector.h.
#pragma once

#include <type_traits>

#include "rows.h"

namespace fastlora::FASTLORA_ISA {
namespace {

template <bool INVERSE, class T>
void rotary_tokens(const Rotary& task, int64_t begin, int64_t end) {
  const int64_t half = task.width / 2;
  for (int64_t place = begin; place < end; ++place) {
    const int64_t b = place / task.tokens, t = place % task.tokens;
    const T* cosines = static_cast<const T*>(task.cosines) + b * task.angle_stride[0] + t * task.angle_stride[1];
    const T* sines = static_cast<const T*>(task.sines) + b * task.angle_stride[0] + t * task.angle_stride[1];
    const T* x = static_cast<const T*>(task.x) + b * task.x_stride[0] + t * task.x_stride[2];
    T* y = static_cast<T*>(task.y) + place * task.heads * task.width;
    for_each_vector(half, [&](int64_t l, int64_t count) {
      const Floats first_cosine = load_up_to(cosines + l, count), second_cosine = load_up_to(cosines + half + l, count);
      // What is multiplied by the other column's: in the gradient, the transpose's.
      const Floats first_sine = -load_up_to(sines + l, count), second_sine = load_up_to(sines + half + l, count);
      const Floats of_second = INVERSE ? second_sine : first_sine, of_first = INVERSE ? first_sine : second_sine;
      for (int64_t head = 0; head < task.heads; ++head) {
        const T* from = x + head * task.x_stride[1] + l;
        T* to = y + head * task.width + l;
        const Floats first = load_up_to(from, count), second = load_up_to(from + half, count);
        store_up_to(to, first * first_cosine + second * of_second, count);
        store_up_to(to + half, second * second_cosine + first * of_first, count);
      }
    });
  }
}

void rotary(const Rotary& task, int64_t begin, int64_t end) {
  with_kind(task.kind, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (task.inverse) return rotary_tokens<true, T>(task, begin, end);
    rotary_tokens<false, T>(task, begin, end);
  });
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

// y = x rstd w and its gradient, a row at a time: read from memory once, from the first-level cache twice. Compiled once per instruction set, as vector.h.
#pragma once

#include <type_traits>

#include "rows.h"

namespace fastlora::FASTLORA_ISA {
namespace {

template <class T>
void rms_norm_rows(const RmsNorm& task, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(task.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(task.x) + row * task.x_stride;
    T* y = static_cast<T*>(task.y) + row * task.width;
    const float squares = sum_over(task.width, [&](int64_t l, int64_t count) {
      const Floats value = load_up_to(x + l, count);
      return value * value;
    });
    const double mean = squares / static_cast<double>(task.width) + task.eps;
    const float rstd = static_cast<float>(1 / __builtin_sqrt(mean));
    task.rstd[row] = rstd;
    for_each_vector(task.width, [&](int64_t l, int64_t count) {
      store_up_to(y + l, load_up_to(x + l, count) * rstd * load_up_to(weight + l, count), count);
    });
  }
}

/// dx = rstd (g - x rstd² mean(g x)) with g = dy w.
template <class T>
void rms_norm_backward_rows(const RmsNorm& task, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(task.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(task.x) + row * task.x_stride;
    const T* dy = static_cast<const T*>(task.dy) + row * task.dy_stride;
    T* dx = static_cast<T*>(task.y) + row * task.width;
    const float rstd = task.rstd[row];
    const auto gradient = [&](int64_t l, int64_t count) { return load_up_to(dy + l, count) * load_up_to(weight + l, count); };
    const auto normal = [&](int64_t l, int64_t count) { return load_up_to(x + l, count) * rstd; };
    const float along = sum_over(task.width, [&](int64_t l, int64_t count) { return gradient(l, count) * normal(l, count); });
    const float mean = along / static_cast<float>(task.width);
    for_each_vector(task.width, [&](int64_t l, int64_t count) {
      store_up_to(dx + l, rstd * (gradient(l, count) - normal(l, count) * mean), count);
    });
  }
}

void rms_norm(const RmsNorm& task, int64_t begin, int64_t end) {
  with_kind(task.kind, [&](auto* type) { rms_norm_rows<std::remove_pointer_t<decltype(type)>>(task, begin, end); });
}

void rms_norm_backward(const RmsNorm& task, int64_t begin, int64_t end) {
  with_kind(task.kind, [&](auto* type) { rms_norm_backward_rows<std::remove_pointer_t<decltype(type)>>(task, begin, end); });
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

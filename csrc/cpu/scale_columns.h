// y = c u + b, a factor and a bias for each column, and its gradients, a row at a time. Compiled once per instruction set, as vector.h.
#pragma once

#include <type_traits>

#include "rows.h"

namespace fastlora::FASTLORA_ISA {
namespace {

template <class T>
void scale_columns_rows(const ScaleColumns& task, int64_t begin, int64_t end) {
  const T* bias = static_cast<const T*>(task.bias);
  for (int64_t row = begin; row < end; ++row) {
    const T* u = static_cast<const T*>(task.u) + row * task.u_stride;
    T* y = static_cast<T*>(task.y) + row * task.width;
    for_each_vector(task.width, [&](int64_t l, int64_t count) {
      const Floats scaled = load_up_to(u + l, count) * load_up_to(task.factor + l, count);
      store_up_to(y + l, bias ? scaled + load_up_to(bias + l, count) : scaled, count);
    });
  }
}

/// du = c dy, and total [width] = the sum of dy u over the rows: of SUMMED_ROWS at a time in `room` [width], so that no chain of additions is long.
template <class T>
void scale_columns_backward_rows(const ScaleColumns& task, int64_t begin, int64_t end, float* total, float* room) {
  for (int64_t l = 0; l < task.width; ++l) total[l] = 0;
  for (int64_t first = begin; first < end; first += SUMMED_ROWS) {
    const int64_t last = first + SUMMED_ROWS < end ? first + SUMMED_ROWS : end;
    for (int64_t row = first; row < last; ++row) {
      const T* u = static_cast<const T*>(task.u) + row * task.u_stride;
      const T* dy = static_cast<const T*>(task.dy) + row * task.dy_stride;
      T* du = static_cast<T*>(task.y) + row * task.width;
      for_each_vector(task.width, [&](int64_t l, int64_t count) {
        const Floats d = load_up_to(dy + l, count);
        const Floats product = d * load_up_to(u + l, count);
        store_up_to(du + l, d * load_up_to(task.factor + l, count), count);
        store_up_to(room + l, row == first ? product : product + load_up_to(room + l, count), count);
      });
    }
    for_each_vector(task.width, [&](int64_t l, int64_t count) {
      store_up_to(total + l, load_up_to(total + l, count) + load_up_to(room + l, count), count);
    });
  }
}

void scale_columns(const ScaleColumns& task, int64_t begin, int64_t end) {
  with_kind(task.kind, [&](auto* type) { scale_columns_rows<std::remove_pointer_t<decltype(type)>>(task, begin, end); });
}

void scale_columns_backward(const ScaleColumns& task, int64_t begin, int64_t end, float* total, float* room) {
  with_kind(task.kind, [&](auto* type) {
    scale_columns_backward_rows<std::remove_pointer_t<decltype(type)>>(task, begin, end, total, room);
  });
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

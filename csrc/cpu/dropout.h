// d(x) by dropout's bits, a vector at a time. Compiled once per instruction set, as vector.h.
#pragma once

#include <type_traits>

#include "rows.h"

namespace fastlora::FASTLORA_ISA {
namespace {

template <class T>
void dropout_rows(const Dropout& task, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(task.x) + row * task.x_stride;
    uint8_t* keep = task.keep + row * task.keep_stride;
    T* y = static_cast<T*>(task.y) + row * task.y_stride;
    if (task.draws) draw_keep(task.seed, task.threshold, row, (task.width + 7) / 8, 0, task.width, keep);
    for_each_vector(task.width, [&](int64_t l, int64_t count) {
      const Floats value = task.factor * kept(load_up_to(x + l, count), keep, l);
      store_up_to(y + l, task.adds ? load_up_to(y + l, count) + value : value, count);
    });
  }
}

void dropout(const Dropout& task, int64_t begin, int64_t end) {
  with_kind(task.kind, [&](auto* type) { dropout_rows<std::remove_pointer_t<decltype(type)>>(task, begin, end); });
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

// y = silu(gate) up and its gradients, a vector at a time. Compiled once per instruction set, as vector.h.
#pragma once

#include <type_traits>

#include "rows.h"

namespace fastlora::FASTLORA_ISA {
namespace {

template <class T>
void swiglu_rows(const Swiglu& task, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(task.gate) + row * task.gate_stride;
    const T* up = static_cast<const T*>(task.up) + row * task.up_stride;
    T* y = static_cast<T*>(task.y) + row * task.width;
    for_each_vector(task.width, [&](int64_t l, int64_t count) {
      const Floats g = load_up_to(gate + l, count);
      store_up_to(y + l, g / (1 + exponential(-g)) * load_up_to(up + l, count), count);
    });
  }
}

/// With σ = 1 / (1 + e^-gate): dup = dy gate σ, dgate = dy up σ (1 + gate (1 - σ)).
template <class T>
void swiglu_backward_rows(const Swiglu& task, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(task.gate) + row * task.gate_stride;
    const T* up = static_cast<const T*>(task.up) + row * task.up_stride;
    const T* dy = static_cast<const T*>(task.dy) + row * task.dy_stride;
    T* dgate = static_cast<T*>(task.y) + row * task.width;
    T* dup = static_cast<T*>(task.dup) + row * task.width;
    for_each_vector(task.width, [&](int64_t l, int64_t count) {
      const Floats g = load_up_to(gate + l, count), u = load_up_to(up + l, count), d = load_up_to(dy + l, count);
      const Floats sigmoid = 1 / (1 + exponential(-g)), silu = g * sigmoid;
      store_up_to(dup + l, d * silu, count);
      store_up_to(dgate + l, d * u * (sigmoid + silu * (1 - sigmoid)), count);
    });
  }
}

void swiglu(const Swiglu& task, int64_t begin, int64_t end) {
  with_kind(task.kind, [&](auto* type) { swiglu_rows<std::remove_pointer_t<decltype(type)>>(task, begin, end); });
}

void swiglu_backward(const Swiglu& task, int64_t begin, int64_t end) {
  with_kind(task.kind, [&](auto* type) { swiglu_backward_rows<std::remove_pointer_t<decltype(type)>>(task, begin, end); });
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

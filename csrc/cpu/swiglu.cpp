// y = silu(gate) up, and its gradients, computed in float32. The equations are fastlora/reference.py::swiglu and swiglu_backward.
#include <torch/csrc/stable/library.h>

#include <array>

#include "adapters.h"

namespace fastlora {
namespace {

Swiglu task_of(const Tensor& gate, const Tensor& up) {
  check_cpu(gate, "gate");
  check(gate, "gate", {ANY, ANY}, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, gate);
  check(up, "up", {gate.size(0), gate.size(1)}, {gate.scalar_type()}, gate);
  Swiglu task{};
  task.kind = kind_of(gate);
  task.width = gate.size(1);
  task.gate = gate.const_data_ptr();
  task.gate_stride = gate.stride(0);
  task.up = up.const_data_ptr();
  task.up_stride = up.stride(0);
  return task;
}

Tensor new_rows(const Tensor& rows) { return torch::stable::new_empty(rows, std::array<int64_t, 2>{rows.size(0), rows.size(1)}); }

Tensor swiglu_cpu(const Tensor& gate, const Tensor& up) {  // [M, F] each
  const Tensor dense_gate = with_dense_rows(gate), dense_up = with_dense_rows(up);
  Swiglu task = task_of(dense_gate, dense_up);
  const Tensor y = new_rows(gate);
  task.y = y.mutable_data_ptr();
  torch::stable::parallel_for(0, gate.size(0), GRAIN / (task.width + 1) + 1, [&](int64_t begin, int64_t end) { kernels().swiglu(task, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward_cpu(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  const Tensor dense_gate = with_dense_rows(gate), dense_up = with_dense_rows(up), gradient = with_dense_rows(dy);
  Swiglu task = task_of(dense_gate, dense_up);
  check(dy, "dy", {gate.size(0), gate.size(1)}, {gate.scalar_type()}, gate);
  const Tensor dgate = new_rows(gate), dup = new_rows(gate);
  task.dy = gradient.const_data_ptr();
  task.dy_stride = gradient.stride(0);
  task.y = dgate.mutable_data_ptr();
  task.dup = dup.mutable_data_ptr();
  torch::stable::parallel_for(0, gate.size(0), GRAIN / (task.width + 1) + 1, [&](int64_t begin, int64_t end) {
    kernels().swiglu_backward(task, begin, end);
  });
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("swiglu_cpu", TORCH_BOX(&swiglu_cpu));
  m.impl("swiglu_backward_cpu", TORCH_BOX(&swiglu_backward_cpu));
}

}  // namespace fastlora

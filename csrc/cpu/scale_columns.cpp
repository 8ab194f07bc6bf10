// y = c u + b, a factor and a bias for each column, and its gradients, the sums in float32. The equations are fastlora/reference.py::scale_columns and
// scale_columns_backward.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>

#include "adapters.h"
#include "memory.h"
#include "new_tensor.h"

namespace fastlora {
namespace {

constexpr int64_t PART_ROWS = 256;  // that a thread sums alone: as many whatever the threads, so that the sums are the same bits

ScaleColumns task_of(const Tensor& u, const Tensor& factor) {
  check_cpu(u, "u");
  check(u, "u", {ANY, ANY}, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, u);
  check(factor, "factor", {u.size(1)}, {ScalarType::Float}, u);
  ScaleColumns task{};
  task.kind = kind_of(u);
  task.width = u.size(1);
  task.u = u.const_data_ptr();
  task.u_stride = u.stride(0);
  task.factor = floats(factor);
  return task;
}

Tensor new_rows(const Tensor& rows) { return torch::stable::new_empty(rows, std::array<int64_t, 2>{rows.size(0), rows.size(1)}); }

Tensor scale_columns_cpu(
    const Tensor& u,       // [M, N]
    const Tensor& factor,  // [N] float32
    const std::optional<Tensor>& bias) {
  const Tensor rows = with_dense_rows(u), factors = dense(factor);
  ScaleColumns task = task_of(rows, factors);
  if (bias) check(*bias, "bias", {u.size(1)}, {u.scalar_type()}, u);
  const std::optional<Tensor> biases = bias ? std::optional(dense(*bias)) : std::nullopt;
  const Tensor y = new_rows(u);
  task.bias = biases ? biases->const_data_ptr() : nullptr;
  task.y = y.mutable_data_ptr();
  torch::stable::parallel_for(0, u.size(0), GRAIN / (task.width + 1) + 1, [&](int64_t begin, int64_t end) {
    kernels().scale_columns(task, begin, end);
  });
  return y;
}

std::tuple<Tensor, Tensor> scale_columns_backward_cpu(const Tensor& dy, const Tensor& u, const Tensor& factor) {
  const Tensor rows = with_dense_rows(u), factors = dense(factor), gradient = with_dense_rows(dy);
  ScaleColumns task = task_of(rows, factors);
  const int64_t M = u.size(0), N = u.size(1);
  check(dy, "dy", {M, N}, {u.scalar_type()}, u);
  const Tensor du = new_rows(u), dfactor = torch::stable::new_empty(u, std::array<int64_t, 1>{N}, ScalarType::Float);
  task.dy = gradient.const_data_ptr();
  task.dy_stride = gradient.stride(0);
  task.y = du.mutable_data_ptr();
  const int64_t parts = (M + PART_ROWS - 1) / PART_ROWS;
  const Memory totals(parts * N * sizeof(float)), rooms(parts * N * sizeof(float));
  torch::stable::parallel_for(0, parts, GRAIN / (PART_ROWS * (N + 1)) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t last = std::min((part + 1) * PART_ROWS, M);
      kernels().scale_columns_backward(task, part * PART_ROWS, last, totals.as<float>() + part * N, rooms.as<float>() + part * N);
    }
  });
  float* sums = floats(dfactor);
  std::fill_n(sums, N, 0.0f);
  for (int64_t part = 0; part < parts; ++part) {
    const float* total = totals.as<float>() + part * N;
    for (int64_t n = 0; n < N; ++n) sums[n] += total[n];
  }
  return {du, dfactor};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("scale_columns_cpu", TORCH_BOX(&scale_columns_cpu));
  m.impl("scale_columns_backward_cpu", TORCH_BOX(&scale_columns_backward_cpu));
}

}  // namespace fastlora

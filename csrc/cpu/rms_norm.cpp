// y = x rstd w with rstd = 1 / sqrt(mean(x²) + eps), and dx = rstd (g - x rstd² mean(g x)) with g = dy w, the sums in float32. The equations are
// fastlora/reference.py::rms_norm and rms_norm_backward.
#include <torch/csrc/stable/library.h>

#include <array>

#include "adapters.h"

namespace fastlora {
namespace {

RmsNorm task_of(const Tensor& x, const Tensor& weight) {
  check_cpu(x, "x");
  check(x, "x", {ANY, ANY}, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, x);
  check(weight, "weight", {x.size(1)}, {x.scalar_type()}, x);
  RmsNorm task{};
  task.kind = kind_of(x);
  task.width = x.size(1);
  task.x = x.const_data_ptr();
  task.x_stride = x.stride(0);
  task.weight = weight.const_data_ptr();
  return task;
}

std::tuple<Tensor, Tensor> rms_norm_cpu(
    const Tensor& x,       // [M, D]
    const Tensor& weight,  // [D]
    double eps) {
  const Tensor rows = with_dense_rows(x), dense = torch::stable::contiguous(weight);
  RmsNorm task = task_of(rows, dense);
  const int64_t M = x.size(0), D = x.size(1);
  const Tensor y = torch::stable::new_empty(x, std::array<int64_t, 2>{M, D});
  const Tensor rstd = torch::stable::new_empty(x, std::array<int64_t, 1>{M}, ScalarType::Float);
  task.eps = static_cast<float>(eps);
  task.y = y.mutable_data_ptr();
  task.rstd = floats(rstd);
  torch::stable::parallel_for(0, M, GRAIN / (D + 1) + 1, [&](int64_t begin, int64_t end) { kernels().rms_norm(task, begin, end); });
  return {y, rstd};
}

Tensor rms_norm_backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd) {  // rstd [M] float32
  const Tensor rows = with_dense_rows(x), dense = torch::stable::contiguous(weight), gradient = with_dense_rows(dy);
  RmsNorm task = task_of(rows, dense);
  const int64_t M = x.size(0), D = x.size(1);
  check(dy, "dy", {M, D}, {x.scalar_type()}, x);
  check(rstd, "rstd", {M}, {ScalarType::Float}, x);
  const Tensor dx = torch::stable::new_empty(x, std::array<int64_t, 2>{M, D}), factors = torch::stable::contiguous(rstd);
  task.dy = gradient.const_data_ptr();
  task.dy_stride = gradient.stride(0);
  task.rstd = floats(factors);
  task.y = dx.mutable_data_ptr();
  torch::stable::parallel_for(0, M, GRAIN / (D + 1) + 1, [&](int64_t begin, int64_t end) { kernels().rms_norm_backward(task, begin, end); });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("rms_norm_cpu", TORCH_BOX(&rms_norm_cpu));
  m.impl("rms_norm_backward_cpu", TORCH_BOX(&rms_norm_backward_cpu));
}

}  // namespace fastlora

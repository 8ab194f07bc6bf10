// The norms of the rows of W + s B A, in float32. The equation is fastlora/reference.py::dora_factor.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>

#include "adapters.h"
#include "new_tensor.h"

namespace fastlora {
namespace {

constexpr int64_t PART_ROWS = 64;  // a thread's share is a multiple, whatever the threads: rows are taken by fours

Tensor dora_norm_cpu(
    const Tensor& weight,  // [N, K]
    const Tensor& lora_a,  // [R, K] float32
    const Tensor& lora_b,  // [N, R] float32
    double scale) {
  check_cpu(weight, "weight");
  check(weight, "weight", {ANY, ANY}, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, weight);
  const int64_t N = weight.size(0), K = weight.size(1);
  check(lora_a, "lora_a", {ANY, K}, {ScalarType::Float}, weight);
  const int64_t R = lora_a.size(0);
  check(lora_b, "lora_b", {N, R}, {ScalarType::Float}, weight);
  const Tensor rows = with_dense_rows(weight), a = dense(lora_a), b = dense(lora_b);
  const Tensor norm = torch::stable::new_empty(weight, std::array<int64_t, 1>{N}, ScalarType::Float);
  DoraNorm task{};
  task.kind = kind_of(rows);
  task.width = K;
  task.rank = R;
  task.weight = rows.const_data_ptr();
  task.weight_stride = rows.stride(0);
  task.lora_a = floats(a);
  task.lora_b = floats(b);
  task.scale = static_cast<float>(scale);
  task.norm = floats(norm);
  const int64_t parts = (N + PART_ROWS - 1) / PART_ROWS;
  torch::stable::parallel_for(0, parts, GRAIN / (PART_ROWS * (K * R + 1)) + 1, [&](int64_t begin, int64_t end) {
    kernels().dora_norm(task, begin * PART_ROWS, std::min(end * PART_ROWS, N));
  });
  return norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) { m.impl("dora_norm_cpu", TORCH_BOX(&dora_norm_cpu)); }

}  // namespace fastlora

// The float32 product of many rows with a frozen weight, or an adapter: y = x Wᵀ + b or y += x Wᵀ, as accurate as a sum in blocks. Its caller passes Wᵀ for dx = dy W.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "adapters.h"
#include "memory.h"
#include "new_tensor.h"

namespace fastlora {
namespace {

/// y = x Wᵀ + b, or y += x Wᵀ, of checked arguments: x [M, K], weight [N, K], bias [N], y [M, N] without gaps.
void multiply(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool adds, const Tensor& y) {
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
  const bool by_row = K <= 1 || weight.stride(1) == 1;
  STD_TORCH_CHECK(by_row || N <= 1 || weight.stride(0) == 1, "weight: got ", describe(weight), " with gaps, expected rows or columns without");
  const Tensor rows = with_dense_rows(x), dense_bias = bias ? dense(*bias) : y;
  const Product task{
      M,
      K,
      N,
      static_cast<const float*>(rows.const_data_ptr()),
      rows.stride(0),
      static_cast<const float*>(weight.const_data_ptr()),
      weight.stride(by_row ? 0 : 1),
      !by_row,
      bias ? static_cast<const float*>(dense_bias.const_data_ptr()) : nullptr,
      adds,
      floats(y)};
  const int64_t tiles = kernels().product_tiles(task);
  const int64_t work = M * K * N / (tiles + 1) + 1;  // multiplications of a tile
  torch::stable::parallel_for(0, tiles, GRAIN / work + 1, [&](int64_t begin, int64_t end) {
    const Memory panel(PANEL_COLUMNS * std::min(K + 15, PRODUCT_DEPTH) * sizeof(float));
    kernels().product(task, begin, end, panel.as<float>());
  });
}

void check_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_cpu(x, "x");
  check_base(x, weight, bias);
  check_dtype(x, "x", {ScalarType::Float});
}

Tensor product_cpu(
    const Tensor& x,                      // [M, K]
    const Tensor& weight,                 // [N, K], dense by row or by column
    const std::optional<Tensor>& bias) {  // [N]
  check_product(x, weight, bias);
  const Tensor y = new_tensor(x, {x.size(0), weight.size(0)}, x.scalar_type());
  multiply(x, weight, bias, false, y);
  return y;
}

void add_product_cpu(const Tensor& y, const Tensor& x, const Tensor& weight) {
  check_product(x, weight, std::nullopt);
  check(y, "y", {x.size(0), weight.size(0)}, {ScalarType::Float}, x);
  STD_TORCH_CHECK(y.is_contiguous(), "y: got ", describe(y), " with gaps, expected none");
  multiply(x, weight, std::nullopt, true, y);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("product_cpu", TORCH_BOX(&product_cpu));
  m.impl("add_product_cpu", TORCH_BOX(&add_product_cpu));
}

}  // namespace fastlora

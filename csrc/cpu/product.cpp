// The product of many rows with a frozen weight, or an adapter: y = x Wᵀ + b or y += x Wᵀ, in float32, as accurate as a sum in blocks; of 16 bits, which
// a CPU may have no products of, by way of float32, y being rounded once. Its caller passes Wᵀ for dx = dy W.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "adapters.h"
#include "memory.h"
#include "new_tensor.h"

namespace fastlora {
namespace {

constexpr int64_t WIDENED = 1 << 22;  // floats of x and y at a time, where these are in 16 bits
constexpr int64_t LEAST_WIDENED = 256;  // rows: a panel of W is copied once for so many

void multiply_in_float32(const Product& task) {
  const int64_t tiles = kernels().product_tiles(task);
  const int64_t work = task.rows * task.in * task.out / (tiles + 1) + 1;  // multiplications of a tile
  torch::stable::parallel_for(0, tiles, GRAIN / work + 1, [&](int64_t begin, int64_t end) {
    const Memory panel(PANEL_COLUMNS * std::min(task.in, PRODUCT_DEPTH) * sizeof(float));
    kernels().product(task, begin, end, panel.as<float>());
  });
}

/// The same of x and y in 16 bits: a block of rows is widened, multiplied, and rounded once.
void multiply_widened(Product task, const Tensor& x, const Tensor& y) {
  const int64_t M = task.rows, K = task.in, N = task.out;
  const int64_t most = std::min(M, std::max(LEAST_WIDENED, WIDENED / (K + N + 1)));
  const Memory wide_x(most * K * sizeof(float)), wide_y(most * N * sizeof(float));
  const uint16_t* from = static_cast<const uint16_t*>(x.const_data_ptr());
  uint16_t* to = static_cast<uint16_t*>(y.mutable_data_ptr());
  const int64_t stride = task.x_stride;
  task.x = wide_x.as<float>();
  task.x_stride = K;
  task.y = wide_y.as<float>();
  for (int64_t row = 0; row < M; row += most) {
    task.rows = std::min(most, M - row);
    torch::stable::parallel_for(0, task.rows, GRAIN / (K + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kernels().widen(task.kind, from + (row + i) * stride, K, wide_x.as<float>() + i * K);
    });
    multiply_in_float32(task);
    torch::stable::parallel_for(0, task.rows, GRAIN / (N + 1) + 1, [&](int64_t begin, int64_t end) {
      kernels().narrow(task.kind, task.y + begin * N, (end - begin) * N, to + (row + begin) * N);
    });
  }
}

/// y = x Wᵀ + b, or y += x Wᵀ, of checked arguments: x [M, K], weight [N, K], bias [N], y [M, N] without gaps; 16 bits do not add.
void multiply(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool adds, const Tensor& y) {
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
  const bool by_row = K <= 1 || weight.stride(1) == 1;
  STD_TORCH_CHECK(by_row || N <= 1 || weight.stride(0) == 1, "weight: got ", describe(weight), " with gaps, expected rows or columns without");
  const Kind kind = kind_of(x);
  const Tensor rows = with_dense_rows(x), own_bias = bias ? dense(*bias) : y;
  const bool wide = kind == Kind::FLOAT32;
  const Memory wide_bias(bias && !wide ? N * sizeof(float) : 0);
  if (wide_bias) kernels().widen(kind, own_bias.const_data_ptr(), N, wide_bias.as<float>());
  Product task{};
  task.kind = kind;
  task.rows = M;
  task.in = K;
  task.out = N;
  task.x_stride = rows.stride(0);
  task.weight = weight.const_data_ptr();
  task.weight_stride = weight.stride(by_row ? 0 : 1);
  task.by_column = !by_row;
  task.adds = adds;
  if (bias) task.bias = wide ? static_cast<const float*>(own_bias.const_data_ptr()) : wide_bias.as<float>();
  if (!wide) return multiply_widened(task, rows, y);
  task.x = static_cast<const float*>(rows.const_data_ptr());
  task.y = floats(y);
  multiply_in_float32(task);
}

void check_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_cpu(x, "x");
  check_base(x, weight, bias);
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
  check_dtype(x, "x", {ScalarType::Float});
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

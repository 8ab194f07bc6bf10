// Row by row, y = x Wᵀ + b + s_i d_i(x) A_iᵀ B_iᵀ, where i is the row's adapter, and its gradients.
// The equations are fastlora/reference.py::multi_lora and multi_lora_backward. The frozen product is one for all rows; the adapters'
// passes go through the rows in the order of their adapters, each at its own rank.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>

#include "adapters.h"

namespace fastlora {
namespace {

/// The rows sorted by adapter; `order` and `offsets` as in the reference, checked.
struct Grouping {
  Tensor order;                 // [M] int64
  std::vector<int64_t> bounds;  // S + 1: adapter i has the places bounds[i] to bounds[i + 1]
  int64_t rows;

  const int64_t* rows_in_order() const { return order.const_data_ptr<int64_t>(); }
};

Grouping check_grouping(const Tensor& order, const Tensor& offsets, int64_t M, int64_t S) {
  check_cpu(order, "order");
  check_shape(order, "order", {M});
  check_dtype(order, "order", {ScalarType::Long});
  check_cpu(offsets, "offsets");
  check_shape(offsets, "offsets", {S + 3});
  check_dtype(offsets, "offsets", {ScalarType::Long});
  const Tensor dense_order = torch::stable::contiguous(order), dense_offsets = torch::stable::contiguous(offsets);
  const int64_t* rows = dense_order.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < M; ++i) {
    STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < M, "order: got row ", rows[i], ", expected rows from 0 to ", M - 1);
  }
  const int64_t* bounds = dense_offsets.const_data_ptr<int64_t>();
  bool ascends = bounds[0] == 0 && bounds[S + 2] == M;
  for (int64_t i = 0; i < S + 2; ++i) ascends = ascends && bounds[i] <= bounds[i + 1];
  STD_TORCH_CHECK(ascends, "offsets: got numbers that do not ascend from 0 to ", M);
  return {dense_order, {bounds + 1, bounds + S + 2}, M};
}

/// Rows whose adapter does not exist become NaN; they are the last in the order.
void poison_invalid(const Tensor& rows, const Grouping& grouping) {
  for (int64_t place = grouping.bounds.back(); place < grouping.rows; ++place) {
    Tensor row = torch::stable::select(rows, 0, grouping.rows_in_order()[place]);
    torch::stable::fill_(row, std::numeric_limits<double>::quiet_NaN());
  }
}

std::tuple<Tensor, Tensor, Tensor> multi_lora_cpu(
    const Tensor& x,                                                            // [M, K]
    const Tensor& weight,                                                       // [N, K]
    const std::optional<Tensor>& bias,                                          // [N]
    const std::vector<Tensor>& lora_a,                                          // S of [R_i, K]
    const std::vector<Tensor>& lora_b,                                          // S of [N, R_i]
    const std::vector<double>& scale, const std::vector<double>& dropout_p,     // S
    const std::optional<Tensor>& seed, const Tensor& order, const Tensor& offsets) {
  const Adapters adapters{lora_a, lora_b, scale, dropout_p, seed};
  check_layer(x, weight, bias, adapters);
  const Grouping grouping = check_grouping(order, offsets, x.size(0), static_cast<int64_t>(lora_a.size()));
  const auto [y, xa, keep] = forward(x, weight, bias, adapters, split_rows(adapters, grouping.bounds, grouping.rows_in_order()));
  poison_invalid(y, grouping);
  return {y, xa, keep};
}

std::tuple<Tensor, Tensor, Tensor> multi_lora_backward_cpu(
    const Tensor& dy,  // [M, N]
    const Tensor& x, const Tensor& weight, const std::vector<Tensor>& lora_a, const std::vector<Tensor>& lora_b,
    const Tensor& xa,    // [M, max R_i] float32
    const Tensor& keep,  // [M, bits_stride] uint8, or no elements
    const std::vector<double>& scale, const std::vector<double>& dropout_p, const Tensor& order, const Tensor& offsets, bool need_dx,
    bool need_da, bool need_db) {
  Adapters adapters{lora_a, lora_b, scale, dropout_p};
  check_layer(x, weight, std::nullopt, adapters);
  check_gradient(dy, x, weight);
  check_projection(xa, x, adapters.most_ranks());
  adapters.keep = checked_keep(keep, {x.size(0), bits_stride(x.size(1))});
  const Grouping grouping = check_grouping(order, offsets, x.size(0), static_cast<int64_t>(lora_a.size()));
  const Batch batch = split_rows(adapters, grouping.bounds, grouping.rows_in_order());
  auto [dx, da, db] = backward(dy, x, weight, adapters, xa, batch, need_dx, need_da, need_db);
  if (need_dx) poison_invalid(dx, grouping);
  return {dx, da, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("multi_lora_cpu", TORCH_BOX(&multi_lora_cpu));
  m.impl("multi_lora_backward_cpu", TORCH_BOX(&multi_lora_backward_cpu));
}

}  // namespace fastlora

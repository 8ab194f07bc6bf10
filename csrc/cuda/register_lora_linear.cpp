// lora_linear on a card: layers one after the other (lora_linear.cu), or one whose rows have adapters of their own (multi_lora.cu).
#include "register.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../check_lora_linear.h"
#include "lora_linear.h"
#include "multi_lora.h"

namespace fastlora {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

/// The matrix with its columns side by side and its rows apart, each at a multiple of 16 bytes, the one that follows a single row too, which
/// kernels may point at: itself where it is so, else a copy.
Tensor rows_of_16_bytes(const Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1), wide = (columns + 7) / 8 * 8;
  const bool together = columns <= 1 || matrix.stride(1) == 1, apart = matrix.stride(0) % 8 == 0 && matrix.stride(0) >= columns;
  if (together && apart && reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0) return matrix;
  Tensor around = new_empty(matrix, std::array<int64_t, 2>{rows, wide});
  Tensor copy = torch::stable::narrow(around, 1, 0, columns);
  torch::stable::copy_(copy, matrix);
  return copy;
}

/// keep [G, M, bytes] as [G M, bytes], in rows of which the kernels read 8 bytes at a time.
Tensor rows_of_bits(const Tensor& keep) { return rows_of_16_bytes(torch::stable::flatten(contiguous(keep), 0, 1)); }

Matrix matrix_of(const Tensor& tensor) { return {tensor.const_data_ptr(), {tensor.stride(0), tensor.stride(1)}}; }

/// The frozen weight [N, K] as kernels read it, in whole rows or columns of 16 bytes: itself where it lies so, as nn.Linear's does where K is a multiple
/// of 8, and Conv1D's where N is; else a copy, in every call.
Tensor weight_of_16_bytes(const Tensor& weight) {
  const bool by_column = lies_by_column(matrix_of(weight), weight.size(0), weight.size(1)) && weight.stride(1) % 8 == 0;
  return by_column ? weight : rows_of_16_bytes(weight);
}

/// Whether anything is dropped: fastlora/reference.py::drop_threshold.
bool drops(double dropout_p) { return 65536 * dropout_p + 0.5 >= 1; }

/// Room for dropout's bits of x [M, K] in so many layers; without elements where nothing is dropped.
Tensor new_keep(const Tensor& x, bool dropped, int64_t layers) {
  if (!dropped) return new_empty(x, std::array<int64_t, 1>{0}, ScalarType::Byte);
  return new_empty(x, std::array<int64_t, 3>{layers, x.size(0), keep_bytes(x.size(1))}, ScalarType::Byte);
}

Tensor new_workspace(const Tensor& like, int64_t bytes) { return new_empty(like, std::array<int64_t, 1>{bytes}, ScalarType::Byte); }

/// x in rows of 16 bytes, weight in rows or columns of them.
LoraLinear layer_of(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_a, const Tensor& lora_b, double scale,
    double dropout_p) {
  LoraLinear layer{};
  layer.M = x.size(0), layer.K = x.size(1), layer.N = weight.size(0), layer.R = lora_a.size(0);
  layer.dtype = dtype_of(x), layer.adapter_dtype = dtype_of(lora_a);
  layer.x = matrix_of(x), layer.weight = matrix_of(weight);
  layer.lora_a = matrix_of(lora_a), layer.lora_b = matrix_of(lora_b);
  if (bias) layer.bias = bias->const_data_ptr(), layer.bias_stride = bias->stride(0);
  layer.scale = scale, layer.dropout_p = dropout_p;
  return layer;
}

/// A layer, or several that share x [M, K].
struct Layers {
  Tensor x;
  std::vector<Tensor> weight, bias;  // bias: without elements where a layer has none; of a backward, no layers
  std::vector<Tensor> lora_a, lora_b;
  std::vector<double> scale, dropout_p;
  std::optional<Tensor> order, offsets;  // of one layer, whose rows have adapters of their own

  size_t count() const { return weight.size(); }
  std::optional<Tensor> bias_of(size_t layer) const {
    return bias.empty() || bias[layer].numel() == 0 ? std::nullopt : std::optional(bias[layer]);
  }
  int64_t ranks() const {
    int64_t ranks = 0;
    for (const Tensor& a : lora_a) ranks += a.size(0);
    return ranks;
  }
  int64_t most_ranks() const {
    int64_t most = 0;
    for (const Tensor& a : lora_a) most = std::max(most, a.size(0));
    return most;
  }

  void check_all() const {
    check_card(x, "x");
    check_dtype(x, "x", {ScalarType::BFloat16, ScalarType::Half});
    STD_TORCH_CHECK(count() >= 1, "weight: got no layer, expected at least one");
    STD_TORCH_CHECK(bias.empty() || bias.size() == count(), "bias: got ", bias.size(), " layers, expected ", count());
    std::vector<int64_t> columns;
    for (size_t i = 0; i < count(); ++i) {
      check_base(x, weight[i], bias_of(i));
      columns.push_back(weight[i].size(0));
    }
    check_adapters(x, columns, lora_a, lora_b, scale, dropout_p, order, offsets);
  }
  /// Of a backward, after `check_all`: whether the forward has dropped something.
  bool check_backward(const std::vector<Tensor>& dy, const Tensor& xa, const Tensor& keep) const {
    STD_TORCH_CHECK(dy.size() == count(), "dy: got ", dy.size(), " layers, expected ", count());
    for (size_t i = 0; i < count(); ++i) check(dy[i], numbered("dy", i, count()).c_str(), {x.size(0), weight[i].size(0)}, {x.scalar_type()}, x);
    return check_saved(xa, keep, static_cast<int64_t>(count()), most_ranks(), x);
  }
};

/// y of each layer, xa [G, M, max R_i] and keep [G, M, 8 ceil(K / 64)].
std::tuple<std::vector<Tensor>, Tensor, Tensor> forward_layers(const Layers& layers, const std::optional<Tensor>& seed) {
  layers.check_all();
  const Tensor& x = layers.x;
  const int64_t M = x.size(0), R = layers.most_ranks(), G = static_cast<int64_t>(layers.count());
  check_seed(seed, G, x);
  const OnDevice device(x);
  const Tensor x_rows = rows_of_16_bytes(x);
  const bool dropped = seed && std::any_of(layers.dropout_p.begin(), layers.dropout_p.end(), drops);
  const Tensor seeds = dropped ? contiguous(*seed) : without_elements(x);
  const std::array<int64_t, 3> sizes{G, M, R};  // zeros beyond a layer's own rank
  Tensor xa = layers.ranks() == G * R ? new_empty(x, sizes, ScalarType::Float) : torch::stable::new_zeros(x, sizes, ScalarType::Float);
  Tensor keep = new_keep(x, dropped, G);
  std::vector<Tensor> ys;
  for (size_t i = 0; i < layers.count(); ++i) {
    const Tensor weight = weight_of_16_bytes(layers.weight[i]);
    LoraLinearForward given{};
    given.layer = layer_of(
        x_rows, weight, layers.bias_of(i), layers.lora_a[i], layers.lora_b[i], layers.scale[i], dropped ? layers.dropout_p[i] : 0);
    ys.push_back(new_empty(x, std::array<int64_t, 2>{M, layers.weight[i].size(0)}));
    Tensor workspace = new_workspace(x, lora_linear_workspace(given.layer));
    given.seed = dropped ? seeds.const_data_ptr<int64_t>() + i : nullptr;
    given.y = ys[i].mutable_data_ptr();
    given.xa = xa.mutable_data_ptr<float>() + static_cast<int64_t>(i) * M * R;
    given.xa_stride = R;
    given.keep = dropped ? keep.mutable_data_ptr<uint8_t>() + static_cast<int64_t>(i) * M * keep_bytes(x.size(1)) : nullptr;
    given.workspace = workspace.mutable_data_ptr();
    const std::string error = lora_linear(given, device.stream());
    STD_TORCH_CHECK(error.empty(), "lora_linear: ", error);
  }
  return {ys, xa, keep};
}

/// dx [M, K] of all layers, which each adds to, and every dA_i and every dB_i, one after the other; xa and keep as `forward_layers` leaves them.
std::tuple<Tensor, Tensor, Tensor> backward_layers(
    const std::vector<Tensor>& dy, const Layers& layers, const Tensor& xa, const Tensor& keep, bool need_dx, bool need_da, bool need_db) {
  layers.check_all();
  const Tensor& x = layers.x;
  const int64_t M = x.size(0), K = x.size(1), R = layers.most_ranks();
  const bool dropped = layers.check_backward(dy, xa, keep);
  int64_t db_numbers = 0;
  for (const Tensor& b : layers.lora_b) db_numbers += b.numel();
  const OnDevice device(x);
  const Tensor x_rows = rows_of_16_bytes(x), dense_xa = contiguous(xa);
  const Tensor dense_keep = dropped ? rows_of_bits(keep) : keep;
  Tensor dx = need_dx ? new_empty(x, std::array<int64_t, 2>{M, K}) : without_elements(x);
  Tensor da = new_empty(layers.lora_a[0], std::array<int64_t, 1>{need_da ? layers.ranks() * K : 0});
  Tensor db = new_empty(layers.lora_b[0], std::array<int64_t, 1>{need_db ? db_numbers : 0});
  char *next_da = static_cast<char*>(da.mutable_data_ptr()), *next_db = static_cast<char*>(db.mutable_data_ptr());
  for (size_t i = 0; i < layers.count(); ++i) {
    const Tensor weight = weight_of_16_bytes(layers.weight[i]), dy_rows = rows_of_16_bytes(dy[i]);
    LoraLinearBackward given{};
    given.layer = layer_of(
        x_rows, weight, std::nullopt, layers.lora_a[i], layers.lora_b[i], layers.scale[i], dropped ? layers.dropout_p[i] : 0);
    Tensor workspace = new_workspace(x, lora_linear_backward_workspace(given.layer));
    given.dy = matrix_of(dy_rows);
    given.xa = dense_xa.const_data_ptr<float>() + static_cast<int64_t>(i) * M * R;
    given.xa_stride = R;
    given.keep = dropped ? dense_keep.const_data_ptr<uint8_t>() + static_cast<int64_t>(i) * M * dense_keep.stride(0) : nullptr;
    given.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
    given.adds = i > 0;
    given.da = need_da ? next_da : nullptr;
    given.db = need_db ? next_db : nullptr;
    given.workspace = workspace.mutable_data_ptr();
    const std::string error = lora_linear_backward(given, device.stream());
    STD_TORCH_CHECK(error.empty(), "lora_linear_backward: ", error);
    next_da += need_da ? layers.lora_a[i].numel() * da.element_size() : 0;
    next_db += need_db ? layers.lora_b[i].numel() * db.element_size() : 0;
  }
  return {dx, da, db};
}

/// What forward and backward are given, checked, and as the kernels take it: x in rows of 16 bytes, weight in rows or columns of them, order and
/// offsets dense.
struct MixedLayer {
  std::vector<LoraAdapter> adapters;
  Tensor x, weight, order, offsets;
  MultiLora layer{};
  int64_t ranks = 0;  // of all adapters
  bool drops = false;

  explicit MixedLayer(const Layers& given) {
    given.check_all();
    STD_TORCH_CHECK(given.count() == 1, "weight: got ", given.count(), " layers, expected one where each row has an adapter of its own");
    ranks = given.ranks();
    for (size_t i = 0; i < given.lora_a.size(); ++i) {
      const Tensor &a = given.lora_a[i], &b = given.lora_b[i];
      LoraAdapter adapter{a.const_data_ptr(), b.const_data_ptr(), {}, {}, a.size(0), given.scale[i], given.dropout_p[i]};
      copy_strides(a, adapter.a_strides);
      copy_strides(b, adapter.b_strides);
      adapters.push_back(adapter);
      drops = drops || fastlora::drops(adapter.dropout_p);
    }
    layer.M = given.x.size(0), layer.K = given.x.size(1), layer.N = given.weight[0].size(0);
    layer.S = static_cast<int64_t>(adapters.size()), layer.R = given.most_ranks();
    x = rows_of_16_bytes(given.x), weight = weight_of_16_bytes(given.weight[0]);
    order = contiguous(*given.order), offsets = contiguous(*given.offsets);
    layer.dtype = dtype_of(x), layer.adapter_dtype = dtype_of(given.lora_a[0]);
    layer.x = x.const_data_ptr(), layer.x_stride = x.stride(0);
    layer.by_column = lies_by_column(matrix_of(weight), layer.N, layer.K);
    layer.weight = weight.const_data_ptr(), layer.weight_stride = weight.stride(layer.by_column ? 1 : 0);
    layer.adapters = adapters.data();
    layer.order = order.const_data_ptr<int64_t>(), layer.offsets = offsets.const_data_ptr<int64_t>();
  }
};

/// y, xa [1, M, max R_i] and keep [1, M, 8 ceil(K / 64)].
std::tuple<std::vector<Tensor>, Tensor, Tensor> forward_mixed(const Layers& layer, const std::optional<Tensor>& seed) {
  const MixedLayer mixed(layer);
  const Tensor& x = layer.x;
  const std::optional<Tensor> bias = layer.bias_of(0);
  check_seed(seed, 1, x);
  const OnDevice device(x);
  MultiLoraForward given{};
  given.layer = mixed.layer;
  const int64_t M = mixed.layer.M, N = mixed.layer.N;
  const bool dropped = seed && mixed.drops;
  Tensor y = new_empty(x, std::array<int64_t, 2>{M, N}), xa = new_empty(x, std::array<int64_t, 3>{1, M, given.layer.R}, ScalarType::Float);
  Tensor keep = new_keep(x, dropped, 1);
  if (bias) given.bias = bias->const_data_ptr(), given.bias_stride = bias->stride(0);
  given.seed = dropped ? seed->const_data_ptr<int64_t>() : nullptr;
  given.y = y.mutable_data_ptr();
  given.xa = xa.mutable_data_ptr<float>();
  given.keep = dropped ? keep.mutable_data_ptr<uint8_t>() : nullptr;
  Tensor workspace = new_workspace(x, multi_lora_workspace(given.layer));
  given.workspace = workspace.mutable_data_ptr();
  const std::string error = multi_lora(given, device.stream());
  STD_TORCH_CHECK(error.empty(), "multi_lora: ", error);
  return {{y}, xa, keep};
}

std::tuple<Tensor, Tensor, Tensor> backward_mixed(
    const std::vector<Tensor>& dy, const Layers& layer, const Tensor& xa, const Tensor& keep, bool need_dx, bool need_da, bool need_db) {
  const MixedLayer mixed(layer);
  const Tensor& x = layer.x;
  const bool dropped = layer.check_backward(dy, xa, keep) && mixed.drops;
  const OnDevice device(x);
  const Tensor dy_rows = rows_of_16_bytes(dy[0]), dense_xa = contiguous(xa), dense_keep = dropped ? rows_of_bits(keep) : keep;
  const int64_t M = mixed.layer.M, K = mixed.layer.K, N = mixed.layer.N;
  MultiLoraBackward given{};
  given.layer = mixed.layer;
  Tensor dx = need_dx ? new_empty(x, std::array<int64_t, 2>{M, K}) : without_elements(x);
  Tensor da = new_empty(layer.lora_a[0], std::array<int64_t, 1>{need_da ? mixed.ranks * K : 0});
  Tensor db = new_empty(layer.lora_b[0], std::array<int64_t, 1>{need_db ? mixed.ranks * N : 0});
  Tensor workspace = new_workspace(x, multi_lora_backward_workspace(given.layer));
  given.dy = dy_rows.const_data_ptr();
  given.dy_stride = dy_rows.stride(0);
  given.xa = dense_xa.const_data_ptr<float>();
  given.keep = dropped ? dense_keep.const_data_ptr<uint8_t>() : nullptr;
  given.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  given.da = need_da ? da.mutable_data_ptr() : nullptr;
  given.db = need_db ? db.mutable_data_ptr() : nullptr;
  given.workspace = workspace.mutable_data_ptr();
  const std::string error = multi_lora_backward(given, device.stream());
  STD_TORCH_CHECK(error.empty(), "multi_lora_backward: ", error);
  return {dx, da, db};
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> lora_linear_cuda(
    const Tensor& x,                                                         // [M, K]
    const std::vector<Tensor>& weight, const std::vector<Tensor>& bias,      // G of [N_g, K], [N_g] or no elements
    const std::vector<Tensor>& lora_a, const std::vector<Tensor>& lora_b,    // G S of [R_gi, K], [N_g, R_gi]
    const std::vector<double>& scale, const std::vector<double>& dropout_p,  // G S
    const std::optional<Tensor>& seed,                                       // [G]
    const std::optional<Tensor>& order,                                      // [M], or none: S is 1
    const std::optional<Tensor>& offsets) {                                  // [S + 3]
  const Layers layers{x, weight, bias, lora_a, lora_b, scale, dropout_p, order, offsets};
  return order ? forward_mixed(layers, seed) : forward_layers(layers, seed);
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward_cuda(
    const std::vector<Tensor>& dy,  // G of [M, N_g]
    const Tensor& x, const std::vector<Tensor>& weight, const std::vector<Tensor>& lora_a, const std::vector<Tensor>& lora_b,
    const Tensor& xa,    // [G, M, max R_gi] float32
    const Tensor& keep,  // [G, M, 8 ceil(K / 64)] uint8, or no elements
    const std::vector<double>& scale, const std::vector<double>& dropout_p, const std::optional<Tensor>& order,
    const std::optional<Tensor>& offsets, bool need_dx, bool need_da, bool need_db) {
  const Layers layers{x, weight, {}, lora_a, lora_b, scale, dropout_p, order, offsets};
  return (order ? backward_mixed : backward_layers)(dy, layers, xa, keep, need_dx, need_da, need_db);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, FASTLORA_CARD, m) {
  m.impl("lora_linear_cuda", TORCH_BOX(&lora_linear_cuda));
  m.impl("lora_linear_backward_cuda", TORCH_BOX(&lora_linear_backward_cuda));
}

}  // namespace fastlora

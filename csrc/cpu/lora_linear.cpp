// y = x Wᵀ + b + s xa Bᵀ with xa = d(x) Aᵀ;  dxa = s dy B;  dx = dy W + d'(dxa A);  dA = dxaᵀ d(x);  dB = s dyᵀ xa.
// The equations are fastlora/reference.py::lora_linear and lora_linear_backward. The frozen products are fastlora/packed.py's; the rest reads x
// and y once in the forward, dy, dx and x once in the backward, and accumulates in float32. Dropout's mask is bits, drawn in the forward only.
// lora_linear_shared is several such layers on the same x, which is read once for all.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <utility>

#include "adapters.h"

namespace fastlora {
namespace {

std::tuple<Tensor, Tensor, Tensor> lora_linear_cpu(
    const Tensor& x,                    // [M, K]
    const Tensor& weight,               // [N, K]
    const std::optional<Tensor>& bias,  // [N]
    const Tensor& lora_a,               // [R, K]
    const Tensor& lora_b,               // [N, R]
    double scale, double dropout_p, const std::optional<Tensor>& seed) {
  const Adapters adapters{{lora_a}, {lora_b}, {scale}, {dropout_p}, seed};
  check_layer(x, weight, bias, adapters);
  return forward(x, weight, bias, adapters, split_rows(adapters, {0, x.size(0)}, nullptr));
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward_cpu(
    const Tensor& dy,  // [M, N]
    const Tensor& x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
    const Tensor& xa,    // [M, R] float32
    const Tensor& keep,  // [M, bits_stride] uint8, or no elements
    double scale, double dropout_p, bool need_dx, bool need_da, bool need_db) {
  Adapters adapters{{lora_a}, {lora_b}, {scale}, {dropout_p}};
  check_layer(x, weight, std::nullopt, adapters);
  check_gradient(dy, x, weight);
  check_projection(xa, x, lora_a.size(0));
  adapters.keep = checked_keep(keep, {x.size(0), bits_stride(x.size(1))});
  auto [dx, da, db] = backward(dy, x, weight, adapters, xa, split_rows(adapters, {0, x.size(0)}, nullptr), need_dx, need_da, need_db);
  if (need_da) da = torch::stable::view(da, lora_a.sizes());
  if (need_db) db = torch::stable::view(db, lora_b.sizes());
  return {dx, da, db};
}

void check_shared(const Tensor& x, const std::vector<Tensor>& weight, const std::vector<Tensor>& bias, const Adapters& adapters) {
  const size_t G = weight.size();
  STD_TORCH_CHECK(G >= 1, "weight: got no layer, expected at least one");
  STD_TORCH_CHECK(bias.size() == G, "bias: got ", bias.size(), " layers, expected ", G);
  const std::pair<const char*, size_t> counts[] = {
      {"lora_a", adapters.a.size()}, {"lora_b", adapters.b.size()}, {"scale", adapters.scale.size()}, {"dropout_p", adapters.dropout_p.size()}};
  for (const auto& [name, count] : counts) STD_TORCH_CHECK(count == G, name, ": got ", count, " layers, expected ", G);
  const int64_t seeds = adapters.seed ? adapters.seed->numel() : 0;
  for (size_t i = 0; i < G; ++i) {
    const Adapters one{{adapters.a[i]}, {adapters.b[i]}, {adapters.scale[i]}, {adapters.dropout_p[i]}};
    check_layer(x, weight[i], bias[i].numel() ? std::optional<Tensor>(bias[i]) : std::nullopt, one);
    check_dtype(adapters.a[i], "lora_a", {adapters.a[0].scalar_type()});
  }
  if (!adapters.seed) return;
  check_cpu(*adapters.seed, "seed");
  check_dtype(*adapters.seed, "seed", {ScalarType::Long});
  STD_TORCH_CHECK(seeds == static_cast<int64_t>(G), "seed: got ", describe(*adapters.seed), ", expected one number a layer");
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> lora_linear_shared_cpu(
    const Tensor& x,                                                         // [M, K]
    const std::vector<Tensor>& weight, const std::vector<Tensor>& bias,      // G of [N_i, K], [N_i] or no elements
    const std::vector<Tensor>& lora_a, const std::vector<Tensor>& lora_b,    // G of [R_i, K], [N_i, R_i]
    const std::vector<double>& scale, const std::vector<double>& dropout_p,  // G
    const std::optional<Tensor>& seed) {                                     // [G]
  const Adapters adapters{lora_a, lora_b, scale, dropout_p, seed};
  check_shared(x, weight, bias, adapters);
  return forward_shared(x, weight, bias, adapters);
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_shared_backward_cpu(
    const std::vector<Tensor>& dy,  // G of [M, N_i]
    const Tensor& x, const std::vector<Tensor>& weight, const std::vector<Tensor>& lora_a, const std::vector<Tensor>& lora_b,
    const Tensor& xa,    // [M, sum R_i] float32
    const Tensor& keep,  // [G, M, bits_stride] uint8, or no elements
    const std::vector<double>& scale, const std::vector<double>& dropout_p, bool need_dx, bool need_da, bool need_db) {
  Adapters adapters{lora_a, lora_b, scale, dropout_p};
  const Tensor none = torch::stable::new_empty(x, std::array<int64_t, 1>{0});
  check_shared(x, weight, std::vector<Tensor>(weight.size(), none), adapters);
  STD_TORCH_CHECK(dy.size() == weight.size(), "dy: got ", dy.size(), " layers, expected ", weight.size());
  for (size_t i = 0; i < dy.size(); ++i) check_gradient(dy[i], x, weight[i]);
  check_projection(xa, x, adapters.all_ranks());
  adapters.keep = checked_keep(keep, {static_cast<int64_t>(weight.size()), x.size(0), bits_stride(x.size(1))});
  return backward_shared(dy, x, weight, adapters, xa, need_dx, need_da, need_db);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("lora_linear_cpu", TORCH_BOX(&lora_linear_cpu));
  m.impl("lora_linear_backward_cpu", TORCH_BOX(&lora_linear_backward_cpu));
  m.impl("lora_linear_shared_cpu", TORCH_BOX(&lora_linear_shared_cpu));
  m.impl("lora_linear_shared_backward_cpu", TORCH_BOX(&lora_linear_shared_backward_cpu));
}

}  // namespace fastlora

// y = x Wᵀ + b + s xa Bᵀ with xa = d(x) Aᵀ;  dxa = s dy B;  dx = dy W + d'(dxa A);  dA = dxaᵀ d(x);  dB = s dyᵀ xa.
// The equations are fastlora/reference.py::lora_linear and lora_linear_backward. The frozen products are torch's own; the rest reads x
// and y once in the forward, dy, dx and x once in the backward, accumulates in float32 and draws dropout's mask as it goes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "adapters.h"

namespace fastlora {
namespace {

std::tuple<Tensor, Tensor> lora_linear_cpu(
    const Tensor& x,                    // [M, K]
    const Tensor& weight,               // [N, K]
    const std::optional<Tensor>& bias,  // [N]
    const Tensor& lora_a,               // [R, K]
    const Tensor& lora_b,               // [N, R]
    double scale, double dropout_p, const std::optional<Tensor>& seed) {
  const Adapters adapters{{lora_a}, {lora_b}, {scale}, {dropout_p}, seed};
  check_layer(x, weight, bias, adapters);
  return forward(x, weight, bias, adapters, {make_segments(adapters, {0, x.size(0)}), nullptr});
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward_cpu(
    const Tensor& dy,  // [M, N]
    const Tensor& x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
    const Tensor& xa,  // [M, R] float32
    double scale, double dropout_p, const std::optional<Tensor>& seed, bool need_dx, bool need_da, bool need_db) {
  const Adapters adapters{{lora_a}, {lora_b}, {scale}, {dropout_p}, seed};
  check_gradient(dy, x, weight, adapters, xa);
  auto [dx, da, db] = backward(dy, x, weight, adapters, xa, {make_segments(adapters, {0, x.size(0)}), nullptr}, need_dx, need_da, need_db);
  if (need_da) da = torch::stable::view(da, lora_a.sizes());
  if (need_db) db = torch::stable::view(db, lora_b.sizes());
  return {dx, da, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("lora_linear_cpu", TORCH_BOX(&lora_linear_cpu));
  m.impl("lora_linear_backward_cpu", TORCH_BOX(&lora_linear_backward_cpu));
}

}  // namespace fastlora

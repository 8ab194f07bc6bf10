// y += s xa Bᵀ with xa = d(x) Aᵀ;  dxa = s dy B;  dx += d'(dxa A);  dA = dxaᵀ d(x);  dB = s dyᵀ xa: what lora_linear adds to products with frozen
// weights, which fastlora/frozen computes. The equations are fastlora/reference.py::lora_linear and lora_linear_backward, of layers that share x, where
// each row may have an adapter of its own. All layers' A read x once in the forward, y is read and written once; dy, dx and x once in the backward;
// sums are in float32. Dropout's mask is bits, drawn in the forward only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "adapters.h"
#include "new_tensor.h"

namespace fastlora {
namespace {

/// Raises unless each is [M, N] in x's dtype; the N of all.
std::vector<int64_t> check_outputs(const std::vector<Tensor>& outputs, const char* name, const Tensor& x) {
  check_cpu(x, "x");
  check(x, "x", {ANY, ANY}, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, x);
  STD_TORCH_CHECK(!outputs.empty(), name, ": got no layer, expected at least one");
  std::vector<int64_t> columns;
  for (size_t g = 0; g < outputs.size(); ++g) {
    check(outputs[g], numbered(name, g, outputs.size()).c_str(), {x.size(0), ANY}, {x.scalar_type()}, x);
    columns.push_back(outputs[g].size(1));
  }
  return columns;
}

void check_written(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.size(1) <= 1 || tensor.stride(1) == 1, name, ": got rows with gaps, expected rows that lie together");
}

std::tuple<Tensor, Tensor> lora_update_cpu(
    const std::vector<Tensor>& y,                                            // G of [M, N_g], added to
    const Tensor& x,                                                         // [M, K]
    const std::vector<Tensor>& lora_a, const std::vector<Tensor>& lora_b,    // G S of [R_gi, K], [N_g, R_gi]
    const std::vector<double>& scale, const std::vector<double>& dropout_p,  // G S
    const std::optional<Tensor>& seed,                                       // [G]
    const std::optional<Tensor>& order, const std::optional<Tensor>& offsets) {
  const Adapters adapters{static_cast<int64_t>(y.size()), lora_a, lora_b, scale, dropout_p, seed, std::nullopt};
  const Batch batch = checked_batch(x, check_outputs(y, "y", x), adapters, order, offsets);
  for (const Tensor& one : y) check_written(one, "y");
  return have_few_rows(batch) ? add_updates_of_few_rows(y, x, adapters, batch) : add_updates(y, x, adapters, batch);
}

std::tuple<Tensor, Tensor> lora_update_backward_cpu(
    const std::optional<Tensor>& dx,  // [M, K], added to; none: not needed
    const std::vector<Tensor>& dy,    // G of [M, N_g]
    const Tensor& x, const std::vector<Tensor>& lora_a, const std::vector<Tensor>& lora_b,
    const Tensor& xa,    // [G, M, max R_gi] float32
    const Tensor& keep,  // [G, M, keep_bytes] uint8, or no elements
    const std::vector<double>& scale, const std::vector<double>& dropout_p, const std::optional<Tensor>& order,
    const std::optional<Tensor>& offsets, bool need_da, bool need_db) {
  const int64_t G = static_cast<int64_t>(dy.size());
  Adapters adapters{G, lora_a, lora_b, scale, dropout_p, std::nullopt, std::nullopt};
  const std::vector<int64_t> columns = check_outputs(dy, "dy", x);
  if (keep.numel() != 0) adapters.keep = dense(keep);
  const Batch batch = checked_batch(x, columns, adapters, order, offsets);
  check_saved(xa, keep, G, batch.ranks, x);
  if (dx) {
    check(*dx, "dx", {x.size(0), x.size(1)}, {x.scalar_type()}, x);
    check_written(*dx, "dx");
  }
  return add_updates_backward(dx ? &*dx : nullptr, dy, x, adapters, xa, batch, need_da, need_db);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("lora_update_cpu", TORCH_BOX(&lora_update_cpu));
  m.impl("lora_update_backward_cpu", TORCH_BOX(&lora_update_backward_cpu));
}

}  // namespace fastlora

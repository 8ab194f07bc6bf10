// Queries and keys turned by the angles of their positions, and the gradient, which is turned back. The equations are fastlora/reference.py::rotary and
// rotary_backward.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>

#include "adapters.h"

namespace fastlora {
namespace {

constexpr std::initializer_list<ScalarType> FLOATS = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

Tensor with_dense_heads(const Tensor& x) { return x.size(3) <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x); }

/// [B, H, T, D], where a token's heads lie together.
Tensor turned(const Tensor& x, const Tensor& cosines, const Tensor& sines, bool inverse) {
  const Tensor dense = with_dense_heads(x);
  const int64_t B = x.size(0), H = x.size(1), T = x.size(2), D = x.size(3);
  const Tensor y = torch::stable::new_empty(x, std::array<int64_t, 4>{B, T, H, D});
  const Rotary task{
      kind_of(x), T, H, D, dense.const_data_ptr(), {dense.stride(0), dense.stride(1), dense.stride(2)}, cosines.const_data_ptr(),
      sines.const_data_ptr(), {cosines.size(0) == 1 ? 0 : T * D, D}, inverse, y.mutable_data_ptr()};
  torch::stable::parallel_for(0, B * T, GRAIN / (H * D + 1) + 1, [&](int64_t begin, int64_t end) { kernels().rotary(task, begin, end); });
  return torch::stable::transpose(y, 1, 2);
}

std::tuple<Tensor, Tensor> both(const Tensor& q, const Tensor& k, const Tensor& cosines, const Tensor& sines, bool inverse) {
  check_cpu(q, "q");
  check(q, "q", {ANY, ANY, ANY, ANY}, FLOATS, q);
  check(k, "k", {q.size(0), ANY, q.size(2), q.size(3)}, {q.scalar_type()}, q);
  STD_TORCH_CHECK(q.size(3) % 2 == 0, "q: got ", describe(q), ", expected an even last dimension");
  const int64_t batch = cosines.dim() == 3 && cosines.size(0) == 1 ? 1 : q.size(0);
  check(cosines, "cos", {batch, q.size(2), q.size(3)}, {q.scalar_type()}, q);
  check(sines, "sin", {batch, q.size(2), q.size(3)}, {q.scalar_type()}, q);
  const Tensor cosine = torch::stable::contiguous(cosines), sine = torch::stable::contiguous(sines);
  return {turned(q, cosine, sine, inverse), turned(k, cosine, sine, inverse)};
}

std::tuple<Tensor, Tensor> rotary_cpu(
    const Tensor& q,        // [B, H, T, D]
    const Tensor& k,        // [B, H of its own, T, D]
    const Tensor& cosines,  // [B or 1, T, D]
    const Tensor& sines) {
  return both(q, k, cosines, sines, false);
}

std::tuple<Tensor, Tensor> rotary_backward_cpu(const Tensor& dq, const Tensor& dk, const Tensor& cosines, const Tensor& sines) {
  return both(dq, dk, cosines, sines, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("rotary_cpu", TORCH_BOX(&rotary_cpu));
  m.impl("rotary_backward_cpu", TORCH_BOX(&rotary_backward_cpu));
}

}  // namespace fastlora

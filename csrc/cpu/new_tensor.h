// A tensor of a call's results: torch::stable::new_empty looks its operator up by name, which costs a small call as much as its work.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace fastlora {

/// Uninitialised, without gaps, where `like` is.
inline torch::stable::Tensor new_tensor(const torch::stable::Tensor& like, const std::vector<int64_t>& sizes, torch::headeronly::ScalarType dtype) {
  auto number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  // torch's own macro for this has one name in 2.11 and another one later.
  const bool failed = aoti_torch_aten_new_empty(
      like.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &number, nullptr, nullptr, 0, nullptr, &made);
  STD_TORCH_CHECK(!failed, "torch could not make a tensor of a call's results");
  return torch::stable::Tensor(made);
}

/// The tensor itself where it has no gaps, which spares most calls the same way.
inline torch::stable::Tensor dense(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace fastlora

// Checks of what Python hands over. A failed check becomes a Python exception that names the argument, before any memory is touched.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <string>

namespace fastlora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << torch::headeronly::toString(tensor.scalar_type()) << " [";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

constexpr int64_t ANY = -1;  // a size that may be anything

inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (const int64_t size : sizes) {
    fits = fits && (size == ANY || tensor.size(i) == size);
    ++i;
  }
  if (fits) return;
  std::ostringstream expected;
  for (const int64_t size : sizes) expected << (expected.tellp() > 0 ? ", " : "") << (size == ANY ? "any" : std::to_string(size));
  STD_TORCH_CHECK(false, name, ": got ", describe(tensor), ", expected shape [", expected.str(), "]");
}

inline void check_dtype(const Tensor& tensor, const char* name, std::initializer_list<ScalarType> dtypes) {
  if (std::find(dtypes.begin(), dtypes.end(), tensor.scalar_type()) != dtypes.end()) return;
  std::ostringstream expected;
  for (const ScalarType dtype : dtypes) expected << (expected.tellp() > 0 ? " or " : "") << torch::headeronly::toString(dtype);
  STD_TORCH_CHECK(false, name, ": got ", describe(tensor), ", expected ", expected.str());
}

inline void check_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": got a tensor on another device, expected one on the CPU");
}

/// Raises unless the tensor is where `like` is.
inline void check_device(const Tensor& tensor, const char* name, const Tensor& like) {
  if (tensor.is_cpu() == like.is_cpu() && (tensor.is_cpu() || tensor.get_device_index() == like.get_device_index())) return;
  const auto place = [](const Tensor& one) { return one.is_cpu() ? "the CPU" : "device " + std::to_string(one.get_device_index()); };
  STD_TORCH_CHECK(false, name, ": got a tensor on ", place(tensor), ", expected one on ", place(like), " as the other tensors");
}

/// Raises unless the tensor has these sizes and one of these dtypes, and is where `like` is.
inline void check(
    const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes, std::initializer_list<ScalarType> dtypes, const Tensor& like) {
  check_device(tensor, name, like);
  check_shape(tensor, name, sizes);
  check_dtype(tensor, name, dtypes);
}

}  // namespace fastlora

// What lora_linear asks of its arguments, whoever computes it. Numbers in order and offsets are not looked at.
#pragma once

#include <optional>
#include <vector>

#include "check.h"

namespace fastlora {

/// Bytes of a row of dropout's bits: fastlora/reference.py::keep_bytes.
inline int64_t keep_bytes(int64_t columns) { return (columns + 63) / 64 * 8; }

/// name[i], or the name where there is only one.
inline std::string numbered(const char* name, size_t i, size_t count) {
  return count == 1 ? name : std::string(name) + "[" + std::to_string(i) + "]";
}

/// Raises unless x [M, K], weight [N, K] and bias [N] fit together; where x is its caller has checked.
inline void check_base(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check(x, "x", {ANY, ANY}, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, x);
  check(weight, "weight", {ANY, x.size(1)}, {x.scalar_type()}, x);
  if (bias) check(*bias, "bias", {weight.size(0)}, {x.scalar_type()}, x);
}

/// Raises unless the adapters fit x [M, K], the N of each layer and one another: one for each layer, or as many where order and offsets say whose
/// the rows are.
inline void check_adapters(
    const Tensor& x, const std::vector<int64_t>& out, const std::vector<Tensor>& lora_a, const std::vector<Tensor>& lora_b,
    const std::vector<double>& scale, const std::vector<double>& dropout_p, const std::optional<Tensor>& order, const std::optional<Tensor>& offsets) {
  const size_t S = lora_a.size(), G = out.size();
  STD_TORCH_CHECK(S >= 1, "lora_a: got no adapter, expected at least one");
  STD_TORCH_CHECK(S % G == 0 && (order || S == G), "lora_a: got ", S, " adapters for ", G, " layers, expected ", order ? "as many" : "one", " for each");
  STD_TORCH_CHECK(lora_b.size() == S, "lora_b: got ", lora_b.size(), " adapters, expected ", S);
  STD_TORCH_CHECK(scale.size() == S, "scale: got ", scale.size(), " numbers, expected ", S);
  STD_TORCH_CHECK(dropout_p.size() == S, "dropout_p: got ", dropout_p.size(), " numbers, expected ", S);
  for (size_t i = 0; i < S; ++i) {
    const std::string a = numbered("lora_a", i, S), b = numbered("lora_b", i, S);
    check(lora_a[i], a.c_str(), {ANY, x.size(1)}, {x.scalar_type(), ScalarType::Float}, x);
    check_dtype(lora_a[i], a.c_str(), {lora_a[0].scalar_type()});
    const int64_t R = lora_a[i].size(0);
    STD_TORCH_CHECK(R >= 1, a, ": got ", describe(lora_a[i]), ", expected a rank of at least 1");
    check(lora_b[i], b.c_str(), {out[i / (S / G)], R}, {lora_a[0].scalar_type()}, x);
    const double p = dropout_p[i];
    STD_TORCH_CHECK(p >= 0 && p <= 1, numbered("dropout_p", i, S), ": got ", p, ", expected a probability between 0 and 1");
  }
  if (!order) return;
  check(*order, "order", {x.size(0)}, {ScalarType::Long}, x);
  STD_TORCH_CHECK(offsets.has_value(), "offsets: got none, expected them beside order");
  check(*offsets, "offsets", {static_cast<int64_t>(S / G) + 3}, {ScalarType::Long}, x);
}

/// Raises unless there is a seed for each layer, in whatever shape, or none.
inline void check_seed(const std::optional<Tensor>& seed, int64_t layers, const Tensor& x) {
  if (!seed) return;
  check_device(*seed, "seed", x);
  check_dtype(*seed, "seed", {ScalarType::Long});
  STD_TORCH_CHECK(seed->numel() == layers, "seed: got ", describe(*seed), ", expected ", layers, layers == 1 ? " element" : " elements");
}

/// Raises unless xa and keep are what a forward of so many layers, the largest rank R, leaves. Whether keep has elements.
inline bool check_saved(const Tensor& xa, const Tensor& keep, int64_t layers, int64_t R, const Tensor& x) {
  check(xa, "xa", {layers, x.size(0), R}, {ScalarType::Float}, x);
  check_device(keep, "keep", x);
  check_dtype(keep, "keep", {ScalarType::Byte});
  if (keep.numel() == 0) return false;
  check_shape(keep, "keep", {layers, x.size(0), keep_bytes(x.size(1))});
  return true;
}

}  // namespace fastlora

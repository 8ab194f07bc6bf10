// The adapters' part of lora_linear and multi_lora on a CPU: checks, the frozen products, and the passes split over threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../check.h"
#include "adapter_passes.h"

namespace fastlora {

constexpr int64_t GRAIN = 1 << 15;  // multiplications or elements worth a thread

inline Kind kind_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Kind::FLOAT32;
    case ScalarType::BFloat16: return Kind::BFLOAT16;
    default: return Kind::FLOAT16;
  }
}

inline float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

/// The matrix itself where each row lies together in memory, however far the rows are apart; else a copy.
inline Tensor with_dense_rows(const Tensor& matrix) {
  return matrix.size(1) <= 1 || matrix.stride(1) == 1 ? matrix : torch::stable::contiguous(matrix);
}

/// The adapters of a layer; lora_linear has one.
struct Adapters {
  std::vector<Tensor> a;  // S of [R_i, K]
  std::vector<Tensor> b;  // S of [N, R_i]
  std::vector<double> scale;
  std::vector<double> dropout_p;
  std::optional<Tensor> seed;  // int64, one element

  int64_t all_ranks() const;   // sum R_i
  int64_t most_ranks() const;  // max R_i
};

/// Raises unless x [M, K], weight [N, K] and bias [N] fit together.
void check_base(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);
/// The same with the adapters.
void check_layer(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Adapters& adapters);
/// The same for a backward's dy [M, N] and xa [M, max R_i].
void check_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight, const Adapters& adapters, const Tensor& xa);

/// One segment for each adapter: which places in the order of rows are its own.
std::vector<Segment> make_segments(const Adapters& adapters, const std::vector<int64_t>& bounds);

/// Rows in their adapters' order; order is null where all rows belong to the only adapter.
struct Batch {
  std::vector<Segment> segments;
  const int64_t* order;
};

/// Zeros for xa [M, max R_i] in float32.
Tensor new_projection(const Tensor& x, const Adapters& adapters);

/// Whether `few_rows` takes these: 1 to FEW_ROWS dense rows, and a weight that is dense by row or by column.
bool suits_few_rows(const Tensor& x, const Tensor& weight);

/// `forward` for a few rows and without dropout: W is read once, A and B where they lie.
std::tuple<Tensor, Tensor> few_rows(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Adapters& adapters, const Batch& batch);

/// y = x Wᵀ + b + s_i xa_i B_iᵀ and xa_i = d_i(x) A_iᵀ, for the rows of each segment.
std::tuple<Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Adapters& adapters, const Batch& batch);

/// dx, and dA_i [R_i, K] and dB_i [N, R_i] one after the other in two flat tensors; one that is not needed has no elements.
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Adapters& adapters, const Tensor& xa, const Batch& batch, bool need_dx,
    bool need_da, bool need_db);

}  // namespace fastlora

// The adapters' part of lora_linear and multi_lora on a CPU: checks, the frozen products, and the passes split over threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <initializer_list>
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

/// Bytes of a row of dropout's bits.
inline int64_t bits_stride(int64_t columns) { return (columns + COLUMN_UNIT - 1) / COLUMN_UNIT * (COLUMN_UNIT / 8); }

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
  std::optional<Tensor> seed;  // a forward's, int64: one element, or one an adapter where they share rows
  std::optional<Tensor> keep;  // a backward's: what the forward has drawn; none of the two: nothing is dropped

  int64_t all_ranks() const;   // sum R_i
  int64_t most_ranks() const;  // max R_i
};

/// Raises unless x [M, K], weight [N, K] and bias [N] fit together.
void check_base(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);
/// The same with the adapters.
void check_layer(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Adapters& adapters);
/// Raises unless a backward's dy [M, N] and xa [M, ranks] fit them.
void check_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight);
void check_projection(const Tensor& xa, const Tensor& x, int64_t ranks);
/// A backward's keep without gaps, or none where it has no elements; raises unless its bytes have these sizes.
std::optional<Tensor> checked_keep(const Tensor& keep, std::initializer_list<int64_t> sizes);

/// Who has which rows of x.
struct Batch {
  std::vector<Segment> segments;  // one an adapter
  const int64_t* order;           // rows in their adapters' order; null: row i is at place i
  int64_t ranks;                  // columns of xa
  int64_t masks;                  // that dropout draws for each row
};

/// Each adapter has rows of its own: adapter i the places bounds[i] to bounds[i + 1] in the order of rows.
Batch split_rows(const Adapters& adapters, const std::vector<int64_t>& bounds, const int64_t* order);
/// Every adapter has all M rows, its own columns of xa [M, sum R_i], and a mask of its own: seed[i] for adapter i.
Batch share_rows(const Adapters& adapters, int64_t M);

/// Zeros for xa [M, ranks] in float32.
Tensor new_projection(const Tensor& x, int64_t ranks);

/// Whether `few_rows` takes these: 1 to FEW_ROWS dense rows, and a weight that is dense by row or by column.
bool suits_few_rows(const Tensor& x, const Tensor& weight);

/// `forward` for a few rows and without dropout: W is read once, A and B where they lie.
std::tuple<Tensor, Tensor> few_rows(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Adapters& adapters, const Batch& batch);

/// y = x Wᵀ + b + s_i xa_i B_iᵀ and xa_i = d_i(x) A_iᵀ, for the rows of each segment; and keep.
std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Adapters& adapters, const Batch& batch);

/// dx, and dA_i [R_i, K] and dB_i [N, R_i] one after the other in two flat tensors; one that is not needed has no elements.
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Adapters& adapters, const Tensor& xa, const Batch& batch, bool need_dx,
    bool need_da, bool need_db);

/// Layers that share x, each with one adapter: y_i = x W_iᵀ + b_i + s_i xa_i B_iᵀ with all xa_i from one read of x. No bias: no elements.
std::tuple<std::vector<Tensor>, Tensor, Tensor> forward_shared(
    const Tensor& x, const std::vector<Tensor>& weight, const std::vector<Tensor>& bias, const Adapters& adapters);

/// dx is the sum over the layers, and x is read once for all dA_i.
std::tuple<Tensor, Tensor, Tensor> backward_shared(
    const std::vector<Tensor>& dy, const Tensor& x, const std::vector<Tensor>& weight, const Adapters& adapters, const Tensor& xa,
    bool need_dx, bool need_da, bool need_db);

}  // namespace fastlora

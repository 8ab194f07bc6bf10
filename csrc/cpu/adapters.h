// The adapters' part of lora_linear on a CPU: checks, and the passes split over threads. Products with frozen weights are its callers' business.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "../check_lora_linear.h"
#include "kernels.h"

namespace fastlora {

constexpr int64_t GRAIN = 1 << 15;  // multiplications or elements worth a thread

inline Kind kind_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Kind::FLOAT32;
    case ScalarType::BFloat16: return Kind::BFLOAT16;
    default: return Kind::FLOAT16;
  }
}

static_assert(COLUMN_UNIT % 64 == 0);  // what keep_bytes rounds up to

/// reference.py::drop_threshold and keep_scale.
struct Drop {
  uint32_t threshold;
  float factor;
};

inline Drop drop_of(double p) {
  const auto threshold = static_cast<uint32_t>(65536 * p + 0.5);
  return {threshold, threshold < 65536 ? static_cast<float>(65536.0 / (65536 - threshold)) : 0.0f};
}

inline float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

/// The matrix itself where each row lies together in memory, however far the rows are apart; else a copy.
inline Tensor with_dense_rows(const Tensor& matrix) {
  return matrix.size(1) <= 1 || matrix.stride(1) == 1 ? matrix : torch::stable::contiguous(matrix);
}

/// The adapters of layers that share x, all of the first layer, then all of the second: as many for each layer.
struct Adapters {
  int64_t layers;              // G
  std::vector<Tensor> a;       // G S of [R_i, K]
  std::vector<Tensor> b;       // G S of [N_g, R_i]
  std::vector<double> scale;
  std::vector<double> dropout_p;
  std::optional<Tensor> seed;  // a forward's, [G] int64
  std::optional<Tensor> keep;  // a backward's [G, M, keep_bytes]: what the forward has drawn; none of the two: nothing is dropped

  int64_t each() const { return static_cast<int64_t>(a.size()) / layers; }  // S
  int64_t all_ranks() const;   // sum R_i
  int64_t most_ranks() const;  // max R_i
  Adapters of_layer(int64_t layer) const;  // without its seed and keep
};

/// Who has which rows of x.
struct Batch {
  std::vector<Segment> segments;  // one an adapter of a layer
  std::optional<Tensor> rows_in_order;  // [M] int64
  const int64_t* order;           // the same; null: row i is at place i
  int64_t rows;                   // M
  int64_t layers;
  int64_t ranks;                  // columns of xa [layers, M, ranks]
  bool is_whole;                  // every row has an adapter of so many ranks in every layer

  /// Rows whose adapter does not exist become NaN; they are the last in the order.
  void poison_invalid(const Tensor& rows) const;
};

/// Raises unless the adapters fit x, rows of out[g] columns in layer g, and one another; order and offsets as in the reference, or neither.
Batch checked_batch(
    const Tensor& x, const std::vector<int64_t>& out, const Adapters& adapters, const std::optional<Tensor>& order,
    const std::optional<Tensor>& offsets);

/// Room for what a pass over v [M, L] projects, [layers, M, ranks] float32; zeros where the pass does not write all of it.
Tensor new_projection(const Tensor& v, const Batch& batch);

/// y[g] += s_i xa_i B_iᵀ with xa_i = d_i(x) A_iᵀ, for the rows of each segment; xa and keep [layers, M, keep_bytes], without elements if none drops.
std::tuple<Tensor, Tensor> add_updates(const std::vector<Tensor>& y, const Tensor& x, const Adapters& adapters, const Batch& batch);

/// Whether nothing is dropped and each adapter of a mixed batch has a few rows at most, as decoding has them.
bool have_few_rows(const Batch& batch);

/// `add_updates` for those (few_rows.cpp): A and B are read where they lie, since packing them costs more than their rows' work.
std::tuple<Tensor, Tensor> add_updates_of_few_rows(
    const std::vector<Tensor>& y, const Tensor& x, const Adapters& adapters, const Batch& batch);

/// dx += d_i'(dxa_i A_i), where there is a dx; every dA_i and every dB_i one after the other; one that is not needed has no elements.
std::tuple<Tensor, Tensor> add_updates_backward(
    const Tensor* dx, const std::vector<Tensor>& dy, const Tensor& x, const Adapters& adapters, const Tensor& xa, const Batch& batch,
    bool need_da, bool need_db);

}  // namespace fastlora

// Frozen weights in 4 bits or 8 on a CPU (fastlora/reference.py::dequantise):
//     dequantise_cpu           some rows and columns of W, in the dtype of what they are written to
//     few_rows_quantised_cpu   y = x Wᵀ + b for 1 to FEW_ROWS rows, W rounded to x's dtype as it is read, and never written
#include <torch/csrc/stable/library.h>

#include "adapters.h"
#include "new_tensor.h"

namespace fastlora {
namespace {

void check_dense(const Tensor& tensor, const char* name) {
  check_cpu(tensor, name);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": got ", describe(tensor), " with gaps, expected none");
}

/// Raises unless they make a weight [rows, columns].
Quantised checked_weight(
    const Tensor& packed,                       // any shape: uint8, two elements each; or, without a code, int8
    const std::optional<Tensor>& code,          // [16] float32
    const Tensor& factor,                       // [blocks] float32, or [ceil(blocks / factor_block)]
    const std::optional<Tensor>& factor_codes,  // [blocks] uint8
    const std::optional<Tensor>& factor_code,   // [256] float32, with them
    double factor_offset, int64_t block, int64_t factor_block, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, "rows, columns: got ", rows, ", ", columns, ", expected none below 0");
  STD_TORCH_CHECK(block >= 1, "block: got ", block, ", expected at least 1");
  const int64_t elements = rows * columns, blocks = (elements + block - 1) / block;
  check_dense(packed, "packed");
  check_dtype(packed, "packed", {code ? ScalarType::Byte : ScalarType::Char});
  STD_TORCH_CHECK(
      packed.numel() == (code ? elements / 2 : elements), "packed: got ", describe(packed), ", expected ", code ? "half a byte" : "a byte",
      " for each of ", elements, " elements");
  if (code) {
    STD_TORCH_CHECK(columns % 2 == 0, "columns: got ", columns, ", expected an even number");
    STD_TORCH_CHECK(block % 2 == 0, "block: got ", block, ", expected an even number");
    check_dense(*code, "code");
    check_shape(*code, "code", {16});
    check_dtype(*code, "code", {ScalarType::Float});
  }
  STD_TORCH_CHECK(factor_codes.has_value() == factor_code.has_value(), "factor_code: expected with factor_codes, and not without");
  if (factor_codes) {
    STD_TORCH_CHECK(factor_block >= 1, "factor_block: got ", factor_block, ", expected at least 1");
    check_dense(*factor_codes, "factor_codes");
    check_shape(*factor_codes, "factor_codes", {blocks});
    check_dtype(*factor_codes, "factor_codes", {ScalarType::Byte});
    check_dense(*factor_code, "factor_code");
    check_shape(*factor_code, "factor_code", {256});
    check_dtype(*factor_code, "factor_code", {ScalarType::Float});
  }
  check_dense(factor, "factor");
  check_shape(factor, "factor", {factor_codes ? (blocks + factor_block - 1) / factor_block : blocks});
  check_dtype(factor, "factor", {ScalarType::Float});
  return Quantised{
      columns,
      static_cast<const uint8_t*>(packed.const_data_ptr()),
      code ? static_cast<const float*>(code->const_data_ptr()) : nullptr,
      block,
      static_cast<const float*>(factor.const_data_ptr()),
      factor_codes ? static_cast<const uint8_t*>(factor_codes->const_data_ptr()) : nullptr,
      factor_code ? static_cast<const float*>(factor_code->const_data_ptr()) : nullptr,
      factor_block,
      static_cast<float>(factor_offset)};
}

void dequantise_cpu(
    const Tensor& to,  // [rows, columns] that are wanted, the first of them W's at (row, column)
    const Tensor& packed, const std::optional<Tensor>& code, const Tensor& factor, const std::optional<Tensor>& factor_codes,
    const std::optional<Tensor>& factor_code, double factor_offset, int64_t block, int64_t factor_block, int64_t rows, int64_t columns, int64_t row,
    int64_t column) {
  const Quantised weight = checked_weight(packed, code, factor, factor_codes, factor_code, factor_offset, block, factor_block, rows, columns);
  check_cpu(to, "to");
  check(to, "to", {ANY, ANY}, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, to);
  const int64_t height = to.size(0), width = to.size(1);
  STD_TORCH_CHECK(width <= 1 || to.stride(1) == 1, "to: got ", describe(to), " with gaps in its rows, expected none");
  STD_TORCH_CHECK(row >= 0 && row + height <= rows, "row: got ", row, ", expected room for ", height, " of ", rows, " rows");
  STD_TORCH_CHECK(column >= 0 && column + width <= columns, "column: got ", column, ", expected room for ", width, " of ", columns, " columns");
  STD_TORCH_CHECK(!code || (column % 2 == 0 && width % 2 == 0), "column: got ", column, " and a width of ", width, ", expected even numbers");
  const Dequantise task{weight, kind_of(to), row, column, column + width, to.mutable_data_ptr(), to.stride(0)};
  torch::stable::parallel_for(row, row + height, GRAIN / (width + 1) + 1, [&](int64_t begin, int64_t end) { kernels().dequantise(task, begin, end); });
}

Tensor few_rows_quantised_cpu(
    const Tensor& x,  // [M, K]
    const Tensor& packed, const std::optional<Tensor>& code, const Tensor& factor, const std::optional<Tensor>& factor_codes,
    const std::optional<Tensor>& factor_code, double factor_offset, int64_t block, int64_t factor_block, int64_t rows, int64_t columns,
    const std::optional<Tensor>& bias) {  // [N]
  const Quantised weight = checked_weight(packed, code, factor, factor_codes, factor_code, factor_offset, block, factor_block, rows, columns);
  check_cpu(x, "x");
  check(x, "x", {ANY, columns}, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, x);
  const int64_t M = x.size(0);
  STD_TORCH_CHECK(M >= 1 && M <= FEW_ROWS && columns >= 1, "x: got ", describe(x), ", expected 1 to ", FEW_ROWS, " rows with elements");
  if (bias) check(*bias, "bias", {rows}, {x.scalar_type()}, x);
  const Tensor y = new_tensor(x, {M, rows}, x.scalar_type()), lined = with_dense_rows(x), dense_bias = bias ? dense(*bias) : y;
  FewRows task{};
  task.kind = kind_of(x);
  task.rows = M;
  task.in = columns;
  task.x = lined.const_data_ptr();
  task.x_stride = lined.stride(0);
  task.bias = bias ? dense_bias.const_data_ptr() : nullptr;
  task.y = y.mutable_data_ptr();
  task.y_stride = rows;
  torch::stable::parallel_for(0, rows, GRAIN / columns + 1, [&](int64_t begin, int64_t end) {
    kernels().few_rows_quantised(task, weight, begin, end);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("dequantise_cpu", TORCH_BOX(&dequantise_cpu));
  m.impl("few_rows_quantised_cpu", TORCH_BOX(&few_rows_quantised_cpu));
}

}  // namespace fastlora

// y = x Wᵀ + b + s xa Bᵀ with xa = d(x) Aᵀ;  dxa = s dy B;  dx = dy W + d'(dxa A);  dA = dxaᵀ d(x);  dB = s dyᵀ xa, in bfloat16 and float16.
// The equations are fastlora/reference.py::lora_linear and lora_linear_backward.
//
//     forward     A and B rounded to x's numbers and padded        round_kernel
//                 xa, the mask drawn on the way and kept as bits   side_kernel: one read of x
//                 y, the rank step last, the bias on the way out   product_sm80_kernel, product_sm90_kernel
//     backward    A, B and xa rounded, padded, transposed          round_kernel
//                 dxa and parts of dB                              side_kernel: dy from memory once, then from the cache
//                 dx, the rank step last and masked                product_sm80_kernel, product_sm90_kernel
//                 parts of dA                                      side_kernel: one read of x
//                 dA and dB, parts added in order                  sum_kernel
//
// Layers that share x are such calls one after the other, each of which adds its dx to what those before have left.
// Products accumulate in float32; A, B, s xa, xa and dxa are rounded once to x's numbers. The factor 1 / (1 - p) is applied to sums.
#include "lora_linear.h"

#include "product_launch.cuh"

namespace fastlora {
namespace {

template <class T>
struct Roundings {
  Rounding<T> matrix[3];
  int count;
};

template <class T>
__global__ void __launch_bounds__(BLOCK) round_kernel(const __grid_constant__ Roundings<T> task) {
  let_next_launch_begin();
  round(task.matrix[blockIdx.y]);
}

/// factor * the sum of the parts [parts, padded R, padded columns], written as [R, columns] with any strides.
struct Sum {
  const float* parts;
  int64_t count, rows, columns;
  void* to;
  int64_t row_stride, column_stride;
  float factor;
};

struct Sums {
  Sum sum[2];
  int count, R;
  bool wide;  // to float32
};

/// Four columns a thread.
template <class T>
__global__ void __launch_bounds__(BLOCK) sum_kernel(const __grid_constant__ Sums task) {
  let_next_launch_begin();
  wait_for_launch_before();
  const Sum& sum = task.sum[blockIdx.y];
  const int64_t stride = sums_stride(sum.columns, task.R), a_part = padded_rank(task.R) * stride;
  const uint32_t fours = static_cast<uint32_t>(divide_up(sum.columns, 4)), all = static_cast<uint32_t>(sum.rows) * fours;
  for (uint32_t i = blockIdx.x * BLOCK + threadIdx.x; i < all; i += gridDim.x * BLOCK) {
    const int64_t row = i / fours, column = i % fours * 4;
    const float* from = sum.parts + row * stride + column;
    float total[4] = {};
#pragma unroll 8
    for (int64_t part = 0; part < sum.count; ++part, from += a_part) {
      const float4 four = *reinterpret_cast<const float4*>(from);
      total[0] += four.x, total[1] += four.y, total[2] += four.z, total[3] += four.w;
    }
    for (int k = 0; k < 4 && column + k < sum.columns; ++k) {
      const int64_t at = row * sum.row_stride + (column + k) * sum.column_stride;
      const float value = total[k] * sum.factor;
      if (task.wide) {
        static_cast<float*>(sum.to)[at] = value;
      } else {
        static_cast<uint16_t*>(sum.to)[at] = static_cast<uint16_t>(pack<T>(value, 0));
      }
    }
  }
}

/// One call: the layer's sizes, and how its kernels are launched.
template <class T>
struct Call {
  const LoraLinear& layer;
  int M, K, N, R, padded;
  cudaStream_t stream;

  Call(const LoraLinear& layer, cudaStream_t stream)
      : layer(layer), M(static_cast<int>(layer.M)), K(static_cast<int>(layer.K)), N(static_cast<int>(layer.N)), R(static_cast<int>(layer.R)),
        padded(padded_rank(R)), stream(stream) {}

  Rounding<T> rounding(const Matrix& from, int64_t rows, int64_t columns, T* to, int64_t to_rows, int64_t to_columns) const {
    return {from.data, layer.adapter_dtype == Dtype::FLOAT32, rows, columns, from.strides[0], from.strides[1], to, to_rows, to_columns, to_columns};
  }

  void round(const Roundings<T>& task) const {
    int64_t most = 1;
    for (int i = 0; i < task.count; ++i) most = std::max(most, task.matrix[i].to_rows * task.matrix[i].to_columns);
    launch(round_kernel<T>, dim3(blocks_for(most / 8), task.count), dim3(BLOCK), 0, stream, task);
  }

  bool by_column() const { return lies_by_column(layer.weight, N, K); }
  int64_t weight_stride() const { return layer.weight.strides[by_column() ? 1 : 0]; }

  OneAdapter adapter(bool drops) const {
    const double p = layer.dropout_p;
    return {{0, 0, R, drops ? threshold_of(p) : 0, factor_of(p), static_cast<float>(layer.scale)}, M};
  }
};

template <class T>
struct ForwardWorkspace {
  T *a, *b, *xa;
  int a_stride;
  int64_t bytes;

  ForwardWorkspace(const Call<T>& call, void* base) : a_stride(a_columns(call.K, call.R)) {
    Workspace space{static_cast<unsigned char*>(base)};
    a = space.take<T>(int64_t{1} * call.padded * a_stride);  // [padded R, padded K]
    b = space.take<T>(call.layer.N * call.padded);           // [N, padded R]
    xa = space.take<T>(call.layer.M * call.padded);          // [M, padded R]: s xa
    bytes = space.used;
  }
};

template <class T>
std::string forward(const LoraLinearForward& given, cudaStream_t stream) {
  const LoraLinear& layer = given.layer;
  const Call<T> call(layer, stream);
  if (call.M == 0) return "";
  const ForwardWorkspace<T> space(call, given.workspace);
  const Rounding<T> a = call.rounding(layer.lora_a, call.R, call.K, space.a, call.padded, space.a_stride);
  const Rounding<T> b = call.rounding(layer.lora_b, call.N, call.R, space.b, call.N, call.padded);
  call.round({{a, b}, 2});

  const T* const x = static_cast<const T*>(layer.x.data);
  const OneAdapter adapter = call.adapter(given.seed);
  const Shrink<T, OneAdapter> shrink{
      x, layer.x.strides[0], space.a, space.a_stride, given.xa, given.xa_stride, space.xa, nullptr,
      adapter.adapter.threshold ? given.keep : nullptr, given.seed, call.M, call.K, call.R, round_up(call.M, PLACES), adapter};
  Sides<T, OneAdapter> sides(call.R);
  sides.take(shrink, divide_up(call.M, SHRINK_ROWS), span_of(call.M, call.R) / SHRINK_ROWS);
  const Product<T, OneAdapter> product{
      x, layer.x.strides[0], static_cast<const T*>(layer.weight.data), call.weight_stride(), space.xa, space.b, call.padded,
      static_cast<const T*>(layer.bias), layer.bias_stride, nullptr, static_cast<T*>(given.y), call.M, call.N, call.K, call.R, call.padded, adapter};
  return launch_products<T, OneAdapter, false>(call.by_column(), product, sides, Sides<T, OneAdapter>(call.R), stream);
}

template <class T>
struct BackwardWorkspace {
  T *a, *b, *xa, *dxa, *dxa_transposed;
  float *da, *db;
  int a_stride, b_stride, rows, parts;
  int64_t bytes;

  BackwardWorkspace(const Call<T>& call, void* base)
      : a_stride(a_columns(call.K, call.R)), b_stride(a_columns(call.N, call.R)), rows(round_up(call.M, PLACES)),
        parts(divide_up(call.M, span_of(call.M, call.R))) {
    Workspace space{static_cast<unsigned char*>(base)};
    a = space.take<T>(int64_t{1} * call.padded * a_stride);                                     // [padded R, padded K]
    b = space.take<T>(int64_t{1} * call.padded * b_stride);                                     // [padded R, padded N], transposed
    xa = space.take<T>(int64_t{1} * call.padded * rows);                                        // [padded R, padded M], transposed
    dxa = space.take<T>(call.layer.M * call.padded);                                     // [M, padded R]
    dxa_transposed = space.take<T>(int64_t{1} * call.padded * rows);                            // [padded R, padded M]
    da = space.take<float>(int64_t{1} * parts * call.padded * sums_stride(call.K, call.R));  // [parts, padded R, padded K]
    db = space.take<float>(int64_t{1} * parts * call.padded * sums_stride(call.N, call.R));  // [parts, padded R, padded N], transposed
    bytes = space.used;
  }
};

template <class T>
void add_parts(const Call<T>& call, const LoraLinearBackward& given, const BackwardWorkspace<T>& space, float factor) {
  Sums sums{{}, 0, call.R, call.layer.adapter_dtype == Dtype::FLOAT32};
  if (given.da) sums.sum[sums.count++] = {space.da, space.parts, call.R, call.K, given.da, call.K, 1, factor};
  if (given.db) sums.sum[sums.count++] = {space.db, space.parts, call.R, call.N, given.db, 1, call.R, static_cast<float>(call.layer.scale)};
  if (sums.count == 0) return;
  const int64_t most = static_cast<int64_t>(call.R) * divide_up(std::max(call.K, call.N), 4);
  launch_early(sum_kernel<T>, dim3(blocks_for(most), sums.count), dim3(BLOCK), 0, call.stream, sums);
}

template <class T>
std::string backward(const LoraLinearBackward& given, cudaStream_t stream) {
  const LoraLinear& layer = given.layer;
  const Call<T> call(layer, stream);
  const BackwardWorkspace<T> space(call, given.workspace);
  const OneAdapter adapter = call.adapter(given.keep);
  const uint8_t* const keep = adapter.adapter.threshold ? given.keep : nullptr;
  const float factor = keep ? adapter.adapter.factor : 1.f;
  if (call.M == 0) {
    add_parts(call, given, space, factor);
    return "";
  }
  const Matrix b_transposed{layer.lora_b.data, {layer.lora_b.strides[1], layer.lora_b.strides[0]}};
  const Rounding<T> a = call.rounding(layer.lora_a, call.R, call.K, space.a, call.padded, space.a_stride);
  const Rounding<T> b = call.rounding(b_transposed, call.R, call.N, space.b, call.padded, space.b_stride);
  Rounding<T> xa = call.rounding({given.xa, {1, given.xa_stride}}, call.R, call.M, space.xa, call.padded, space.rows);
  xa.wide = true;
  call.round({{a, b, xa}, 3});

  const T* const dy = static_cast<const T*>(given.dy.data);
  const int64_t dy_stride = given.dy.strides[0];
  const int span = span_of(call.M, call.R);
  const Shrink<T, OneAdapter> dxa{
      dy, dy_stride, space.b, space.b_stride, nullptr, 0, space.dxa, space.dxa_transposed, nullptr, nullptr, call.M, call.N, call.R, space.rows,
      adapter};
  const Gradient<T, OneAdapter> db{dy, dy_stride, nullptr, space.xa, space.db, call.M, span, call.N, call.R, space.rows, call.padded, adapter};
  const Gradient<T, OneAdapter> da{
      static_cast<const T*>(layer.x.data), layer.x.strides[0], keep, space.dxa_transposed, space.da, call.M, span, call.K, call.R, space.rows,
      call.padded, adapter};
  Sides<T, OneAdapter> first(call.R), last(call.R);
  if (given.dx || given.da) first.take(dxa, divide_up(call.M, SHRINK_ROWS), span / SHRINK_ROWS);
  if (given.db) first.take(db, space.parts, 1);
  if (given.da) last.take(da, space.parts, 1);
  if (given.dx) {
    const Product<T, OneAdapter> product{
        dy, dy_stride, static_cast<const T*>(layer.weight.data), call.weight_stride(), space.dxa, space.a, space.a_stride, nullptr, 0,
        keep, static_cast<T*>(given.dx), call.M, call.K, call.N, call.R, call.padded, adapter, given.adds};
    const std::string error = launch_products<T, OneAdapter, true>(call.by_column(), product, first, last, stream);
    if (!error.empty()) return error;
  } else {
    launch_sides(first, stream);
    launch_sides(last, stream);
  }
  add_parts(call, given, space, factor);
  return "";
}

/// Rows, or columns, are copied 16 bytes at a time.
std::string unaligned(const char* name, const Matrix& matrix, int64_t rows, int64_t columns) {
  return std::string(name) + ": got [" + std::to_string(rows) + ", " + std::to_string(columns) + "] with strides [" +
         std::to_string(matrix.strides[0]) + ", " + std::to_string(matrix.strides[1]) + "] at address " +
         std::to_string(reinterpret_cast<uintptr_t>(matrix.data)) + ", expected columns side by side and rows apart, at multiples of 16 bytes" +
         (name == std::string("weight") ? ", or rows side by side and columns apart" : "");
}

}  // namespace

std::string lora_linear_unsupported(const LoraLinear& layer, const Matrix* dy) {
  if (layer.dtype == Dtype::FLOAT32) return "x: got float32, expected bfloat16 or float16";
  if (layer.R > 512) return "lora_a: got rank " + std::to_string(layer.R) + ", expected at most 512";
  constexpr int64_t FAR = 1 << 24;  // offsets within the rows of a tile are 32 bits
  if (layer.M > 64 * FAR) return "x: got " + std::to_string(layer.M) + " rows, expected at most 2^30";
  if (std::min(layer.K, layer.N) < 1 || std::max(layer.K, layer.N) > FAR) {
    return "weight: got [" + std::to_string(layer.N) + ", " + std::to_string(layer.K) + "], expected sides of 1 to 2^24";
  }
  if (!lies_by_row(layer.x, layer.M, layer.K)) return unaligned("x", layer.x, layer.M, layer.K);
  const bool lies = lies_by_row(layer.weight, layer.N, layer.K) || lies_by_column(layer.weight, layer.N, layer.K);
  if (!lies) return unaligned("weight", layer.weight, layer.N, layer.K);
  if (dy && !lies_by_row(*dy, layer.M, layer.N)) return unaligned("dy", *dy, layer.M, layer.N);
  return "";
}

int64_t lora_linear_workspace(const LoraLinear& layer) { return ForwardWorkspace<__half>(Call<__half>(layer, nullptr), nullptr).bytes; }

int64_t lora_linear_backward_workspace(const LoraLinear& layer) {
  return BackwardWorkspace<__half>(Call<__half>(layer, nullptr), nullptr).bytes;
}

std::string lora_linear(const LoraLinearForward& given, cudaStream_t stream) {
  const std::string unsupported = lora_linear_unsupported(given.layer, nullptr);
  if (!unsupported.empty()) return unsupported;
  return all_of((given.layer.dtype == Dtype::BFLOAT16 ? forward<__nv_bfloat16> : forward<__half>)(given, stream));
}

std::string lora_linear_backward(const LoraLinearBackward& given, cudaStream_t stream) {
  const std::string unsupported = lora_linear_unsupported(given.layer, &given.dy);
  if (!unsupported.empty()) return unsupported;
  return all_of((given.layer.dtype == Dtype::BFLOAT16 ? backward<__nv_bfloat16> : backward<__half>)(given, stream));
}

}  // namespace fastlora

#include "adapters.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>

namespace fastlora {

namespace {

using torch::stable::parallel_for;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

/// x Wᵀ + b and dy W are the business of fastlora/packed.py, which knows packed copies of W.
Tensor multiply_by_frozen(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight), torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("fastlora::frozen_linear_cpu", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor multiply_by_frozen_backward(const Tensor& dy, const Tensor& weight) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(dy), torch::stable::detail::from(weight)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("fastlora::frozen_linear_backward_cpu", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

/// Calls body with a null pointer of the tensor's element type.
template <class Body>
void with_type(const Tensor& tensor, const Body& body) {
  switch (kind_of(tensor)) {
    case Kind::FLOAT32: return body(static_cast<float*>(nullptr));
    case Kind::BFLOAT16: return body(static_cast<torch::headeronly::BFloat16*>(nullptr));
    case Kind::FLOAT16: return body(static_cast<torch::headeronly::Half*>(nullptr));
  }
}

/// Whether the passes over v take bfloat16 panels and coefficients. With a few rows that saves nothing, and A and B are better not rounded.
bool takes_dots(const Tensor& v) { return kernels().dots && kind_of(v) == Kind::BFLOAT16 && v.size(0) > FEW_ROWS; }

/// Calls body(begin, end) for runs of at most TILE columns, so that what a transposition touches stays in the first-level cache.
template <class Body>
void for_column_tiles(int64_t columns, int64_t rank, const Body& body) {
  constexpr int64_t TILE = 32;
  const int64_t tiles = (columns + TILE - 1) / TILE;
  parallel_for(0, tiles, GRAIN / (TILE * rank) + 1, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) body(tile * TILE, std::min((tile + 1) * TILE, columns));
  });
}

using torch::headeronly::BFloat16;

/// One adapter's matrix, A [R, K] or B [N, R], as a panel [R, columns].
struct Source {
  const Tensor& matrix;
  int64_t rank, columns, rank_stride, column_stride;
};

/// to[r][l] = from[r][l] in To; zeros up to the stride.
template <class T, class To>
void pack_rows(const Source& from, To* to, int64_t stride) {
  const T* values = static_cast<const T*>(from.matrix.const_data_ptr());
  for_column_tiles(from.columns, from.rank, [&](int64_t begin, int64_t end) {
    const int64_t limit = end == from.columns ? stride : end;
    for (int64_t r = 0; r < from.rank; ++r) {
      const T* row = values + r * from.rank_stride;
      for (int64_t l = begin; l < end; ++l) to[r * stride + l] = static_cast<To>(static_cast<float>(row[l * from.column_stride]));
      for (int64_t l = end; l < limit; ++l) to[r * stride + l] = To(0.0f);
    }
  });
}

/// Ranks 2 p and 2 p + 1 of each column beside one another: to[p][l]; zeros where there is no rank, and up to the stride.
template <class T>
void pack_pairs(const Source& from, uint32_t* to, int64_t stride) {
  const T* values = static_cast<const T*>(from.matrix.const_data_ptr());
  const auto bits = [&](int64_t r, int64_t l) -> uint32_t {
    return r < from.rank ? BFloat16(static_cast<float>(values[r * from.rank_stride + l * from.column_stride])).x : 0;
  };
  for_column_tiles(from.columns, from.rank, [&](int64_t begin, int64_t end) {
    const int64_t limit = end == from.columns ? stride : end;
    for (int64_t r = 0; r < from.rank; r += 2) {
      uint32_t* row = to + r / 2 * stride;
      for (int64_t l = begin; l < end; ++l) row[l] = bits(r, l) | bits(r + 1, l) << 16;
      for (int64_t l = end; l < limit; ++l) row[l] = 0;
    }
  });
}

enum class Panels { FLOATS, DOTS, PAIRS };  // what adapter_passes.h asks for: float32; bfloat16 by row; bfloat16 with two ranks beside

int64_t panel_rows(const Source& from, Panels format) { return format == Panels::PAIRS ? (from.rank + 1) / 2 : from.rank; }

/// The panels of all adapters, one below the other.
Tensor pack(const std::vector<Source>& sources, Panels format) {
  const int64_t stride = round_up(sources[0].columns, COLUMN_UNIT);
  int64_t rows = 0;
  for (const Source& from : sources) rows += panel_rows(from, format);
  const ScalarType dtype = format == Panels::FLOATS ? ScalarType::Float : format == Panels::DOTS ? ScalarType::BFloat16 : ScalarType::Int;
  const Tensor panels = torch::stable::new_empty(sources[0].matrix, std::array<int64_t, 2>{rows, stride}, dtype);
  void* to = panels.mutable_data_ptr();
  int64_t row = 0;
  for (const Source& from : sources) {
    with_type(from.matrix, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      switch (format) {
        case Panels::FLOATS: return pack_rows<T>(from, static_cast<float*>(to) + row * stride, stride);
        case Panels::DOTS: return pack_rows<T>(from, static_cast<BFloat16*>(to) + row * stride, stride);
        case Panels::PAIRS: return pack_pairs<T>(from, static_cast<uint32_t*>(to) + row * stride, stride);
      }
    });
    row += panel_rows(from, format);
  }
  return panels;
}

/// A_i.
Tensor pack_a(const Adapters& adapters, Panels format) {
  std::vector<Source> sources;
  for (const Tensor& a : adapters.a) sources.push_back({a, a.size(0), a.size(1), a.stride(0), a.stride(1)});
  return pack(sources, format);
}

/// B_iᵀ.
Tensor pack_b(const Adapters& adapters, Panels format) {
  std::vector<Source> sources;
  for (const Tensor& b : adapters.b) sources.push_back({b, b.size(1), b.size(0), b.stride(1), b.stride(0)});
  return pack(sources, format);
}

/// Coefficients [M, R] as the passes over v take them: float32 as they are, or bfloat16, with zeros for reads beyond the last.
Tensor coefficients_for(const Tensor& v, const Tensor& coefficients) {
  if (!takes_dots(v)) return coefficients;
  const int64_t M = coefficients.size(0), R = coefficients.size(1), stride = R + COEFFICIENT_UNIT;
  const Tensor narrow = torch::stable::new_zeros(coefficients, std::array<int64_t, 2>{M, stride}, ScalarType::BFloat16);
  const float* from = floats(coefficients);
  uint16_t* to = static_cast<uint16_t*>(narrow.mutable_data_ptr());
  parallel_for(0, M, GRAIN / R + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels().narrow(from + i * coefficients.stride(0), R, to + i * stride);
  });
  return narrow;
}

/// Zeros for gradients in the form of panels: [sum R_i, columns rounded up to COLUMN_UNIT] float32.
Tensor new_gradients(const Tensor& like, const Adapters& adapters, int64_t columns) {
  const std::array<int64_t, 2> sizes{adapters.all_ranks(), round_up(columns, COLUMN_UNIT)};
  return torch::stable::new_zeros(like, sizes, ScalarType::Float);
}

/// to[r · rank_stride + l · column_stride] = factor · from[r][l].
template <class T>
void unpack(
    const float* from, int64_t stride, int64_t rank, int64_t columns, float factor, T* to, int64_t rank_stride, int64_t column_stride) {
  for_column_tiles(columns, rank, [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < rank; ++r) {
      for (int64_t l = begin; l < end; ++l) to[r * rank_stride + l * column_stride] = static_cast<T>(factor * from[r * stride + l]);
    }
  });
}

/// Gradients of A_i [R_i, K] from their panels, flat, in lora_a's dtype.
Tensor unpack_a(const Adapters& adapters, const Tensor& panels) {
  const int64_t K = adapters.a[0].size(1), stride = panels.size(1);
  const std::array<int64_t, 1> sizes{adapters.all_ranks() * K};
  const Tensor flat = torch::stable::new_empty(adapters.a[0], sizes);
  with_type(flat, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    unpack(floats(panels), stride, adapters.all_ranks(), K, 1.0f, static_cast<T*>(flat.mutable_data_ptr()), K, 1);
  });
  return flat;
}

/// Gradients of B_i [N, R_i] from panels that hold them transposed and without s_i, flat, in lora_b's dtype.
Tensor unpack_b(const Adapters& adapters, const Tensor& panels) {
  const int64_t N = adapters.b[0].size(0), stride = panels.size(1);
  const std::array<int64_t, 1> sizes{adapters.all_ranks() * N};
  const Tensor flat = torch::stable::new_empty(adapters.b[0], sizes);
  with_type(flat, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const float* from = floats(panels);
    T* to = static_cast<T*>(flat.mutable_data_ptr());
    for (size_t i = 0; i < adapters.b.size(); ++i) {
      const int64_t rank = adapters.b[i].size(1);
      unpack(from, stride, rank, N, static_cast<float>(adapters.scale[i]), to, 1, rank);
      from += rank * stride;
      to += rank * N;
    }
  });
  return flat;
}

/// How a pass is cut into cells: row parts x column parts.
struct Grid {
  int64_t row_parts = 1, column_parts = 1;

  int64_t cells() const { return row_parts * column_parts; }
};

/// As many cells as there are threads with enough work, and of the grids with so many the one that leaves the least to sum: a row part
/// costs row_cost, a column part column_cost. Depends on sizes and the number of threads only.
Grid cut(int64_t work, int64_t rows, int64_t columns, int64_t row_cost, int64_t column_cost) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), work / GRAIN + 1);
  const int64_t units = (columns + COLUMN_UNIT - 1) / COLUMN_UNIT;
  Grid best;
  int64_t best_cost = 0;
  for (int64_t column_parts = 1; column_parts <= std::min(threads, units); ++column_parts) {
    const Grid grid{std::min(threads / column_parts, rows), column_parts};
    const int64_t cost = (grid.row_parts - 1) * row_cost + (grid.column_parts - 1) * column_cost;
    if (grid.cells() > best.cells() || (grid.cells() == best.cells() && cost < best_cost)) best = grid, best_cost = cost;
  }
  return best;
}

int64_t first_place(const Batch& batch) { return batch.segments.front().begin; }
int64_t place_count(const Batch& batch) { return batch.segments.back().end - first_place(batch); }

/// Runs pass(segments, cell, row part, column part) for every cell of the grid.
template <class Pass>
void for_each_cell(const Batch& batch, const Grid& grid, int64_t columns, const Pass& pass) {
  const int64_t units = (columns + COLUMN_UNIT - 1) / COLUMN_UNIT;
  const Segments segments{batch.segments.data(), static_cast<int64_t>(batch.segments.size())};
  parallel_for(0, grid.cells(), 1, [&](int64_t cell_begin, int64_t cell_end) {
    for (int64_t index = cell_begin; index < cell_end; ++index) {
      const int64_t i = index / grid.column_parts, j = index % grid.column_parts;
      Cell cell;
      cell.begin = first_place(batch) + place_count(batch) * i / grid.row_parts;
      cell.end = first_place(batch) + place_count(batch) * (i + 1) / grid.row_parts;
      cell.column_begin = units * j / grid.column_parts * COLUMN_UNIT;
      cell.column_end = std::min(units * (j + 1) / grid.column_parts * COLUMN_UNIT, columns);
      pass(segments, cell, i, j);
    }
  });
}

/// total[k] = the sum over parts of part[k], in the order of parts.
void sum_parts(const Tensor& parts, float* total) {
  const int64_t count = parts.size(0), size = parts.numel() / count;
  const float* from = floats(parts);
  parallel_for(0, size, GRAIN, [&](int64_t begin, int64_t end) {
    std::copy(from + begin, from + end, total + begin);
    for (int64_t part = 1; part < count; ++part) {
      for (int64_t k = begin; k < end; ++k) total[k] += from[part * size + k];
    }
  });
}

/// What draw has drawn: bits [M, bits_stride], masks of them one after the other; or none.
using Keep = std::optional<Tensor>;

/// Dropout's mask for the rows of the batch, of `columns` elements each.
Keep draw(const Tensor& like, int64_t columns, const Batch& batch) {
  const bool drops = std::any_of(batch.segments.begin(), batch.segments.end(), [](const Segment& segment) { return segment.threshold != 0; });
  if (!drops) return std::nullopt;
  const int64_t stride = bits_stride(columns);
  const Tensor keep = torch::stable::new_empty(like, std::array<int64_t, 2>{batch.masks * like.size(0), stride}, ScalarType::Byte);
  if (place_count(batch) == 0) return keep;
  const Draw pass{columns, batch.order, static_cast<uint8_t*>(keep.mutable_data_ptr()), stride};
  const Grid grid = cut(place_count(batch) * columns, place_count(batch), columns, 0, 0);
  for_each_cell(batch, grid, columns, [&](const Segments& segments, const Cell& cell, int64_t, int64_t) {
    kernels().draw(pass, segments, cell);
  });
  return keep;
}

Rows rows_of(const Tensor& v, const Batch& batch, const Keep& keep) {
  Rows rows{};
  rows.kind = kind_of(v);
  rows.dots = takes_dots(v);
  rows.stride = v.stride(0);
  rows.order = batch.order;
  rows.keep = keep ? keep->const_data_ptr<uint8_t>() : nullptr;
  rows.keep_stride = bits_stride(v.size(1));
  return rows;
}

/// One pass over v [M, L]: projected [M, ranks] = d(v) P_iᵀ if there are panels, gradient [sum R_i, L] = c_iᵀ d(v) if there are
/// coefficients.
void read(
    const Tensor& v, const Batch& batch, const Adapters& adapters, const Keep& keep, const Tensor* panels, const Tensor* projected,
    const Tensor* coefficients, const Tensor* gradient) {
  if (place_count(batch) == 0) return;
  const int64_t M = v.size(0), L = v.size(1), ranks = batch.ranks, stride = round_up(L, COLUMN_UNIT);
  const int64_t work = place_count(batch) * L * ranks;
  const Grid grid = cut(work, place_count(batch), L, gradient ? adapters.all_ranks() * L : 0, projected ? M * ranks : 0);

  Read pass{rows_of(v, batch, keep)};
  pass.v = v.const_data_ptr();
  pass.panel = panels ? panels->const_data_ptr() : nullptr;
  pass.panel_stride = stride;
  pass.projected = projected ? floats(*projected) : nullptr;
  pass.projected_stride = ranks;
  pass.coefficients = coefficients ? coefficients->const_data_ptr() : nullptr;
  pass.coefficient_stride = coefficients ? coefficients->stride(0) : 0;
  pass.gradient = gradient ? floats(*gradient) : nullptr;
  pass.gradient_stride = stride;

  std::optional<Tensor> projected_parts, gradient_parts;
  if (projected && grid.column_parts > 1) {
    projected_parts = torch::stable::new_zeros(*projected, std::array<int64_t, 3>{grid.column_parts, M, ranks});
  }
  if (gradient && grid.row_parts > 1) {
    gradient_parts = torch::stable::new_zeros(*gradient, std::array<int64_t, 3>{grid.row_parts, adapters.all_ranks(), stride});
  }
  float* projected_base = projected_parts ? floats(*projected_parts) : nullptr;
  float* gradient_base = gradient_parts ? floats(*gradient_parts) : nullptr;
  for_each_cell(batch, grid, L, [&](const Segments& segments, const Cell& cell, int64_t i, int64_t j) {
    Read part = pass;
    if (projected_base) part.projected = projected_base + j * M * ranks;
    if (gradient_base) part.gradient = gradient_base + i * adapters.all_ranks() * stride;
    kernels().read(part, segments, cell);
  });
  if (projected_parts) sum_parts(*projected_parts, pass.projected);
  if (gradient_parts) sum_parts(*gradient_parts, pass.gradient);
}

/// One pass over v [M, L]: v += d'(c P_i).
void add(const Tensor& v, const Batch& batch, const Keep& keep, const Tensor& coefficients, const Tensor& panels) {
  if (place_count(batch) == 0) return;
  Add pass{rows_of(v, batch, keep)};
  pass.v = v.mutable_data_ptr();
  pass.panel = panels.const_data_ptr();
  pass.panel_stride = panels.size(1);
  pass.coefficients = coefficients.const_data_ptr();
  pass.coefficient_stride = coefficients.stride(0);
  const Grid grid = cut(place_count(batch) * v.size(1) * batch.ranks, place_count(batch), v.size(1), 0, 0);
  for_each_cell(batch, grid, v.size(1), [&](const Segments& segments, const Cell& cell, int64_t, int64_t) {
    kernels().add(pass, segments, cell);
  });
}

/// The batch with s_i in the place of dropout.
Batch scaled(Batch batch, const Adapters& adapters) {
  for (size_t i = 0; i < batch.segments.size(); ++i) {
    batch.segments[i].threshold = 0;
    batch.segments[i].factor = static_cast<float>(adapters.scale[i]);
  }
  return batch;
}

/// projected [M, max R_i] *= s_i.
void scale_rows(const Tensor& projected, const Batch& batch) {
  float* values = floats(projected);
  const int64_t stride = projected.size(1);
  for (const Segment& segment : batch.segments) {
    parallel_for(segment.begin, segment.end, GRAIN / segment.rank + 1, [&](int64_t begin, int64_t end) {
      for (int64_t place = begin; place < end; ++place) {
        float* row = values + (batch.order ? batch.order[place] : place) * stride;
        for (int64_t r = 0; r < segment.rank; ++r) row[r] *= segment.factor;
      }
    });
  }
}

}  // namespace

int64_t Adapters::all_ranks() const {
  int64_t ranks = 0;
  for (const Tensor& matrix : a) ranks += matrix.size(0);
  return ranks;
}

int64_t Adapters::most_ranks() const {
  int64_t most = 0;
  for (const Tensor& matrix : a) most = std::max(most, matrix.size(0));
  return most;
}

void check_base(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_cpu(x, "x");
  check_shape(x, "x", {ANY, ANY});
  check_dtype(x, "x", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  const int64_t K = x.size(1);
  check_cpu(weight, "weight");
  check_shape(weight, "weight", {ANY, K});
  check_dtype(weight, "weight", {x.scalar_type()});
  if (bias) {
    check_cpu(*bias, "bias");
    check_shape(*bias, "bias", {weight.size(0)});
    check_dtype(*bias, "bias", {x.scalar_type()});
  }
}

void check_layer(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Adapters& adapters) {
  check_base(x, weight, bias);
  const int64_t K = x.size(1), N = weight.size(0);
  const size_t S = adapters.a.size();
  STD_TORCH_CHECK(S >= 1, "lora_a: got no adapter, expected at least one");
  STD_TORCH_CHECK(adapters.b.size() == S, "lora_b: got ", adapters.b.size(), " adapters, expected ", S);
  STD_TORCH_CHECK(adapters.scale.size() == S, "scale: got ", adapters.scale.size(), " numbers, expected ", S);
  STD_TORCH_CHECK(adapters.dropout_p.size() == S, "dropout_p: got ", adapters.dropout_p.size(), " numbers, expected ", S);
  for (size_t i = 0; i < S; ++i) {
    const std::string which = S == 1 ? "" : "[" + std::to_string(i) + "]";
    const std::string a = "lora_a" + which, b = "lora_b" + which;
    check_cpu(adapters.a[i], a.c_str());
    check_shape(adapters.a[i], a.c_str(), {ANY, K});
    STD_TORCH_CHECK(adapters.a[i].size(0) >= 1, a, ": got ", describe(adapters.a[i]), ", expected a rank of at least 1");
    check_dtype(adapters.a[i], a.c_str(), {x.scalar_type(), ScalarType::Float});
    check_dtype(adapters.a[i], a.c_str(), {adapters.a[0].scalar_type()});
    check_cpu(adapters.b[i], b.c_str());
    check_shape(adapters.b[i], b.c_str(), {N, adapters.a[i].size(0)});
    check_dtype(adapters.b[i], b.c_str(), {adapters.a[0].scalar_type()});
    const double p = adapters.dropout_p[i];
    STD_TORCH_CHECK(p >= 0 && p <= 1, "dropout_p", which, ": got ", p, ", expected a probability between 0 and 1");
  }
  if (adapters.seed) {
    check_cpu(*adapters.seed, "seed");
    check_dtype(*adapters.seed, "seed", {ScalarType::Long});
    STD_TORCH_CHECK(adapters.seed->numel() == 1, "seed: got ", describe(*adapters.seed), ", expected one element");
  }
}

void check_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight) {
  check_cpu(dy, "dy");
  check_shape(dy, "dy", {x.size(0), weight.size(0)});
  check_dtype(dy, "dy", {x.scalar_type()});
}

void check_projection(const Tensor& xa, const Tensor& x, int64_t ranks) {
  check_cpu(xa, "xa");
  check_shape(xa, "xa", {x.size(0), ranks});
  check_dtype(xa, "xa", {ScalarType::Float});
}

std::optional<Tensor> checked_keep(const Tensor& keep, std::initializer_list<int64_t> sizes) {
  check_cpu(keep, "keep");
  check_dtype(keep, "keep", {ScalarType::Byte});
  if (keep.numel() == 0) return std::nullopt;
  check_shape(keep, "keep", sizes);
  return torch::stable::contiguous(keep);
}

Tensor new_projection(const Tensor& x, int64_t ranks) {
  return torch::stable::new_zeros(x, std::array<int64_t, 2>{x.size(0), ranks}, ScalarType::Float);
}

namespace {

/// The segments of all adapters, each with all rows; what depends on who has which is set by the caller.
std::vector<Segment> make_segments(const Adapters& adapters, int64_t M) {
  const bool drops = adapters.seed || adapters.keep;
  std::vector<Segment> segments;
  int64_t panel_row = 0, pair_row = 0;
  for (size_t i = 0; i < adapters.a.size(); ++i) {
    // reference.py::drop_threshold and keep_scale.
    const int64_t threshold = drops ? static_cast<int64_t>(65536 * adapters.dropout_p[i] + 0.5) : 0;
    Segment segment{};
    segment.end = M;
    segment.rank = adapters.a[i].size(0);
    segment.panel_row = panel_row;
    segment.pair_row = pair_row;
    segment.seed = adapters.seed ? static_cast<uint64_t>(*adapters.seed->const_data_ptr<int64_t>()) : 0;
    segment.threshold = static_cast<uint32_t>(threshold);
    segment.factor = threshold < 65536 ? static_cast<float>(65536.0 / static_cast<double>(65536 - threshold)) : 0.0f;
    segments.push_back(segment);
    panel_row += segment.rank;
    pair_row += (segment.rank + 1) / 2;
  }
  return segments;
}

}  // namespace

Batch split_rows(const Adapters& adapters, const std::vector<int64_t>& bounds, const int64_t* order) {
  Batch batch{make_segments(adapters, 0), order, adapters.most_ranks(), 1};
  for (size_t i = 0; i < batch.segments.size(); ++i) {
    batch.segments[i].begin = bounds[i];
    batch.segments[i].end = bounds[i + 1];
  }
  return batch;
}

Batch share_rows(const Adapters& adapters, int64_t M) {
  Batch batch{make_segments(adapters, M), nullptr, adapters.all_ranks(), static_cast<int64_t>(adapters.a.size())};
  const int64_t mask_bytes = M * bits_stride(adapters.a[0].size(1));
  const std::optional<Tensor> seeds = adapters.seed ? std::optional(torch::stable::contiguous(*adapters.seed)) : std::nullopt;
  for (size_t i = 0; i < batch.segments.size(); ++i) {
    Segment& segment = batch.segments[i];
    segment.first_rank = segment.panel_row;
    segment.keep_offset = static_cast<int64_t>(i) * mask_bytes;
    if (seeds) segment.seed = static_cast<uint64_t>(seeds->const_data_ptr<int64_t>()[i]);
  }
  return batch;
}

namespace {

Panels read_format(const Tensor& v) { return takes_dots(v) ? Panels::DOTS : Panels::FLOATS; }
Panels add_format(const Tensor& v) { return takes_dots(v) ? Panels::PAIRS : Panels::FLOATS; }

/// y = x Wᵀ + b + s_i xa_i B_iᵀ, xa [M, ranks] at hand.
Tensor add_to_frozen(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Adapters& adapters, const Batch& batch, const Tensor& xa) {
  const Tensor y = with_dense_rows(multiply_by_frozen(x, weight, bias));
  add(y, scaled(batch, adapters), std::nullopt, coefficients_for(y, xa), pack_b(adapters, add_format(y)));
  return y;
}

/// One read of dy: dxa_i = s_i dy B_i [M, ranks], and the gradients of B_i; either may not be needed.
std::tuple<Tensor, Tensor> read_dy(
    const Tensor& dy, const Adapters& adapters, const Batch& batch, const Tensor& xa, bool need_dxa, bool need_db) {
  const Tensor dxa = new_projection(dy, batch.ranks);
  Tensor db = torch::stable::new_empty(adapters.b[0], std::array<int64_t, 1>{0});
  if (!need_dxa && !need_db) return {dxa, db};
  const Tensor rows = with_dense_rows(dy);
  const Tensor panels = pack_b(adapters, read_format(rows));
  const Tensor coefficients = coefficients_for(rows, with_dense_rows(xa));
  const Tensor gradient = new_gradients(rows, adapters, rows.size(1));
  read(rows, batch, adapters, std::nullopt, need_dxa ? &panels : nullptr, need_dxa ? &dxa : nullptr, need_db ? &coefficients : nullptr,
       need_db ? &gradient : nullptr);
  if (need_dxa) scale_rows(dxa, scaled(batch, adapters));
  if (need_db) db = unpack_b(adapters, gradient);
  return {dxa, db};
}

/// dx += d_i'(dxa_i A_i), and the gradients of A_i from one read of x; a null dx is not wanted.
Tensor finish_dx_and_da(
    const Tensor& x, const Adapters& adapters, const Batch& batch, const Tensor& dxa, const Tensor* dx, bool need_da) {
  const Tensor coefficients = coefficients_for(x, dxa);
  if (dx) add(*dx, batch, adapters.keep, coefficients, pack_a(adapters, add_format(x)));
  if (!need_da) return torch::stable::new_empty(adapters.a[0], std::array<int64_t, 1>{0});
  const Tensor gradient = new_gradients(x, adapters, x.size(1));
  read(x, batch, adapters, adapters.keep, nullptr, nullptr, &coefficients, &gradient);
  return unpack_a(adapters, gradient);
}

int64_t all_elements(const std::vector<Tensor>& tensors) {
  int64_t count = 0;
  for (const Tensor& tensor : tensors) count += tensor.numel();
  return count;
}

/// total [M, L] += part [M, L].
void accumulate(const Tensor& total, const Tensor& part) {
  const int64_t L = total.size(1), size = static_cast<int64_t>(total.element_size());
  char* to = static_cast<char*>(total.mutable_data_ptr());
  const char* from = static_cast<const char*>(part.const_data_ptr());
  parallel_for(0, total.size(0), GRAIN / (L + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels().accumulate(kind_of(total), to + i * total.stride(0) * size, from + i * part.stride(0) * size, L);
    }
  });
}

/// The adapter of one of the layers that share x.
Adapters one_of(const Adapters& adapters, size_t i) {
  return {{adapters.a[i]}, {adapters.b[i]}, {adapters.scale[i]}, {0.0}};
}

/// The keep of a forward without dropout.
Tensor nothing_dropped(const Tensor& x) { return torch::stable::new_empty(x, std::array<int64_t, 1>{0}, ScalarType::Byte); }

Tensor columns_of(Tensor matrix, int64_t column, int64_t count) { return torch::stable::narrow(matrix, 1, column, count); }

/// to [M, ranks]: the columns from `column` on become those of from [M, R].
void copy_columns(const Tensor& from, const Tensor& to, int64_t column) {
  for (int64_t i = 0; i < from.size(0); ++i) {
    std::copy_n(floats(from) + i * from.stride(0), from.size(1), floats(to) + i * to.stride(0) + column);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Adapters& adapters, const Batch& batch) {
  const Tensor rows = with_dense_rows(x);
  const Keep keep = draw(rows, rows.size(1), batch);
  if (!keep && suits_few_rows(rows, weight)) {
    const auto [y, xa] = few_rows(rows, weight, bias, adapters, batch);
    return {y, xa, nothing_dropped(x)};
  }
  const Tensor xa = new_projection(x, batch.ranks);
  const Tensor panels = pack_a(adapters, read_format(rows));
  read(rows, batch, adapters, keep, &panels, &xa, nullptr, nullptr);
  return {add_to_frozen(rows, weight, bias, adapters, batch, xa), xa, keep ? *keep : nothing_dropped(x)};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Adapters& adapters, const Tensor& xa, const Batch& batch, bool need_dx,
    bool need_da, bool need_db) {
  const Tensor rows = with_dense_rows(x), dy_rows = with_dense_rows(dy);
  const auto [dxa, db] = read_dy(dy_rows, adapters, batch, xa, need_dx || need_da, need_db);
  const std::array<int64_t, 1> none{0};
  Tensor dx = torch::stable::new_empty(x, none);
  if (!need_dx && !need_da) return {dx, torch::stable::new_empty(adapters.a[0], none), db};
  if (need_dx) dx = with_dense_rows(multiply_by_frozen_backward(dy_rows, weight));
  const Tensor da = finish_dx_and_da(rows, adapters, batch, dxa, need_dx ? &dx : nullptr, need_da);
  return {dx, da, db};
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> forward_shared(
    const Tensor& x, const std::vector<Tensor>& weight, const std::vector<Tensor>& bias, const Adapters& adapters) {
  const Tensor rows = with_dense_rows(x);
  const Batch batch = share_rows(adapters, x.size(0));
  const Keep keep = draw(rows, rows.size(1), batch);
  const bool few = !keep && std::all_of(weight.begin(), weight.end(), [&](const Tensor& one) { return suits_few_rows(rows, one); });
  const Tensor xa = new_projection(x, batch.ranks);
  if (!few) {
    const Tensor panels = pack_a(adapters, read_format(rows));
    read(rows, batch, adapters, keep, &panels, &xa, nullptr, nullptr);
  }
  std::vector<Tensor> y;
  for (size_t i = 0; i < weight.size(); ++i) {
    const Adapters one = one_of(adapters, i);
    const Batch all = split_rows(one, {0, x.size(0)}, nullptr);
    const std::optional<Tensor> one_bias = bias[i].numel() ? std::optional(bias[i]) : std::nullopt;
    const int64_t column = batch.segments[i].first_rank;
    if (few) {
      const auto [result, own_xa] = few_rows(rows, weight[i], one_bias, one, all);
      copy_columns(own_xa, xa, column);
      y.push_back(result);
    } else {
      y.push_back(add_to_frozen(rows, weight[i], one_bias, one, all, columns_of(xa, column, all.ranks)));
    }
  }
  const std::array<int64_t, 3> masks{batch.masks, x.size(0), bits_stride(x.size(1))};
  return {y, xa, keep ? torch::stable::view(*keep, masks) : nothing_dropped(x)};
}

std::tuple<Tensor, Tensor, Tensor> backward_shared(
    const std::vector<Tensor>& dy, const Tensor& x, const std::vector<Tensor>& weight, const Adapters& adapters, const Tensor& xa,
    bool need_dx, bool need_da, bool need_db) {
  const Tensor rows = with_dense_rows(x);
  const Batch batch = share_rows(adapters, x.size(0));
  const Tensor dxa = new_projection(x, batch.ranks);
  const std::array<int64_t, 1> none{0};
  Tensor dx = torch::stable::new_empty(x, none);
  const Tensor db = torch::stable::new_empty(adapters.b[0], std::array<int64_t, 1>{need_db ? all_elements(adapters.b) : 0});
  int64_t db_place = 0;
  for (size_t i = 0; i < weight.size(); ++i) {
    const Adapters one = one_of(adapters, i);
    const Batch all = split_rows(one, {0, x.size(0)}, nullptr);
    const int64_t column = batch.segments[i].first_rank;
    const Tensor dy_rows = with_dense_rows(dy[i]);
    const auto [own_dxa, own_db] = read_dy(dy_rows, one, all, columns_of(xa, column, all.ranks), need_dx || need_da, need_db);
    copy_columns(own_dxa, dxa, column);
    if (need_db) {
      const size_t size = own_db.element_size();
      std::memcpy(static_cast<char*>(db.mutable_data_ptr()) + db_place * size, own_db.const_data_ptr(), own_db.numel() * size);
      db_place += own_db.numel();
    }
    if (!need_dx) continue;
    const Tensor part = with_dense_rows(multiply_by_frozen_backward(dy_rows, weight[i]));
    if (i == 0) {
      dx = part;
    } else {
      accumulate(dx, part);
    }
  }
  if (!need_dx && !need_da) return {dx, torch::stable::new_empty(adapters.a[0], none), db};
  const Tensor da = finish_dx_and_da(rows, adapters, batch, dxa, need_dx ? &dx : nullptr, need_da);
  return {dx, da, db};
}

}  // namespace fastlora

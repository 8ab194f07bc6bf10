#include "adapters.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <limits>
#include <string>

#include "memory.h"
#include "new_tensor.h"

namespace fastlora {

namespace {

using torch::stable::parallel_for;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

/// Whether the passes over v take bfloat16 panels and coefficients. With a few rows that saves nothing, and A and B are better not rounded.
bool takes_dots(const Tensor& v) { return kernels().dots && kind_of(v) == Kind::BFLOAT16 && v.size(0) > FEW_ROWS; }

/// Whether so many rows of one adapter are multiplied in tiles. A tile is of 16 rows, of which fewer are padded with zeros, and of 16 or 32 ranks.
bool takes_tiles(const Tensor& v, int64_t rows, int64_t rank) {
  return kernels().tiles && takes_dots(v) && rows >= TILE_LANES && rank >= TILE_LANES / 2 && rank <= TILED_RANK;
}

using torch::headeronly::BFloat16;

/// One adapter's matrix, A [R, K] or B [N, R], as a panel [R, columns].
struct Source {
  const Tensor& matrix;
  int64_t rank, columns, rank_stride, column_stride;
  bool tiled;
};

/// As a float32 panel: of a read, whose lanes are ranks, or of an add, whose lanes are columns.
void pack_lanes(const Source& from, bool of_read, float* to, int64_t stride) {
  constexpr int64_t PIECE = 512;  // of a chunk
  const int64_t lanes = of_read ? from.rank : from.columns, lane_stride = of_read ? from.rank_stride : from.column_stride;
  const int64_t depth = of_read ? from.columns : from.rank, depth_stride = of_read ? from.column_stride : from.rank_stride;
  const int64_t chunk = (of_read ? stride : padded_rank(from.rank)) * PANEL_LANES, pieces = (depth + PIECE - 1) / PIECE;
  const int64_t units = (lanes + PANEL_LANES - 1) / PANEL_LANES * pieces;
  const char* values = static_cast<const char*>(from.matrix.const_data_ptr());
  const int64_t size = static_cast<int64_t>(from.matrix.element_size());
  parallel_for(0, units, GRAIN / (PANEL_LANES * std::min(depth, PIECE) + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t lane = unit / pieces * PANEL_LANES, k = unit % pieces * PIECE;
      kernels().pack(
          kind_of(from.matrix), values + (lane * lane_stride + k * depth_stride) * size, lane_stride, depth_stride, std::min(PANEL_LANES, lanes - lane),
          std::min(PIECE, depth - k), to + unit / pieces * chunk + k * PANEL_LANES);
    }
  });
}

/// In bfloat16: of a read, whose lanes are ranks and whose pairs run along columns, or of an add, the other way round. Zeros up to the stride.
void pack_dots(const Source& from, bool of_read, uint32_t* to, int64_t stride) {
  constexpr int64_t WORDS = TILE_LANES * TILE_DEPTH / 2;
  const int64_t column_unit = of_read ? TILE_DEPTH : TILE_LANES, rank_unit = of_read ? TILE_LANES : TILE_DEPTH;
  const int64_t blocks = stride / column_unit, rank_blocks = (from.rank + rank_unit - 1) / rank_unit;
  const int64_t lane_stride = of_read ? from.rank_stride : from.column_stride, depth_stride = of_read ? from.column_stride : from.rank_stride;
  const char* values = static_cast<const char*>(from.matrix.const_data_ptr());
  const int64_t size = static_cast<int64_t>(from.matrix.element_size());
  parallel_for(0, blocks, GRAIN / (column_unit * from.rank) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t l = block * column_unit, columns = std::clamp(from.columns - l, int64_t{0}, column_unit);
      for (int64_t rank_block = 0; rank_block < rank_blocks; ++rank_block) {
        const int64_t r = rank_block * rank_unit, ranks = std::min(rank_unit, from.rank - r);
        Pairs pairs{kind_of(from.matrix), values + (l * from.column_stride + r * from.rank_stride) * size, lane_stride, depth_stride};
        pairs.lanes = of_read ? ranks : columns;
        pairs.depth = of_read ? columns : ranks;
        pairs.by_lane = of_read && !from.tiled;
        pairs.rows = of_read || from.tiled ? TILE_LANES : (ranks + 1) / 2;
        pairs.row_stride = from.tiled ? TILE_LANES : of_read ? stride / 2 : stride;
        pairs.to = to + (!from.tiled ? (of_read ? (r * stride + l) / 2 : r / 2 * stride + l)
                                     : (of_read ? rank_block * blocks + block : block * rank_blocks + rank_block) * WORDS);
        kernels().pack_pairs(pairs);
      }
    }
  });
}

enum class Panels { RANKS, COLUMNS, DOTS, PAIRS };  // what kernels.h asks for: float32, side by side; bfloat16 by row; bfloat16 with two ranks beside

Panels read_format(const Tensor& v) { return takes_dots(v) ? Panels::DOTS : Panels::RANKS; }
Panels add_format(const Tensor& v) { return takes_dots(v) ? Panels::PAIRS : Panels::COLUMNS; }

int64_t rows_of_pairs(int64_t rank, bool tiled) { return round_up(rank, tiled ? TILE_DEPTH : 2) / 2; }

int64_t panel_rows(const Source& from, Panels format) {
  return format == Panels::PAIRS ? rows_of_pairs(from.rank, from.tiled) : padded_rank(from.rank);
}

/// The panels of all adapters, one below the other, each row of `stride` numbers.
struct Stack {
  Memory memory;
  int64_t stride;
};

Stack pack(const std::vector<Source>& sources, Panels format) {
  const int64_t stride = round_up(sources[0].columns, COLUMN_UNIT);
  int64_t rows = 0;
  for (const Source& from : sources) rows += panel_rows(from, format);
  Stack stack{Memory(rows * stride * (format == Panels::DOTS ? sizeof(BFloat16) : sizeof(float))), stride};
  int64_t row = 0;
  for (const Source& from : sources) {
    uint32_t* const words = stack.memory.as<uint32_t>() + row * stride / (format == Panels::DOTS ? 2 : 1);
    switch (format) {
      case Panels::RANKS: pack_lanes(from, true, stack.memory.as<float>() + row * stride, stride); break;
      case Panels::COLUMNS: pack_lanes(from, false, stack.memory.as<float>() + row * stride, stride); break;
      case Panels::DOTS: pack_dots(from, true, words, stride); break;
      case Panels::PAIRS: pack_dots(from, false, words, stride); break;
    }
    row += panel_rows(from, format);
  }
  return stack;
}

/// A_i.
Stack pack_a(const Adapters& adapters, const Batch& batch, Panels format) {
  std::vector<Source> sources;
  for (const Tensor& a : adapters.a) {
    sources.push_back({a, a.size(0), a.size(1), a.stride(0), a.stride(1), batch.segments[sources.size()].tiled});
  }
  return pack(sources, format);
}

/// B_iᵀ.
Stack pack_b(const Adapters& adapters, const Batch& batch, Panels format) {
  std::vector<Source> sources;
  for (const Tensor& b : adapters.b) {
    sources.push_back({b, b.size(1), b.size(0), b.stride(1), b.stride(0), batch.segments[sources.size()].tiled});
  }
  return pack(sources, format);
}

/// Coefficients [layers, M, R], without gaps, as the passes over v take them: float32 where they lie, or bfloat16 beside it.
struct Coefficients {
  Memory narrow;
  const void* values;
  int64_t stride;

  Coefficients(const Tensor& v, const Tensor& wide) : values(wide.const_data_ptr()), stride(wide.size(2)) {
    if (!takes_dots(v)) return;
    const int64_t rows = wide.size(0) * wide.size(1), R = wide.size(2);
    stride = R + COEFFICIENT_UNIT;  // zeros for reads beyond the last
    narrow = Memory(rows * stride * sizeof(uint16_t));
    values = narrow.as<void>();
    parallel_for(0, rows, GRAIN / R + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        uint16_t* row = narrow.as<uint16_t>() + i * stride;
        kernels().narrow(Kind::BFLOAT16, floats(wide) + i * R, R, row);
        std::fill_n(row + R, COEFFICIENT_UNIT, uint16_t{0});
      }
    });
  }
};

/// Gradients of A_i [R_i, K] from their panels, flat, in lora_a's dtype.
Tensor unpack_a(const Adapters& adapters, const Stack& panels) {
  const int64_t K = adapters.a[0].size(1), R = adapters.all_ranks();
  const Tensor flat = new_tensor(adapters.a[0], {R * K}, adapters.a[0].scalar_type());
  char* to = static_cast<char*>(flat.mutable_data_ptr());
  parallel_for(0, R, GRAIN / (K + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      kernels().narrow(kind_of(flat), panels.memory.as<float>() + r * panels.stride, K, to + r * K * static_cast<int64_t>(flat.element_size()));
    }
  });
  return flat;
}

/// Gradients of a layer's B_i [N, R_i] from panels that hold them transposed and without s_i, one after the other at `out`, in lora_b's dtype.
void unpack_b(const Adapters& adapters, const Stack& panels, void* out) {
  constexpr int64_t TILE = 64;  // columns of a panel
  const int64_t N = adapters.b[0].size(0), size = static_cast<int64_t>(adapters.b[0].element_size());
  const float* from = panels.memory.as<float>();
  char* to = static_cast<char*>(out);
  for (size_t i = 0; i < adapters.b.size(); ++i) {
    const int64_t rank = adapters.b[i].size(1);
    parallel_for(0, (N + TILE - 1) / TILE, GRAIN / (TILE * rank) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin * TILE; n < std::min(end * TILE, N); n += TILE) {
        kernels().turn(
            kind_of(adapters.b[i]), from + n, panels.stride, rank, std::min(TILE, N - n), static_cast<float>(adapters.scale[i]), to + n * rank * size);
      }
    });
    from += rank * panels.stride;
    to += rank * N * size;
  }
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

/// total[k] = the sum over `count` parts of part[k], in the order of parts.
void sum_parts(const float* parts, int64_t count, int64_t size, float* total) {
  parallel_for(0, size, GRAIN, [&](int64_t begin, int64_t end) {
    std::copy(parts + begin, parts + end, total + begin);
    for (int64_t part = 1; part < count; ++part) {
      for (int64_t k = begin; k < end; ++k) total[k] += parts[part * size + k];
    }
  });
}

/// Dropout's bits [layers, M, keep_bytes], or none.
using Keep = std::optional<Tensor>;

/// Room for the bits of rows of `columns` elements, where something is dropped.
Keep new_keep(const Tensor& like, int64_t columns, const Batch& batch) {
  const bool drops = std::any_of(batch.segments.begin(), batch.segments.end(), [](const Segment& segment) { return segment.threshold != 0; });
  if (!drops) return std::nullopt;
  return new_tensor(like, {batch.layers, like.size(0), keep_bytes(columns)}, ScalarType::Byte);
}

Rows rows_of(const Tensor& v, const Batch& batch, const Keep& keep) {
  Rows rows{};
  rows.kind = kind_of(v);
  rows.dots = takes_dots(v);
  rows.stride = v.stride(0);
  rows.order = batch.order;
  rows.keep = keep ? keep->const_data_ptr<uint8_t>() : nullptr;
  rows.keep_stride = keep_bytes(v.size(1));
  return rows;
}

/// Room for gradients in the form of panels: [sum R_i, columns rounded up to COLUMN_UNIT] float32.
Stack new_gradients(const Adapters& adapters, int64_t columns) {
  const int64_t stride = round_up(columns, COLUMN_UNIT);
  return {Memory(adapters.all_ranks() * stride * sizeof(float)), stride};
}

/// values [rows, stride] = 0 in the columns of the cell.
void clear(float* values, int64_t rows, int64_t stride, const Cell& cell) {
  const int64_t end = round_up(cell.column_end, COLUMN_UNIT);
  for (int64_t r = 0; r < rows; ++r) std::fill(values + r * stride + cell.column_begin, values + r * stride + end, 0.0f);
}

/// What a pass reads v for: projected [layers, M, ranks] = d(v) P_iᵀ if there are panels, gradient [sum R_i, L] = c_iᵀ d(v) if there are coefficients.
struct Wanted {
  const Stack* panels;
  const Tensor* projected;
  const Coefficients* coefficients;
  const Stack* gradient;
};

/// One pass over v [M, L]. `before` is called with each thread's share of v before that is read.
template <class Before>
void read(const Tensor& v, const Batch& batch, const Adapters& adapters, const Keep& keep, const Wanted& wanted, const Before& before) {
  const int64_t M = v.size(0), L = v.size(1), all_ranks = adapters.all_ranks(), stride = round_up(L, COLUMN_UNIT);
  const auto& [panels, projected, coefficients, gradient] = wanted;
  if (place_count(batch) == 0) {
    if (gradient) clear(gradient->memory.as<float>(), all_ranks, stride, {0, 0, 0, L});
    return;
  }
  const int64_t work = place_count(batch) * L * batch.layers * batch.ranks;
  const int64_t projected_size = batch.layers * M * batch.ranks, gradient_size = all_ranks * stride;
  const Grid grid = cut(work, place_count(batch), L, gradient ? all_ranks * L : 0, projected ? projected_size : 0);

  Read pass{rows_of(v, batch, keep)};
  pass.v = v.const_data_ptr();
  pass.panel = panels ? panels->memory.as<void>() : nullptr;
  pass.panel_stride = stride;
  pass.projected = projected ? floats(*projected) : nullptr;
  pass.projected_stride = batch.ranks;
  pass.coefficients = coefficients ? coefficients->values : nullptr;
  pass.coefficient_stride = coefficients ? coefficients->stride : 0;
  pass.gradient = gradient ? gradient->memory.as<float>() : nullptr;
  pass.gradient_stride = stride;

  Memory projected_parts, gradient_parts;
  if (projected && grid.column_parts > 1) {
    projected_parts = Memory(grid.column_parts * projected_size * sizeof(float));
    std::fill_n(projected_parts.as<float>(), grid.column_parts * projected_size, 0.0f);
  }
  if (gradient && grid.row_parts > 1) gradient_parts = Memory(grid.row_parts * gradient_size * sizeof(float));
  for_each_cell(batch, grid, L, [&](const Segments& segments, const Cell& cell, int64_t i, int64_t j) {
    Read part = pass;
    if (projected_parts) part.projected = projected_parts.as<float>() + j * projected_size;
    if (gradient_parts) part.gradient = gradient_parts.as<float>() + i * gradient_size;
    if (gradient) clear(part.gradient, all_ranks, stride, cell);
    before(segments, cell);
    kernels().read(part, segments, cell);
  });
  if (projected_parts) sum_parts(projected_parts.as<float>(), grid.column_parts, projected_size, pass.projected);
  if (gradient_parts) sum_parts(gradient_parts.as<float>(), grid.row_parts, gradient_size, pass.gradient);
}

/// xa [layers, M, ranks] = d_i(x) A_iᵀ; the mask is drawn into keep, if there is one.
Tensor project(const Tensor& x, const Batch& batch, const Adapters& adapters, const Keep& keep) {
  const Tensor xa = new_projection(x, batch);
  const Stack panels = pack_a(adapters, batch, read_format(x));
  const Draw pass{x.size(1), batch.order, keep ? static_cast<uint8_t*>(keep->mutable_data_ptr()) : nullptr, keep_bytes(x.size(1))};
  read(x, batch, adapters, keep, {&panels, &xa, nullptr, nullptr}, [&](const Segments& segments, const Cell& cell) {
    if (keep) kernels().draw(pass, segments, cell);
  });
  return xa;
}

/// v [M, L] += d'(c P_i), as a pass.
Add addition(const Tensor& v, const Batch& batch, const Keep& keep, const Coefficients& coefficients, const Stack& panels) {
  Add pass{rows_of(v, batch, keep)};
  pass.v = v.mutable_data_ptr();
  pass.panel = panels.memory.as<void>();
  pass.panel_stride = panels.stride;
  pass.coefficients = coefficients.values;
  pass.coefficient_stride = coefficients.stride;
  return pass;
}

void add(const Tensor& v, const Batch& batch, const Keep& keep, const Coefficients& coefficients, const Stack& panels) {
  if (place_count(batch) == 0) return;
  const Add pass = addition(v, batch, keep, coefficients, panels);
  const Grid grid = cut(place_count(batch) * v.size(1) * batch.layers * batch.ranks, place_count(batch), v.size(1), 0, 0);
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

/// projected [layers, M, ranks] *= s_i.
void scale_rows(const Tensor& projected, const Batch& batch) {
  float* values = floats(projected);
  const int64_t stride = batch.ranks;
  for (const Segment& segment : batch.segments) {
    parallel_for(segment.begin, segment.end, GRAIN / segment.rank + 1, [&](int64_t begin, int64_t end) {
      for (int64_t place = begin; place < end; ++place) {
        float* row = values + (segment.first_row + (batch.order ? batch.order[place] : place)) * stride;
        for (int64_t r = 0; r < segment.rank; ++r) row[r] *= segment.factor;
      }
    });
  }
}

}  // namespace

Tensor new_projection(const Tensor& v, const Batch& batch) {
  const Tensor made = new_tensor(v, {batch.layers, v.size(0), batch.ranks}, ScalarType::Float);
  if (!batch.is_whole || v.size(1) == 0) std::fill_n(floats(made), made.numel(), 0.0f);
  return made;
}

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

Adapters Adapters::of_layer(int64_t layer) const {
  const auto part = [&](const auto& values) {
    return std::decay_t<decltype(values)>(values.begin() + layer * each(), values.begin() + (layer + 1) * each());
  };
  return {1, part(a), part(b), part(scale), part(dropout_p), std::nullopt, std::nullopt};
}

namespace {

/// The bounds [S + 1] of the adapters' places: adapter i has bounds[i] to bounds[i + 1]. Raises unless order and offsets are the reference's.
std::vector<int64_t> bounds_of(const Tensor& order, const Tensor& offsets) {
  const int64_t M = order.numel(), S = offsets.numel() - 3;
  const Tensor dense_offsets = dense(offsets);
  const int64_t* rows = order.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < M; ++i) {
    STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < M, "order: got row ", rows[i], ", expected rows from 0 to ", M - 1);
  }
  const int64_t* bounds = dense_offsets.const_data_ptr<int64_t>();
  bool ascends = bounds[0] == 0 && bounds[S + 2] == M;
  for (int64_t i = 0; i < S + 2; ++i) ascends = ascends && bounds[i] <= bounds[i + 1];
  STD_TORCH_CHECK(ascends, "offsets: got numbers that do not ascend from 0 to ", M);
  return {bounds + 1, bounds + S + 2};
}

/// One segment an adapter of each layer, `bounds` of its rows of x in every layer.
Batch split_rows(const Tensor& x, const Adapters& adapters, const std::vector<int64_t>& bounds, const std::optional<Tensor>& order) {
  const int64_t M = x.size(0);
  const bool drops = adapters.seed || adapters.keep;
  const std::optional<Tensor> seeds = adapters.seed ? std::optional(dense(*adapters.seed)) : std::nullopt;
  Batch batch{{}, order, order ? order->const_data_ptr<int64_t>() : nullptr, M, adapters.layers, adapters.most_ranks(), !order};
  int64_t gradient_row = 0, panel_row = 0, pair_row = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(adapters.a.size()); ++i) {
    const int64_t layer = i / adapters.each(), of_layer = i % adapters.each();
    const Drop drop = drop_of(drops ? adapters.dropout_p[i] : 0);
    Segment segment{};
    segment.begin = bounds[of_layer];
    segment.end = bounds[of_layer + 1];
    segment.rank = adapters.a[i].size(0);
    segment.first_row = layer * M;
    segment.gradient_row = gradient_row;
    segment.panel_row = panel_row;
    segment.pair_row = pair_row;
    segment.tiled = takes_tiles(x, segment.end - segment.begin, segment.rank);
    segment.seed = seeds ? static_cast<uint64_t>(seeds->const_data_ptr<int64_t>()[layer]) : 0;
    segment.threshold = drop.threshold;
    segment.factor = drop.factor;
    batch.segments.push_back(segment);
    batch.is_whole = batch.is_whole && segment.rank == batch.ranks;
    gradient_row += segment.rank;
    panel_row += padded_rank(segment.rank);
    pair_row += rows_of_pairs(segment.rank, segment.tiled);
  }
  return batch;
}

}  // namespace

Batch checked_batch(
    const Tensor& x, const std::vector<int64_t>& out, const Adapters& adapters, const std::optional<Tensor>& order,
    const std::optional<Tensor>& offsets) {
  check_adapters(x, out, adapters.a, adapters.b, adapters.scale, adapters.dropout_p, order, offsets);
  check_seed(adapters.seed, adapters.layers, x);
  const int64_t M = x.size(0);
  if (!order) return split_rows(x, adapters, {0, M}, order);
  const Tensor dense_order = dense(*order);
  return split_rows(x, adapters, bounds_of(dense_order, *offsets), dense_order);
}

void Batch::poison_invalid(const Tensor& of_rows) const {
  for (int64_t place = segments.back().end; order && place < rows; ++place) {
    Tensor row = torch::stable::select(of_rows, 0, order[place]);
    torch::stable::fill_(row, std::numeric_limits<double>::quiet_NaN());
  }
}

namespace {

/// A layer's part of the batch, as if it stood alone.
Batch of_layer(const Batch& batch, int64_t layer) {
  Batch one = batch;
  const int64_t each = static_cast<int64_t>(batch.segments.size()) / batch.layers;
  one.segments.assign(batch.segments.begin() + layer * each, batch.segments.begin() + (layer + 1) * each);
  one.layers = 1;
  const Segment first = one.segments.front();
  for (Segment& segment : one.segments) {
    segment.first_row = 0;
    segment.gradient_row -= first.gradient_row;
    segment.panel_row -= first.panel_row;
    segment.pair_row -= first.pair_row;
  }
  return one;
}

/// [1, M, R] of [layers, M, R].
Tensor layer_of(Tensor whole, int64_t layer) { return whole.size(0) == 1 ? whole : torch::stable::narrow(whole, 0, layer, 1); }

int64_t all_elements(const std::vector<Tensor>& tensors) {
  int64_t count = 0;
  for (const Tensor& tensor : tensors) count += tensor.numel();
  return count;
}

/// One read of a layer's dy: dxa_i = s_i dy B_i into dxa [1, M, ranks] where it is needed, and the gradients of B_i at `db`, unless that is null.
void read_dy(
    const Tensor& dy, const Adapters& adapters, const Batch& batch, const Tensor& xa, const Tensor& dxa, bool need_dxa, void* db) {
  if (!need_dxa && !db) return;
  const Stack panels = pack_b(adapters, batch, read_format(dy));
  const Coefficients coefficients(dy, xa);
  const Stack gradient = new_gradients(adapters, dy.size(1));
  const Wanted wanted{need_dxa ? &panels : nullptr, need_dxa ? &dxa : nullptr, db ? &coefficients : nullptr, db ? &gradient : nullptr};
  read(dy, batch, adapters, std::nullopt, wanted, [](const Segments&, const Cell&) {});
  if (need_dxa) scale_rows(dxa, scaled(batch, adapters));
  if (db) unpack_b(adapters, gradient, db);
}

/// dx += d_i'(dxa_i A_i), and the gradients of A_i from one read of x; a null dx is not wanted.
Tensor finish_dx_and_da(
    const Tensor& x, const Adapters& adapters, const Batch& batch, const Tensor& dxa, const Tensor* dx, bool need_da) {
  const Coefficients coefficients(x, dxa);
  const Stack panels = dx ? pack_a(adapters, batch, add_format(x)) : Stack{Memory(), 0};
  if (!need_da) {
    if (dx) add(*dx, batch, adapters.keep, coefficients, panels);
    return new_tensor(adapters.a[0], {0}, adapters.a[0].scalar_type());
  }
  const Add pass = dx ? addition(*dx, batch, adapters.keep, coefficients, panels) : Add{};
  const Stack gradient = new_gradients(adapters, x.size(1));
  read(x, batch, adapters, adapters.keep, {nullptr, nullptr, &coefficients, &gradient}, [&](const Segments& segments, const Cell& cell) {
    if (dx) kernels().add(pass, segments, cell);
  });
  return unpack_a(adapters, gradient);
}

}  // namespace

std::tuple<Tensor, Tensor> add_updates(const std::vector<Tensor>& y, const Tensor& x, const Adapters& adapters, const Batch& batch) {
  const Tensor rows = with_dense_rows(x);
  const Keep keep = new_keep(rows, rows.size(1), batch);
  const Tensor xa = project(rows, batch, adapters, keep);
  for (int64_t g = 0; g < batch.layers; ++g) {
    const Adapters own = adapters.of_layer(g);
    const Batch rows_of_layer = scaled(of_layer(batch, g), own);
    add(y[g], rows_of_layer, std::nullopt, Coefficients(y[g], layer_of(xa, g)), pack_b(own, rows_of_layer, add_format(y[g])));
    batch.poison_invalid(y[g]);
  }
  return {xa, keep ? *keep : new_tensor(x, {0}, ScalarType::Byte)};
}

std::tuple<Tensor, Tensor> add_updates_backward(
    const Tensor* dx, const std::vector<Tensor>& dy, const Tensor& x, const Adapters& adapters, const Tensor& xa, const Batch& batch,
    bool need_da, bool need_db) {
  const Tensor rows = with_dense_rows(x), dense_xa = dense(xa), dxa = new_projection(x, batch);
  const Tensor db = new_tensor(adapters.b[0], {need_db ? all_elements(adapters.b) : 0}, adapters.b[0].scalar_type());
  char* next_db = need_db ? static_cast<char*>(db.mutable_data_ptr()) : nullptr;
  for (int64_t g = 0; g < batch.layers; ++g) {
    const Adapters own = adapters.of_layer(g);
    read_dy(with_dense_rows(dy[g]), own, of_layer(batch, g), layer_of(dense_xa, g), layer_of(dxa, g), dx || need_da, next_db);
    if (need_db) next_db += all_elements(own.b) * static_cast<int64_t>(db.element_size());
  }
  if (!dx && !need_da) return {new_tensor(adapters.a[0], {0}, adapters.a[0].scalar_type()), db};
  const Tensor da = finish_dx_and_da(rows, adapters, batch, dxa, dx, need_da);
  if (dx) batch.poison_invalid(*dx);
  return {da, db};
}

}  // namespace fastlora

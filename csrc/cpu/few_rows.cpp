// A few rows, 1 to FEW_ROWS, as decoding has them: bound by reading W, which is read once; nothing is packed, A and B are read where they lie.
//     few_rows_cpu         y = x Wᵀ + b
//     few_rows_lora_cpu    y = x Wᵀ + b + s xa Bᵀ with xa = x Aᵀ, without dropout
//     few_rows_now_cpu     the same of x [..., K], without xa: what a layer asks for that nobody differentiates
//     few_rows_mixed_cpu   the same, where each row has an adapter of its own; lists cost a call of one adapter 3 microseconds more
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>

#include "adapters.h"
#include "memory.h"
#include "new_tensor.h"

namespace fastlora {
namespace {

/// Calls the kernel for all columns of y, split over threads.
void run(const FewRows& task, int64_t columns) {
  torch::stable::parallel_for(0, columns, GRAIN / task.in + 1, [&](int64_t begin, int64_t end) { kernels().few_rows(task, begin, end); });
}

FewRows task_of(const Tensor& x, const Tensor& weight) {
  FewRows task{};
  task.kind = kind_of(x);
  task.rows = x.size(0);
  task.in = x.size(1);
  task.x = x.const_data_ptr();
  task.x_stride = x.stride(0);
  task.weight = weight.const_data_ptr();
  task.by_column = weight.size(1) > 1 && weight.stride(1) != 1;  // one column lies by row, however far its elements are apart
  task.weight_stride = weight.stride(task.by_column ? 1 : 0);
  return task;
}

/// The adapters' part of a task, and what it points to.
struct Updates {
  Tensor xa;      // [1, M, ranks] float32
  Memory scaled;  // the same times s_i
  std::vector<Tensor> held;
  std::array<const void*, FEW_ROWS> lora_b{};
  std::array<int64_t, FEW_ROWS> rank{};
};

/// xa_i = x A_iᵀ for the rows of each adapter.
Updates project(const Tensor& x, const Adapters& adapters, const Batch& batch) {
  const int64_t most = batch.ranks;
  Updates updates{new_projection(x, batch), Memory(x.size(0) * most * sizeof(float))};
  const Tensor rows = kind_of(adapters.a[0]) == kind_of(x) ? x : torch::stable::to(x, ScalarType::Float);
  float* xa = floats(updates.xa);
  for (size_t i = 0; i < adapters.a.size(); ++i) {
    const Segment& segment = batch.segments[i];
    if (segment.begin == segment.end) continue;
    const Tensor a = with_dense_rows(adapters.a[i]);
    updates.held.push_back(dense(adapters.b[i]));
    FewRows task = task_of(rows, a);
    task.wide = true;
    task.y_stride = most;
    const auto project_rows = [&](int64_t row, int64_t count) {
      task.rows = count;
      task.x = static_cast<const char*>(rows.const_data_ptr()) + row * task.x_stride * static_cast<int64_t>(rows.element_size());
      task.y = xa + row * most;
      run(task, segment.rank);
    };
    if (!batch.order) project_rows(segment.begin, segment.end - segment.begin);
    for (int64_t place = segment.begin; place < segment.end; ++place) {
      const int64_t row = batch.order ? batch.order[place] : place;
      if (batch.order) project_rows(row, 1);
      updates.lora_b[row] = updates.held.back().const_data_ptr();
      updates.rank[row] = segment.rank;
      for (int64_t r = 0; r < segment.rank; ++r) updates.scaled.as<float>()[row * most + r] = static_cast<float>(adapters.scale[i]) * xa[row * most + r];
    }
  }
  return updates;
}

/// y = x Wᵀ + b, and the updates where there are some.
Tensor multiply(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Updates* updates, Kind adapter_kind) {
  const int64_t N = weight.size(0);
  const Tensor y = new_tensor(x, {x.size(0), N}, x.scalar_type());
  const Tensor dense_bias = bias ? dense(*bias) : y;
  FewRows task = task_of(x, weight);
  task.bias = bias ? dense_bias.const_data_ptr() : nullptr;
  task.y = y.mutable_data_ptr();
  task.y_stride = N;
  if (updates) {
    task.adapter_kind = adapter_kind;
    task.xa = updates->scaled.as<float>();
    task.xa_stride = updates->xa.size(2);
    task.lora_b = updates->lora_b.data();
    task.rank = updates->rank.data();
  }
  run(task, N);
  return y;
}

/// x, its rows dense; raises unless the kernel takes it and the weight.
Tensor checked_rows(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_cpu(x, "x");
  check_base(x, weight, bias);
  const bool few = x.size(0) >= 1 && x.size(0) <= FEW_ROWS && x.size(1) >= 1, dense = weight.stride(1) == 1 || weight.stride(0) == 1;
  STD_TORCH_CHECK(few && dense, "x: got ", describe(x), ", expected 1 to ", FEW_ROWS, " rows and a weight without gaps");
  return with_dense_rows(x);
}

Tensor few_rows_cpu(
    const Tensor& x,                      // [M, K]
    const Tensor& weight,                 // [N, K], dense by row or by column
    const std::optional<Tensor>& bias) {  // [N]
  return multiply(checked_rows(x, weight, bias), weight, bias, nullptr, kind_of(x));
}

/// The numbers of a tensor without gaps as float32.
void widen(const Tensor& from, float* to) {
  const int64_t count = from.numel();
  switch (kind_of(from)) {
    case Kind::FLOAT32: std::copy_n(static_cast<const float*>(from.const_data_ptr()), count, to); return;
    case Kind::BFLOAT16: std::copy_n(static_cast<const torch::headeronly::BFloat16*>(from.const_data_ptr()), count, to); return;
    case Kind::FLOAT16: std::copy_n(static_cast<const torch::headeronly::Half*>(from.const_data_ptr()), count, to); return;
  }
}

Tensor few_rows_now_cpu(
    const Tensor& x,       // [..., K]
    const Tensor& weight,  // [N, K], dense by row
    const std::optional<Tensor>& bias, const Tensor& lora_a, const Tensor& lora_b, double scale) {
  check_cpu(x, "x");
  check_dtype(x, "x", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  STD_TORCH_CHECK(x.dim() >= 1, "x: got ", describe(x), ", expected at least one dimension");
  const auto shape = x.sizes();
  const int64_t K = shape[shape.size() - 1], rows = K ? x.numel() / K : 0;
  STD_TORCH_CHECK(rows >= 1 && rows <= FEW_ROWS, "x: got ", describe(x), ", expected 1 to ", FEW_ROWS, " rows");
  check(weight, "weight", {ANY, K}, {x.scalar_type()}, x);
  STD_TORCH_CHECK(K == 1 || weight.stride(1) == 1, "weight: got rows with gaps, expected rows that lie together");
  const int64_t N = weight.size(0), R = lora_a.dim() ? lora_a.size(0) : 0;
  if (bias) check(*bias, "bias", {N}, {x.scalar_type()}, x);
  check(lora_a, "lora_a", {ANY, K}, {x.scalar_type(), ScalarType::Float}, x);
  STD_TORCH_CHECK(R >= 1, "lora_a: got ", describe(lora_a), ", expected a rank of at least 1");
  check(lora_b, "lora_b", {N, R}, {lora_a.scalar_type()}, x);

  const Tensor from = dense(x), a = with_dense_rows(lora_a), b = dense(lora_b), dense_bias = bias ? dense(*bias) : x;
  const Kind kind = kind_of(x), adapter_kind = kind_of(a);
  const bool widens = adapter_kind != kind;
  const Memory memory((rows * R + (widens ? rows * K : 0)) * sizeof(float));
  float* const xa = memory.as<float>();
  if (widens) widen(from, xa + rows * R);

  FewRows task{};
  task.kind = adapter_kind;
  task.rows = rows;
  task.in = K;
  task.x = widens ? xa + rows * R : from.const_data_ptr();
  task.x_stride = K;
  task.weight = a.const_data_ptr();
  task.weight_stride = a.stride(0);
  task.wide = true;
  task.y = xa;
  task.y_stride = R;
  run(task, R);
  for (int64_t i = 0; i < rows * R; ++i) xa[i] *= static_cast<float>(scale);

  std::vector<int64_t> sizes(shape.begin(), shape.end());
  sizes.back() = N;
  const Tensor y = new_tensor(x, sizes, x.scalar_type());
  std::array<const void*, FEW_ROWS> lora_b_of_row;
  std::array<int64_t, FEW_ROWS> rank_of_row;
  lora_b_of_row.fill(b.const_data_ptr());
  rank_of_row.fill(R);
  task.kind = kind;
  task.adapter_kind = adapter_kind;
  task.x = from.const_data_ptr();
  task.weight = weight.const_data_ptr();
  task.weight_stride = weight.stride(0);
  task.wide = false;
  task.bias = bias ? dense_bias.const_data_ptr() : nullptr;
  task.y = y.mutable_data_ptr();
  task.y_stride = N;
  task.xa = xa;
  task.xa_stride = R;
  task.lora_b = lora_b_of_row.data();
  task.rank = rank_of_row.data();
  run(task, N);
  return y;
}

std::tuple<Tensor, Tensor> few_rows_mixed_cpu(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::vector<Tensor>& lora_a,  // S of [R_i, K]
    const std::vector<Tensor>& lora_b,                                                                            // S of [N, R_i]
    const std::vector<double>& scale, const std::optional<Tensor>& order, const std::optional<Tensor>& offsets) {
  const Tensor rows = checked_rows(x, weight, bias);
  const Adapters adapters{1, lora_a, lora_b, scale, std::vector<double>(lora_a.size(), 0.0), std::nullopt, std::nullopt};
  const Batch batch = checked_batch(rows, {weight.size(0)}, adapters, order, offsets);
  const Updates updates = project(rows, adapters, batch);
  const Tensor y = multiply(rows, weight, bias, &updates, kind_of(lora_a[0]));
  batch.poison_invalid(y);
  return {y, updates.xa};
}

std::tuple<Tensor, Tensor> few_rows_lora_cpu(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_a, const Tensor& lora_b, double scale) {
  return few_rows_mixed_cpu(x, weight, bias, {lora_a}, {lora_b}, {scale}, std::nullopt, std::nullopt);
}

/// The ranks begin to end of xa_i = x A_iᵀ, of at most FEW_ROWS rows of one adapter, which lie apart in x and in xa.
void project_some(const Tensor& x, const Tensor& a, const int64_t* row, int64_t count, float* xa, int64_t ranks, int64_t begin, int64_t end) {
  const int64_t K = x.size(1), size = static_cast<int64_t>(x.element_size());
  const auto row_of_x = [&](int64_t i) { return static_cast<const char*>(x.const_data_ptr()) + row[i] * x.stride(0) * size; };
  FewRows task{};
  task.kind = kind_of(x);
  task.rows = count;
  task.in = K;
  task.weight = a.const_data_ptr();
  task.weight_stride = a.stride(0);
  task.wide = true;
  if (count == 1) {
    task.x = row_of_x(0);
    task.y = xa + row[0] * ranks;
    return kernels().few_rows(task, begin, end);
  }
  const Memory gathered(count * K * size), projected(count * a.size(0) * sizeof(float));
  for (int64_t i = 0; i < count; ++i) std::copy_n(row_of_x(i), K * size, gathered.as<char>() + i * K * size);
  task.x = gathered.as<void>();
  task.x_stride = K;
  task.y = projected.as<void>();
  task.y_stride = a.size(0);
  kernels().few_rows(task, begin, end);
  for (int64_t i = 0; i < count; ++i) {
    const float* const own = projected.as<float>() + i * a.size(0);
    std::copy(own + begin, own + end, xa + row[i] * ranks + begin);
  }
}

/// What an adapter has to do: so many units, each at that cost, at least 1.
struct Share {
  int64_t units, cost;
};

/// Calls body(i, begin, end) for runs of each adapter's units; threads have alike to do, whatever the ranks.
template <class Body>
void for_even_parts(const std::vector<Share>& shares, const Body& body) {
  int64_t all = 0;
  for (const Share& share : shares) all += share.units * share.cost;
  torch::stable::parallel_for(0, all, GRAIN, [&](int64_t first, int64_t last) {
    int64_t at = 0;  // where the adapter's units begin
    for (size_t i = 0; i < shares.size(); ++i) {
      const auto [units, cost] = shares[i];
      const auto below = [&](int64_t limit) { return limit <= at ? 0 : std::min((limit - at + cost - 1) / cost, units); };  // units that begin before
      if (below(first) < below(last)) body(i, below(first), below(last));
      at += units * cost;
    }
  });
}

}  // namespace

bool have_few_rows(const Batch& batch) {
  return batch.order && std::all_of(batch.segments.begin(), batch.segments.end(), [](const Segment& segment) {
    return segment.end - segment.begin <= FEW_ROWS && segment.threshold == 0;
  });
}

std::tuple<Tensor, Tensor> add_updates_of_few_rows(const std::vector<Tensor>& y, const Tensor& x, const Adapters& adapters, const Batch& batch) {
  const Tensor rows = with_dense_rows(kind_of(adapters.a[0]) == kind_of(x) ? x : torch::stable::to(x, ScalarType::Float));
  const Tensor xa = new_projection(x, batch);
  std::vector<Tensor> a, b;
  for (const Tensor& one : adapters.a) a.push_back(with_dense_rows(one));
  for (const Tensor& one : adapters.b) b.push_back(dense(one));
  constexpr int64_t COLUMNS = 64;  // of a unit
  const int64_t K = x.size(1), ranks = batch.ranks;
  const auto layer_of = [&](size_t i) { return static_cast<int64_t>(i) / adapters.each(); };
  const auto xa_of = [&](size_t i) { return floats(xa) + layer_of(i) * batch.rows * ranks; };
  std::vector<Share> projections, additions;
  for (size_t i = 0; i < a.size(); ++i) {
    const Segment& segment = batch.segments[i];
    const int64_t count = segment.end - segment.begin, N = y[layer_of(i)].size(1);
    projections.push_back({count ? segment.rank : 0, count * K + 1});
    additions.push_back({count ? (N + COLUMNS - 1) / COLUMNS : 0, count * COLUMNS * segment.rank + 1});
  }
  for_even_parts(projections, [&](size_t i, int64_t begin, int64_t end) {
    const Segment& segment = batch.segments[i];
    project_some(rows, a[i], batch.order + segment.begin, segment.end - segment.begin, xa_of(i), ranks, begin, end);
  });
  for_even_parts(additions, [&](size_t i, int64_t begin, int64_t end) {
    const Segment& segment = batch.segments[i];
    const Tensor& to = y[layer_of(i)];
    FewRowsUpdate task{};
    task.kind = kind_of(to);
    task.rows = segment.end - segment.begin;
    for (int64_t place = 0; place < task.rows; ++place) {
      const int64_t row = batch.order[segment.begin + place];
      task.y[place] = static_cast<char*>(to.mutable_data_ptr()) + row * to.stride(0) * static_cast<int64_t>(to.element_size());
      task.xa[place] = xa_of(i) + row * ranks;
    }
    task.scale = static_cast<float>(adapters.scale[i]);
    task.adapter_kind = kind_of(b[i]);
    task.lora_b = b[i].const_data_ptr();
    task.rank = segment.rank;
    kernels().few_rows_update(task, begin * COLUMNS, std::min(end * COLUMNS, to.size(1)));
  });
  for (const Tensor& one : y) batch.poison_invalid(one);
  return {xa, new_tensor(x, {0}, ScalarType::Byte)};
}

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("few_rows_cpu", TORCH_BOX(&few_rows_cpu));
  m.impl("few_rows_lora_cpu", TORCH_BOX(&few_rows_lora_cpu));
  m.impl("few_rows_now_cpu", TORCH_BOX(&few_rows_now_cpu));
  m.impl("few_rows_mixed_cpu", TORCH_BOX(&few_rows_mixed_cpu));
}

}  // namespace fastlora

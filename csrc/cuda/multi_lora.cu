// Row by row, y = x Wᵀ + b + s_i xa B_iᵀ with xa = d_i(x) A_iᵀ, where i is the row's adapter;  dxa = s_i dy B_i;  dx = dy W + d_i'(dxa A_i);
// dA_i = dxaᵀ d_i(x) and dB_i = s_i dyᵀ xa over the adapter's rows, in bfloat16 and float16.
// The equations are fastlora/reference.py::lora_linear and lora_linear_backward, where there is an order.
//
//     forward     up to 64 rows                                     multi_lora.cuh
//                 A_i and B_i rounded, padded, side by side         multi_round_kernel
//                 xa, the mask drawn on the way and kept as bits    side_kernel: one read of x, an adapter's rows at a time
//                 y, the rank steps last                            product_sm80_kernel
//     backward    A_i, B_i and xa rounded, padded, transposed       multi_round_kernel
//                 dxa and parts of dB_i                             side_kernel
//                 dx, the rank steps last and masked                product_sm80_kernel
//                 parts of dA_i                                     side_kernel
//                 dA_i and dB_i, parts added in order               multi_sum_kernel
//
// As in lora_linear.cu, whose products these are. The thin products go through the rows by their places, an adapter after the other, so that each tile
// is of one adapter. The product goes through them as they lie, which the copy engine needs: for each block of 128 rows it adds the rank steps of the
// adapters that are among them, in prefill mostly one; where they are several, a row takes its own adapter's. An adapter that no row uses is not read.
#include "multi_lora.cuh"
#include "product_launch.cuh"

namespace fastlora {
namespace {

/// Up to FEW adapters to be rounded, and written to a table for the kernels that follow.
template <class T>
struct MultiRound {
  StoredAdapter part[FEW];
  int begin, count;  // the number of the first; how many
  bool back;         // B is transposed
  Adapter* table;    // [S]
  T *a, *b;          // [ranks, padded K]; [N, ranks], or [ranks, padded N]
  int64_t a_stride, b_stride;
  int K, N, R;
  ManyAdapters groups;
  // What the first launch makes ready for those that follow.
  const float* xa;   // [M, R], to be rounded and transposed, or null
  T* xa_transposed;  // [padded R, places]
  int places;
};

/// By the blocks of gridDim.x: no row has an adapter until it is noted, nothing is done, and the forward's xa by place.
template <class T>
__device__ void make_ready(const MultiRound<T>& task) {
  const int M = static_cast<int>(task.groups.M);
  const int64_t first = blockIdx.x * static_cast<int64_t>(BLOCK) + threadIdx.x, step = gridDim.x * BLOCK;
  for (int64_t row = first; row < round_up(M, ROW_BLOCK); row += step) task.groups.group_of_row[row] = row < M ? 0 : ManyAdapters::NO_ROW;
  if (!task.xa) return;
  for (int64_t place = first; place < task.places; place += step) {
    const Piece piece = task.groups.piece(static_cast<int>(place / PLACES), PLACES);
    const int row = task.groups.row(piece, piece.begin + static_cast<int>(place % PLACES));
    for (int r = 0; r < padded_rank(task.R); ++r) {
      const float value = row < M && r < task.R ? task.xa[static_cast<int64_t>(row) * task.R + r] : 0.f;
      reinterpret_cast<uint16_t*>(task.xa_transposed)[static_cast<int64_t>(r) * task.places + place] = static_cast<uint16_t>(pack<T>(value, 0));
    }
  }
}

/// Block (x, y): A of adapter y, B of adapter y - count, or what is no adapter's.
template <class T>
__global__ void __launch_bounds__(BLOCK) multi_round_kernel(const __grid_constant__ MultiRound<T> task) {
  let_next_launch_begin();
  const int y = blockIdx.y;
  if (y == 2 * task.count) return make_ready(task);
  const StoredAdapter& adapter = task.part[y % task.count];
  const int number = task.begin + y % task.count, group = number + 1;
  if (y < task.count && blockIdx.x == 0 && threadIdx.x == 0) task.table[number] = adapter;
  if (task.groups.begin(group) >= task.groups.begin(group + 1)) return;
  const int R = adapter.R, padded = round_up(R, ranks_a_pass(task.R));
  if (y < task.count) {
    T* const to = task.a + adapter.first * task.a_stride;
    round<T>({adapter.a, adapter.wide, R, task.K, adapter.a_strides[0], adapter.a_strides[1], to, padded, task.a_stride, task.a_stride});
  } else if (task.back) {
    T* const to = task.b + adapter.first * task.b_stride;
    round<T>({adapter.b, adapter.wide, R, task.N, adapter.b_strides[1], adapter.b_strides[0], to, padded, task.b_stride, task.b_stride});
  } else {
    T* const to = task.b + adapter.first;
    round<T>({adapter.b, adapter.wide, task.N, R, adapter.b_strides[0], adapter.b_strides[1], to, task.N, padded, task.b_stride});
  }
}

/// dA_i, or dB_i: of each adapter the sum of its parts, as Gradient leaves them.
struct MultiSum {
  const float* parts;  // or null: not needed
  int columns;
  void* to;
  bool transposed;  // to [columns, R_i]
};

struct MultiSums {
  MultiSum sum[2];  // of dA, of dB
  int span, ranks, R;
  bool wide;  // to float32
  ManyAdapters groups;
};

template <class T>
__global__ void __launch_bounds__(BLOCK) multi_sum_kernel(const __grid_constant__ MultiSums task) {
  wait_for_launch_before();
  const MultiSum& sum = task.sum[blockIdx.z];
  if (!sum.parts) return;
  const int64_t stride = sums_stride(sum.columns, task.R);
  for (int group = 1 + blockIdx.y; group <= task.groups.count; group += gridDim.y) {
    const Adapter& adapter = task.groups.of(group);
    const int begin = task.groups.begin(group), parts = max(0, divide_up(task.groups.begin(group + 1) - begin, task.span));
    const float factor = sum.transposed ? adapter.scale : adapter.threshold ? adapter.factor : 1.f;
    const int64_t numbers = static_cast<int64_t>(adapter.R) * sum.columns, before = static_cast<int64_t>(adapter.before) * sum.columns;
    for (int64_t i = blockIdx.x * static_cast<int64_t>(BLOCK) + threadIdx.x; i < numbers; i += gridDim.x * BLOCK) {
      const int64_t row = i / sum.columns, column = i % sum.columns;
      float total = 0;
      for (int part = 0; part < parts; ++part) {
        total += sum.parts[(sums_row(adapter, part, begin / task.span + part - 1, task.ranks, padded_rank(task.R)) + row) * stride + column];
      }
      total *= factor;
      const int64_t at = before + (sum.transposed ? column * adapter.R + row : i);
      if (task.wide) {
        static_cast<float*>(sum.to)[at] = total;
      } else {
        static_cast<uint16_t*>(sum.to)[at] = static_cast<uint16_t>(pack<T>(total, 0));
      }
    }
  }
}

/// One call with many rows: the layer's sizes, and how its kernels are launched.
template <class T>
struct Call {
  const MultiLora& layer;
  int M, K, N, S, R, padded;
  int ranks = 0;      // of all adapters, padded
  int tiles, places;  // of x aᵀ; places, padded
  cudaStream_t stream;

  Call(const MultiLora& layer, cudaStream_t stream)
      : layer(layer), M(static_cast<int>(layer.M)), K(static_cast<int>(layer.K)), N(static_cast<int>(layer.N)), S(static_cast<int>(layer.S)),
        R(static_cast<int>(layer.R)), padded(padded_rank(R)), tiles(ManyAdapters::pieces(M, S, SHRINK_ROWS)),
        places(ManyAdapters::pieces(M, S, PLACES) * PLACES), stream(stream) {
    for (int i = 0; i < S; ++i) ranks += padded_beside(layer.adapters[i]);
  }

  int padded_beside(const LoraAdapter& adapter) const { return round_up(static_cast<int>(adapter.R), ranks_a_pass(R)); }

  ManyAdapters groups(const Adapter* table, int* group_of_row) const {
    return {{layer.order, layer.offsets, layer.M, S}, table, group_of_row};
  }

  /// Launches `task`, which is whole but for its adapters, for FEW of them at a time.
  void round(MultiRound<T> task, bool drops) const {
    int first = 0, before = 0;
    for (task.begin = 0; task.begin < S; task.begin += FEW) {
      task.count = std::min(S - task.begin, FEW);
      for (int i = 0; i < task.count; ++i) {
        const LoraAdapter& from = layer.adapters[task.begin + i];
        StoredAdapter& to = task.part[i] = adapter_of(from, layer.adapter_dtype == Dtype::FLOAT32);
        to.first = first, to.before = before;
        if (!drops) to.threshold = 0;
        first += padded_beside(from), before += to.R;
      }
      const unsigned blocks = blocks_for(int64_t{1} * padded * std::max(task.K, task.N) / 8);
      launch(multi_round_kernel<T>, dim3(blocks, 2 * task.count + (task.begin == 0)), dim3(BLOCK), 0, stream, task);
    }
  }
};

template <class T>
struct ForwardWorkspace {
  T *a, *b, *xa;
  Adapter* table;
  int* group_of_row;
  int a_stride;
  int64_t bytes;

  ForwardWorkspace(const Call<T>& call, void* base) : a_stride(a_columns(call.K, call.R)) {
    Workspace space{static_cast<unsigned char*>(base)};
    a = space.take<T>(int64_t{1} * call.ranks * a_stride);  // [ranks, padded K]
    b = space.take<T>(call.layer.N * call.ranks);           // [N, ranks]
    xa = space.take<T>(call.layer.M * call.padded);         // [M, padded R]: s_i xa
    table = space.take<Adapter>(call.S);
    group_of_row = space.take<int>(round_up(call.M, ROW_BLOCK));
    bytes = space.used;
  }
};

template <class T>
std::string many_rows(const MultiLoraForward& given, cudaStream_t stream) {
  const MultiLora& layer = given.layer;
  const Call<T> call(layer, stream);
  const ForwardWorkspace<T> space(call, given.workspace);
  const ManyAdapters groups = call.groups(space.table, space.group_of_row);
  call.round(
      {{}, 0, 0, false, space.table, space.a, space.b, space.a_stride, call.ranks, call.K, call.N, call.R, groups, nullptr, nullptr, 0},
      given.seed);

  const T* const x = static_cast<const T*>(layer.x);
  const Shrink<T, ManyAdapters> shrink{
      x, layer.x_stride, space.a, space.a_stride, given.xa, layer.R, space.xa, nullptr, given.keep, given.seed, call.M, call.K, call.R, call.places,
      groups};
  Sides<T, ManyAdapters> sides(call.R);
  sides.take(shrink, call.tiles, call.tiles);
  const Product<T, ManyAdapters> product{
      x, layer.x_stride, static_cast<const T*>(layer.weight), layer.weight_stride, space.xa, space.b, call.ranks,
      static_cast<const T*>(given.bias), given.bias_stride, nullptr, static_cast<T*>(given.y), call.M, call.N, call.K, call.R, call.ranks, groups};
  return launch_products<T, ManyAdapters, false>(layer.by_column, product, sides, Sides<T, ManyAdapters>(call.R), stream);
}

template <class T>
struct BackwardWorkspace {
  T *a, *b, *xa, *dxa, *dxa_transposed;
  float *da, *db;
  Adapter* table;
  int* group_of_row;
  int a_stride, b_stride, span;
  int64_t bytes;

  BackwardWorkspace(const Call<T>& call, void* base)
      : a_stride(a_columns(call.K, call.R)), b_stride(a_columns(call.N, call.R)), span(span_of(call.M, call.R)) {
    Workspace space{static_cast<unsigned char*>(base)};
    const int64_t parts = call.ranks + int64_t{1} * (call.M / span) * call.padded;  // their ranks
    a = space.take<T>(int64_t{1} * call.ranks * a_stride);                   // [ranks, padded K]
    b = space.take<T>(int64_t{1} * call.ranks * b_stride);                   // [ranks, padded N]
    xa = space.take<T>(int64_t{1} * call.padded * call.places);              // [padded R, places]
    dxa = space.take<T>(call.layer.M * call.padded);                         // [M, padded R]
    dxa_transposed = space.take<T>(int64_t{1} * call.padded * call.places);  // [padded R, places]
    da = space.take<float>(parts * sums_stride(call.K, call.R));               // [parts' ranks, padded K]
    db = space.take<float>(parts * sums_stride(call.N, call.R));               // [parts' ranks, padded N]
    table = space.take<Adapter>(call.S);
    group_of_row = space.take<int>(round_up(call.M, ROW_BLOCK));
    bytes = space.used;
  }
};

template <class T>
std::string backward(const MultiLoraBackward& given, cudaStream_t stream) {
  const MultiLora& layer = given.layer;
  const Call<T> call(layer, stream);
  const BackwardWorkspace<T> space(call, given.workspace);
  const ManyAdapters groups = call.groups(space.table, space.group_of_row);
  call.round(
      {{}, 0, 0, true, space.table, space.a, space.b, space.a_stride, space.b_stride, call.K, call.N, call.R, groups,
       given.db ? given.xa : nullptr, space.xa, call.places},
      given.keep);

  const T* const dy = static_cast<const T*>(given.dy);
  const Shrink<T, ManyAdapters> dxa{
      dy, given.dy_stride, space.b, space.b_stride, nullptr, 0, space.dxa, space.dxa_transposed, nullptr, nullptr, call.M, call.N, call.R, call.places,
      groups};
  const Gradient<T, ManyAdapters> db{
      dy, given.dy_stride, nullptr, space.xa, space.db, call.M, space.span, call.N, call.R, call.places, call.ranks, groups};
  const Gradient<T, ManyAdapters> da{
      static_cast<const T*>(layer.x), layer.x_stride, given.keep, space.dxa_transposed, space.da, call.M, space.span, call.K, call.R, call.places,
      call.ranks, groups};
  const int parts = ManyAdapters::pieces(call.M, call.S, space.span);
  Sides<T, ManyAdapters> first(call.R), last(call.R);
  if (given.dx || given.da) first.take(dxa, call.tiles, call.tiles);
  if (given.db) first.take(db, parts, parts);
  if (given.da) last.take(da, parts, parts);
  if (given.dx && call.M) {
    const Product<T, ManyAdapters> product{
        dy, given.dy_stride, static_cast<const T*>(layer.weight), layer.weight_stride, space.dxa, space.a, space.a_stride, nullptr, 0,
        given.keep, static_cast<T*>(given.dx), call.M, call.K, call.N, call.R, call.ranks, groups};
    const std::string error = launch_products<T, ManyAdapters, true>(layer.by_column, product, first, last, stream);
    if (!error.empty()) return error;
  } else if (call.M) {
    launch_sides(first, stream);
    launch_sides(last, stream);
  }
  if (given.da || given.db) {
    const MultiSums sums{
        {{given.da ? space.da : nullptr, call.K, given.da, false}, {given.db ? space.db : nullptr, call.N, given.db, true}}, space.span,
        call.ranks, call.R, layer.adapter_dtype == Dtype::FLOAT32, groups};
    const unsigned blocks = blocks_for(static_cast<int64_t>(call.R) * std::max(call.K, call.N));
    launch_early(multi_sum_kernel<T>, dim3(blocks, std::min(call.S, 65535), 2), dim3(BLOCK), 0, stream, sums);
  }
  return "";
}

/// What the kernels for many rows cannot take, naming the argument and what they expect of it; empty where they can.
std::string unsupported(const MultiLora& layer) {
  if (layer.dtype == Dtype::FLOAT32) return "x: got float32, expected bfloat16 or float16";
  if (layer.R > 512) return "lora_a: got rank " + std::to_string(layer.R) + ", expected at most 512";
  constexpr int64_t FAR = 1 << 24;  // offsets within the rows of a tile are 32 bits
  if (layer.M > 64 * FAR) return "x: got " + std::to_string(layer.M) + " rows, expected at most 2^30";
  if (std::min(layer.K, layer.N) < 1 || std::max(layer.K, layer.N) > FAR) {
    return "weight: got [" + std::to_string(layer.N) + ", " + std::to_string(layer.K) + "], expected sides of 1 to 2^24";
  }
  const int64_t parts = ManyAdapters::pieces(layer.M, layer.S, span_of(static_cast<int>(layer.M), static_cast<int>(layer.R)));
  const int64_t tiles = parts * divide_up(std::max(layer.K, layer.N), grad_columns(16)) * padded_rank(static_cast<int>(layer.R)) / 16;
  if (layer.S > 1 << 20 || tiles > 1 << 30) {
    return "lora_a: got " + std::to_string(layer.S) + " adapters, expected at most 2^20, and fewer beside a weight that is large";
  }
  return "";
}

/// Whether a forward runs as multi_lora.cuh has it.
bool runs_as_few(const MultiLora& layer) { return layer.M <= 64 || !unsupported(layer).empty(); }

}  // namespace

int64_t multi_lora_workspace(const MultiLora& layer) {
  return runs_as_few(layer) ? Plan(layer).bytes : ForwardWorkspace<__half>(Call<__half>(layer, nullptr), nullptr).bytes;
}

int64_t multi_lora_backward_workspace(const MultiLora& layer) {
  return unsupported(layer).empty() ? BackwardWorkspace<__half>(Call<__half>(layer, nullptr), nullptr).bytes : 0;
}

std::string multi_lora(const MultiLoraForward& given, cudaStream_t stream) {
  const MultiLora& layer = given.layer;
  if (layer.dtype == Dtype::FLOAT32) return "x: got float32, expected bfloat16 or float16";
  constexpr int64_t FAR = int64_t{1} << 30;  // rows and columns are 32 bits where they are many
  if (layer.M > FAR) return "x: got " + std::to_string(layer.M) + " rows, expected at most 2^30";
  if (layer.N > FAR || layer.K > FAR) {
    return "weight: got [" + std::to_string(layer.N) + ", " + std::to_string(layer.K) + "], expected sides up to 2^30";
  }
  if (layer.R > 65535 * TILE) return "lora_a: got rank " + std::to_string(layer.R) + ", expected at most " + std::to_string(65535 * TILE);
  if (layer.M == 0) return "";
  const bool bfloat16 = layer.dtype == Dtype::BFLOAT16;
  if (!runs_as_few(layer)) return all_of((bfloat16 ? many_rows<__nv_bfloat16> : many_rows<__half>)(given, stream));
  (bfloat16 ? few_rows<__nv_bfloat16> : few_rows<__half>)(given, stream);
  return all_of("");
}

std::string multi_lora_backward(const MultiLoraBackward& given, cudaStream_t stream) {
  const std::string found = unsupported(given.layer);
  if (!found.empty()) return found;
  return all_of((given.layer.dtype == Dtype::BFLOAT16 ? backward<__nv_bfloat16> : backward<__half>)(given, stream));
}

}  // namespace fastlora

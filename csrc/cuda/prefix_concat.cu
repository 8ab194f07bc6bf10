// Rows [P_i ; x] with their mask, positions and labels, the padding kept on its side; and the gradients of prompts and embeddings.
// The equations are fastlora/reference.py::prefix_layout, prefix_concat and prefix_concat_backward. Everything is a copy but the sum of a prompt
// row's gradient over the batch, in float32 and in the batch's order; prompts are rounded once to the dtype of the result.
//
//     forward     one launch; a block writes some columns of one row of the batch
//                 count    the row's real tokens; and, in a row without padding, whether another row is padded on the left
//                 place    where each column comes from; its mask, position, label and source are written
//                 copy     a warp a column
//     backward    prompts  a block sums a slice of one prompt row over the rows of the batch that have it
//                 embeds   a warp a column, to its token
//
// Numbers that come from the card's memory (prompt_index, ids, starts, source) are checked where they are used: one that is out of range gives NaN,
// or nothing, and is never an address.
#include "prefix_concat.h"

#include <type_traits>

#include "launch.h"

namespace fastlora {
namespace {

constexpr int WARP = 32;
constexpr unsigned ALL = 0xFFFFFFFF;

__device__ float to_float(float value) { return value; }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ void round_to(float& to, float value) { to = value; }
__device__ void round_to(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }
__device__ void round_to(__half& to, float value) { to = __float2half_rn(value); }

__device__ float2 read_pair(const float* at) { return make_float2(at[0], at[1]); }
__device__ float2 read_pair(const __nv_bfloat16* at) { return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(at)); }
__device__ float2 read_pair(const __half* at) { return __half22float2(*reinterpret_cast<const __half2*>(at)); }
__device__ void round_pair(float* to, float2 pair) { to[0] = pair.x, to[1] = pair.y; }
__device__ void round_pair(__nv_bfloat16* to, float2 pair) { *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(pair.x, pair.y); }
__device__ void round_pair(__half* to, float2 pair) { *reinterpret_cast<__half2*>(to) = __floats2half2_rn(pair.x, pair.y); }

template <int BYTES>
using PartOf = std::conditional_t<BYTES % 16 == 0, uint4, std::conditional_t<BYTES % 8 == 0, uint2, std::conditional_t<BYTES == 4, float, uint16_t>>>;

/// COUNT numbers side by side in memory, at a multiple of their bytes or of 16, read and written in parts as wide as can be.
template <class T, int COUNT>
struct Pack {
  using Part = PartOf<COUNT * sizeof(T)>;
  static constexpr int PARTS = COUNT * sizeof(T) / sizeof(Part);
  Part parts[PARTS];

  __device__ T* at(int i) { return reinterpret_cast<T*>(parts) + i; }
  __device__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < PARTS; ++i) parts[i] = reinterpret_cast<const Part*>(from)[i];
  }
  __device__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < PARTS; ++i) reinterpret_cast<Part*>(to)[i] = parts[i];
  }
};

template <class T>
constexpr int PACKED = 16 / sizeof(T);  // in a pack of the result
constexpr int IN_FLIGHT = 4;            // packs that a thread loads before it stores the first

template <class T>
__device__ Pack<T, PACKED<T>> convert(const Pack<T, PACKED<T>>& from, T) {
  return from;
}

template <class To, class From>
__device__ Pack<To, PACKED<To>> convert(Pack<From, PACKED<To>> from, To) {
  Pack<To, PACKED<To>> to;
#pragma unroll
  for (int i = 0; i < PACKED<To>; i += 2) round_pair(to.at(i), read_pair(from.at(i)));
  return to;
}

/// A warp copies D numbers, which lie side by side and begin where a pack may (packed), or `stride` apart.
template <class To, class From>
__device__ void copy_row(To* to, const From* from, int64_t stride, int64_t D, bool packed, int lane) {
  constexpr int COUNT = PACKED<To>, STEP = WARP * COUNT;
  if (packed) {
#pragma unroll 1
    for (int64_t first = lane * COUNT; first < D; first += IN_FLIGHT * STEP) {
      Pack<From, COUNT> packs[IN_FLIGHT];
#pragma unroll
      for (int i = 0; i < IN_FLIGHT; ++i) {
        packs[i].load(from + min(first + i * STEP, D - COUNT));  // at worst the last pack again: a branch would cost registers
      }
#pragma unroll
      for (int i = 0; i < IN_FLIGHT; ++i) {
        if (first + i * STEP < D) convert(packs[i], To()).store(to + first + i * STEP);
      }
    }
  } else {
#pragma unroll 1
    for (int64_t d = lane; d < D; d += WARP) round_to(to[d], to_float(from[d * stride]));
  }
}

/// A warp writes one value D times.
template <class T>
__device__ void fill_row(T* to, float value, int64_t D, bool packed, int lane) {
  if (packed) {
    Pack<T, PACKED<T>> pack;
#pragma unroll
    for (int i = 0; i < PACKED<T>; i += 2) round_pair(pack.at(i), make_float2(value, value));
#pragma unroll 4
    for (int64_t d = lane * PACKED<T>; d < D; d += WARP * PACKED<T>) pack.store(to + d);
  } else {
#pragma unroll 1
    for (int64_t d = lane; d < D; d += WARP) round_to(to[d], value);
  }
}

// ---- forward

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int MOST_COLUMNS = WARP;  // a block: one lane places one

struct Packed {  // which rows can be read, or written, in packs
  bool prompts, tokens, out;
};

enum class Origin { NOTHING, NOWHERE, PROMPT, TOKEN };  // zeros, NaN, or a row of a table

// One load under a predicate, no branches: a loop can have several in flight.
__device__ uint64_t mask_at(const PrefixConcat& given, int64_t b, int64_t t) {
  const char* const at = static_cast<const char*>(given.mask) + b * given.mask_steps[0] + t * given.mask_steps[1];
  uint64_t bits = 0;
  if (given.mask_bytes == 1) bits = *reinterpret_cast<const uint8_t*>(at);
  if (given.mask_bytes == 2) bits = *reinterpret_cast<const uint16_t*>(at);
  if (given.mask_bytes == 4) bits = *reinterpret_cast<const uint32_t*>(at);
  if (given.mask_bytes == 8) bits = *reinterpret_cast<const uint64_t*>(at);
  return bits;
}

__device__ void set_mask(const PrefixConcat& given, int64_t i, uint64_t bits) {
  switch (given.mask_bytes) {
    case 1: static_cast<uint8_t*>(given.new_mask)[i] = static_cast<uint8_t>(bits); break;
    case 2: static_cast<uint16_t*>(given.new_mask)[i] = static_cast<uint16_t>(bits); break;
    case 4: static_cast<uint32_t*>(given.new_mask)[i] = static_cast<uint32_t>(bits); break;
    default: static_cast<uint64_t*>(given.new_mask)[i] = bits;
  }
}

__device__ bool is_real(const PrefixConcat& given, int64_t b, int64_t t) { return (mask_at(given, b, t) & given.mask_nonzero) != 0; }

/// Whether any of the rows that the warp looks at is padded on the left: it has tokens, but none in column 0.
__device__ bool finds_padded_left(const PrefixConcat& given, int warp, int lane) {
  if (given.T == 0) return false;
#pragma unroll 1
  for (int64_t first = warp * WARP; first < given.B; first += THREADS) {
    const int64_t row = first + lane;
    unsigned suspects = __ballot_sync(ALL, row < given.B && !is_real(given, row, 0));
#pragma unroll 1
    for (; suspects; suspects &= suspects - 1) {
      const int64_t suspect = first + __ffs(suspects) - 1;
#pragma unroll 1
      for (int64_t end = given.T; end > 0; end -= WARP) {  // from the right, where its tokens are
        const int64_t t = end - 1 - lane;
        if (__any_sync(ALL, t >= 0 && is_real(given, suspect, t))) return true;
      }
    }
  }
  return false;
}

template <class T>
__device__ void copy_prompt(const PrefixConcat& given, T* to, int64_t row, bool packed, int lane) {
  const int64_t begin = row * given.prompts_strides[0], stride = given.prompts_strides[1];
  switch (given.prompts_dtype) {
    case Dtype::FLOAT32: copy_row(to, static_cast<const float*>(given.prompts) + begin, stride, given.D, packed, lane); break;
    case Dtype::BFLOAT16: copy_row(to, static_cast<const __nv_bfloat16*>(given.prompts) + begin, stride, given.D, packed, lane); break;
    case Dtype::FLOAT16: copy_row(to, static_cast<const __half*>(given.prompts) + begin, stride, given.D, packed, lane); break;
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 4)
prefix_concat_kernel(const __grid_constant__ PrefixConcat given, const Packed packed, const unsigned slices, const int columns) {
  __shared__ int64_t counts[WARPS];           // real tokens in each warp's stretch of the row
  __shared__ int64_t token_of[MOST_COLUMNS];  // t, in the columns of tokens
  __shared__ int64_t row_of[MOST_COLUMNS];    // the place of the table's row
  __shared__ Origin origin_of[MOST_COLUMNS];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t b = blockIdx.x / slices, first_column = int64_t(blockIdx.x % slices) * columns;

  // Count.
  const int64_t stretch = (given.T + THREADS - 1) / THREADS * WARP;
  const int64_t t_begin = warp * stretch, t_end = min(given.T, t_begin + stretch);
  int64_t count = 0;
#pragma unroll 4
  for (int64_t t = t_begin + lane; t < t_end; t += WARP) count += is_real(given, b, t);
#pragma unroll
  for (int other = WARP / 2; other > 0; other /= 2) count += __shfl_xor_sync(ALL, count, other);
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  int64_t tokens = 0, before = 0;  // of the row; of the warps before this one
  for (int i = 0; i < WARPS; ++i) {
    if (i == warp) before = tokens;
    tokens += counts[i];
  }
  const int64_t prompt = min(max(given.prompt_index[b], int64_t(0)), given.S - 1);
  const int64_t start = min(max(given.starts[prompt], int64_t(0)), given.prompt_rows);
  const int64_t stop = min(max(given.starts[prompt + 1], start), given.prompt_rows);
  const int64_t length = min(stop - start, given.W - given.T);
  bool left = tokens > 0 && !is_real(given, b, 0);
  if (tokens == 0 || tokens == given.T) left = __syncthreads_or(finds_padded_left(given, warp, lane));
  const int64_t begin = left ? given.W - length - tokens : 0;

  // Place.
  const int64_t first_rank = first_column - begin - length;  // of the token in the block's first column, if that were a token's
  if (before < first_rank + columns && before + count > first_rank) {
    int64_t rank = before;
#pragma unroll 1
    for (int64_t t = t_begin; t < t_end; t += WARP) {
      const bool real = t + lane < t_end && is_real(given, b, t + lane);
      const unsigned votes = __ballot_sync(ALL, real);
      const int64_t column = rank + __popc(votes & ((1u << lane) - 1)) - first_rank;
      if (real && column >= 0 && column < columns) token_of[column] = t + lane;
      rank += __popc(votes);
    }
  }
  __syncthreads();
  const int64_t w = first_column + threadIdx.x;
  if (threadIdx.x < columns && w < given.W) {
    const int64_t i = b * given.W + w, k = w - begin;  // k: place within the row's own content
    int64_t source = -1, position = 0, label = -100, row = 0;
    uint64_t mask = 0;
    Origin origin = Origin::NOTHING;
    if (k >= 0 && k < length) {
      source = row = start + k;
      position = k;
      mask = given.mask_one;
      const bool exists = prompt == given.prompt_index[b] && start == given.starts[prompt] && start + length == given.starts[prompt + 1];
      origin = exists ? Origin::PROMPT : Origin::NOWHERE;
    } else if (k >= 0 && k < length + tokens) {
      const int64_t t = token_of[threadIdx.x];
      source = given.prompt_rows + b * given.T + t;
      position = given.positions ? given.positions[b * given.positions_strides[0] + t * given.positions_strides[1]] + length : k;
      if (given.labels) label = given.labels[b * given.labels_strides[0] + t * given.labels_strides[1]];
      mask = mask_at(given, b, t);
      origin = Origin::TOKEN;
      if (given.ids) {
        const int64_t id = given.ids[b * given.ids_strides[0] + t * given.ids_strides[1]];
        if (id >= 0 && id < given.table_rows) row = id * given.tokens_strides[1];
        else origin = Origin::NOWHERE;
      } else {
        row = b * given.tokens_strides[0] + t * given.tokens_strides[1];
      }
    }
    given.source[i] = source;
    given.new_positions[i] = position;
    if (given.new_labels) given.new_labels[i] = label;
    set_mask(given, i, mask);
    row_of[threadIdx.x] = row;
    origin_of[threadIdx.x] = origin;
  }
  __syncthreads();

  // Copy.
  for (int column = warp; column < columns && first_column + column < given.W; column += WARPS) {
    T* const to = static_cast<T*>(given.out) + (b * given.W + first_column + column) * given.D;
    const int64_t row = row_of[column];
    switch (origin_of[column]) {
      case Origin::NOTHING: fill_row(to, 0.0f, given.D, packed.out, lane); break;
      case Origin::NOWHERE: fill_row(to, __uint_as_float(0x7FC00000), given.D, packed.out, lane); break;
      case Origin::PROMPT: copy_prompt(given, to, row, packed.prompts, lane); break;
      case Origin::TOKEN: copy_row(to, static_cast<const T*>(given.tokens) + row, given.tokens_strides[2], given.D, packed.tokens, lane);
    }
  }
}

// ---- backward

constexpr int SUM_THREADS = 128, SUM_WARPS = SUM_THREADS / WARP;

/// The column of row b to which prompt row j was copied, or -1.
__device__ int64_t column_of(const PrefixConcatBackward& given, int64_t b, int64_t j) {
  const int64_t* const source = given.source + b * given.W;
  int64_t begin = 0, end = given.W;  // of the columns among which the row's content begins: it is one run, and padding is on one side of it
  if (source[0] < 0) {
    while (begin < end) {
      const int64_t middle = (begin + end) / 2;
      if (source[middle] < 0) begin = middle + 1;
      else end = middle;
    }
  }
  if (begin == given.W) return -1;
  const int64_t start = source[begin];
  if (j < start || j - start >= given.W - begin) return -1;
  const int64_t column = begin + (j - start);
  return source[column] == j ? column : -1;
}

/// Each thread sums COUNT neighbouring columns of dout's prompt rows.
template <class T, int COUNT>
__global__ void __launch_bounds__(SUM_THREADS) prefix_concat_prompts_kernel(const __grid_constant__ PrefixConcatBackward given, const unsigned slices) {
  __shared__ int64_t rows[SUM_THREADS];  // where the rows to be summed begin in dout, in the batch's order
  __shared__ int counts[SUM_WARPS];      // of the batch rows that each warp looks at, those with this prompt row
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t j = blockIdx.x / slices, d = (int64_t(blockIdx.x % slices) * SUM_THREADS + threadIdx.x) * COUNT;
  const T* const dout = static_cast<const T*>(given.dout) + (COUNT == 1 ? d * given.dout_strides[2] : d);
  float total[COUNT] = {};
  for (int64_t first = 0; first < given.B; first += SUM_THREADS) {
    const int64_t b = first + threadIdx.x, column = b < given.B ? column_of(given, b, j) : -1;
    const unsigned votes = __ballot_sync(ALL, column >= 0);
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << lane) - 1)), found = 0;
    for (int i = 0; i < SUM_WARPS; ++i) {
      if (i < warp) before += counts[i];
      found += counts[i];
    }
    if (column >= 0) rows[before] = b * given.dout_strides[0] + column * given.dout_strides[1];
    __syncthreads();
    if (d < given.D) {
#pragma unroll 4
      for (int i = 0; i < found; ++i) {
        Pack<T, COUNT> pack;
        pack.load(dout + rows[i]);
#pragma unroll
        for (int c = 0; c < COUNT; ++c) total[c] += to_float(*pack.at(c));
      }
    }  // the next step writes rows behind a barrier, and counts that nobody reads any more
  }
  if (d >= given.D) return;
  float* const to = given.dprompts + j * given.D + d;
#pragma unroll
  for (int c = 0; c < COUNT; ++c) to[c] = total[c];
}

template <class T>
__global__ void __launch_bounds__(THREADS) prefix_concat_embeds_kernel(const __grid_constant__ PrefixConcatBackward given, const bool packed) {
  const int lane = threadIdx.x % WARP;
  const int64_t i = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (i >= given.B * given.W) return;
  const int64_t token = given.source[i] - given.prompt_rows;
  if (token < 0 || token >= given.B * given.T) return;
  const T* const from = static_cast<const T*>(given.dout) + i / given.W * given.dout_strides[0] + i % given.W * given.dout_strides[1];
  copy_row(static_cast<T*>(given.dembeds) + token * given.D, from, given.dout_strides[2], given.D, packed, lane);
}

// ---- launches

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::FLOAT32 ? 4 : 2; }

/// Whether rows that begin at multiples of the strides, the last of which is a row's own, can be read in packs of `count`.
template <size_t DIMS>
bool in_packs(const void* data, const int64_t (&strides)[DIMS], int64_t D, Dtype dtype, int64_t count) {
  const int64_t bytes = min(count * bytes_of(dtype), int64_t(16));
  bool fits = strides[DIMS - 1] == 1 && D % count == 0 && reinterpret_cast<uintptr_t>(data) % bytes == 0;
  for (size_t i = 0; i + 1 < DIMS; ++i) fits = fits && strides[i] * bytes_of(dtype) % bytes == 0;
  return fits;
}

const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T>
void launch_forward(const PrefixConcat& given, cudaStream_t stream) {
  const Packed packed{
      in_packs(given.prompts, given.prompts_strides, given.D, given.prompts_dtype, PACKED<T>),
      in_packs(given.tokens, given.tokens_strides, given.D, given.dtype, PACKED<T>), given.D % PACKED<T> == 0};
  // A block reads the mask of a whole row: the more columns it writes the better, as long as there are blocks for every multiprocessor.
  const int columns = given.B * given.W >= 16384 ? MOST_COLUMNS : WARPS;
  const int64_t slices = (given.W + columns - 1) / columns;
  const unsigned blocks = static_cast<unsigned>(given.B * slices);
  launch(prefix_concat_kernel<T>, blocks, THREADS, 0, stream, given, packed, static_cast<unsigned>(slices), columns);
}

template <class T, int COUNT>
void launch_prompts(const PrefixConcatBackward& given, cudaStream_t stream) {
  const int64_t slices = (given.D + SUM_THREADS * COUNT - 1) / (SUM_THREADS * COUNT);
  const unsigned blocks = static_cast<unsigned>(given.prompt_rows * slices);
  launch(prefix_concat_prompts_kernel<T, COUNT>, blocks, SUM_THREADS, 0, stream, given, static_cast<unsigned>(slices));
}

template <class T>
void launch_backward(const PrefixConcatBackward& given, cudaStream_t stream) {
  const bool packed = in_packs(given.dout, given.dout_strides, given.D, given.dtype, PACKED<T>);
  if (given.dprompts && given.prompt_rows * given.D > 0) {
    packed ? launch_prompts<T, PACKED<T>>(given, stream) : launch_prompts<T, 1>(given, stream);
  }
  if (given.dembeds && given.B * given.W * given.D > 0) {
    const int64_t blocks = (given.B * given.W + WARPS - 1) / WARPS;
    launch(prefix_concat_embeds_kernel<T>, static_cast<unsigned>(blocks), THREADS, 0, stream, given, packed);
  }
}

}  // namespace

const char* prefix_concat(const PrefixConcat& given, cudaStream_t stream) {
  if (given.B * given.W == 0) return nullptr;
  switch (given.dtype) {
    case Dtype::FLOAT32: launch_forward<float>(given, stream); break;
    case Dtype::BFLOAT16: launch_forward<__nv_bfloat16>(given, stream); break;
    case Dtype::FLOAT16: launch_forward<__half>(given, stream); break;
  }
  return launched();
}

const char* prefix_concat_backward(const PrefixConcatBackward& given, cudaStream_t stream) {
  switch (given.dtype) {
    case Dtype::FLOAT32: launch_backward<float>(given, stream); break;
    case Dtype::BFLOAT16: launch_backward<__nv_bfloat16>(given, stream); break;
    case Dtype::FLOAT16: launch_backward<__half>(given, stream); break;
  }
  return launched();
}

}  // namespace fastlora

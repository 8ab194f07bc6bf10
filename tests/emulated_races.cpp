// Small calls of csrc/cuda's kernels for races.py, which looks for races in them. Together they reach every place that orders memory accesses, each
// queue is filled more often than it is long, and a block has more than one tile.
#include <cstring>
#include <deque>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/lora_linear.h"
#include "cuda/multi_lora.h"
#include "cuda/prefix_concat.h"
#include "emulated_cuda.h"

using namespace fastlora;

extern "C" void emulated_capability(int capability);
extern "C" void emulated_device(int device);

namespace {

using BF16 = c10::BFloat16;

/// The card's memory of one call, each piece at a multiple of 256 bytes.
class Memory {
  std::deque<std::vector<unsigned char>> pieces;
  uint32_t state = 1;

 public:
  uint64_t written = 1469598103934665603u;  // of what was asked about

  template <class T>
  T* room(int64_t count) {
    std::vector<unsigned char>& piece = pieces.emplace_back(count * sizeof(T) + 512, 0xFF);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(piece.data()) + 255) / 256 * 256);
  }
  /// Small numbers, never twice the same series.
  template <class T>
  T* numbers(int64_t count) {
    T* const to = room<T>(count);
    for (int64_t i = 0; i < count; ++i) {
      state = state * 1664525 + 1013904223;
      to[i] = static_cast<T>(static_cast<float>(static_cast<int>(state >> 24) - 128) / 128);
    }
    return to;
  }
  /// What the call has written there is part of its result.
  void ask(const void* at, int64_t bytes) {
    for (int64_t i = 0; i < bytes; ++i) written = (written ^ static_cast<const unsigned char*>(at)[i]) * 1099511628211u;
  }
};

struct Sizes {
  int64_t M, K, N, R;
  bool by_column = false, drops = true, adds = false;
};

int64_t keep_bytes(int64_t columns) { return (columns + 63) / 64 * 8; }

LoraLinear layer_of(Memory& memory, const Sizes& sizes) {
  const auto [M, K, N, R, by_column, drops, adds] = sizes;
  const BF16* const weight = memory.numbers<BF16>(N * K);
  LoraLinear layer{M, K, N, R, Dtype::BFLOAT16, Dtype::FLOAT32, {}, {}, {}, {}, nullptr, 1, 1.5, drops ? 0.25 : 0};
  layer.x = {memory.numbers<BF16>(M * K), {K, 1}};
  layer.weight = {weight, {by_column ? 1 : K, by_column ? N : 1}};
  layer.lora_a = {memory.numbers<float>(R * K), {K, 1}};
  layer.lora_b = {memory.numbers<float>(N * R), {R, 1}};
  layer.bias = memory.numbers<BF16>(N);
  return layer;
}

std::string forward(Memory& memory, const Sizes& sizes) {
  const LoraLinear layer = layer_of(memory, sizes);
  int64_t* const seed = memory.room<int64_t>(1);
  *seed = 3;
  const int64_t bytes = sizes.M * keep_bytes(sizes.K);
  LoraLinearForward given{layer, sizes.drops ? seed : nullptr, memory.room<BF16>(sizes.M * sizes.N), memory.room<float>(sizes.M * sizes.R), sizes.R,
                          sizes.drops ? memory.room<uint8_t>(bytes) : nullptr, memory.room<char>(lora_linear_workspace(layer))};
  const std::string said = lora_linear(given, nullptr);
  memory.ask(given.y, sizes.M * sizes.N * 2);
  memory.ask(given.xa, sizes.M * sizes.R * 4);
  if (given.keep) memory.ask(given.keep, bytes);
  return said;
}

std::string backward(Memory& memory, const Sizes& sizes) {
  const LoraLinear layer = layer_of(memory, sizes);
  const auto [M, K, N, R, by_column, drops, adds] = sizes;
  const Matrix dy{memory.numbers<BF16>(M * N), {N, 1}};
  uint8_t* const keep = memory.numbers<uint8_t>(M * keep_bytes(K));
  LoraLinearBackward given{layer, dy, memory.numbers<float>(M * R), R, drops ? keep : nullptr, memory.numbers<BF16>(M * K), adds,
                           memory.room<float>(R * K), memory.room<float>(N * R), memory.room<char>(lora_linear_backward_workspace(layer))};
  const std::string said = lora_linear_backward(given, nullptr);
  memory.ask(given.dx, M * K * 2);
  memory.ask(given.da, R * K * 4);
  memory.ask(given.db, N * R * 4);
  return said;
}

/// Rows of the base alone, a whole tile's too, of two adapters of different ranks, of both among one another, and of an adapter that does not exist.
MultiLora layer_of(Memory& memory, const Sizes& sizes, std::deque<LoraAdapter>& adapters) {
  const auto [M, K, N, R, by_column, drops, adds] = sizes;
  adapters.clear();
  for (const int64_t rank : {R, R / 2 + 1}) {
    adapters.push_back({memory.numbers<float>(rank * K), memory.numbers<float>(N * rank), {K, 1}, {rank, 1}, rank, 1.5, drops && rank == R ? 0.25 : 0});
  }
  std::vector<std::vector<int64_t>> groups(4);
  for (int64_t row = 0; row < M; ++row) groups[row == 3 ? 3 : row % 16 == 1 || row >= 128 ? 0 : row < M / 2 ? 1 : 1 + row % 2].push_back(row);
  int64_t *const order = memory.room<int64_t>(M), *const offsets = memory.room<int64_t>(5);
  int64_t place = 0;
  offsets[0] = 0;
  for (size_t group = 0; group < groups.size(); ++group) {
    for (const int64_t row : groups[group]) order[place++] = row;
    offsets[group + 1] = place;
  }
  return {M, K, N, 2, R, Dtype::BFLOAT16, Dtype::FLOAT32, memory.numbers<BF16>(M * K), K, memory.numbers<BF16>(N * K), by_column ? N : K, by_column,
          nullptr, order, offsets};
}

std::string multi_forward(Memory& memory, const Sizes& sizes) {
  std::deque<LoraAdapter> adapters;
  MultiLora layer = layer_of(memory, sizes, adapters);
  const std::vector<LoraAdapter> side_by_side(adapters.begin(), adapters.end());
  layer.adapters = side_by_side.data();
  int64_t* const seed = memory.room<int64_t>(1);
  *seed = 3;
  const int64_t bytes = sizes.M * keep_bytes(sizes.K);
  MultiLoraForward given{layer, memory.numbers<BF16>(sizes.N), 1, sizes.drops ? seed : nullptr, memory.room<BF16>(sizes.M * sizes.N),
                         memory.room<float>(sizes.M * sizes.R), sizes.drops ? memory.room<uint8_t>(bytes) : nullptr,
                         memory.room<char>(multi_lora_workspace(layer))};
  const std::string said = multi_lora(given, nullptr);
  memory.ask(given.y, sizes.M * sizes.N * 2);
  memory.ask(given.xa, sizes.M * sizes.R * 4);
  if (given.keep) memory.ask(given.keep, bytes);
  return said;
}

std::string multi_backward(Memory& memory, const Sizes& sizes) {
  std::deque<LoraAdapter> adapters;
  MultiLora layer = layer_of(memory, sizes, adapters);
  const std::vector<LoraAdapter> side_by_side(adapters.begin(), adapters.end());
  layer.adapters = side_by_side.data();
  int64_t ranks = 0;
  for (const LoraAdapter& adapter : adapters) ranks += adapter.R;
  const auto [M, K, N, R, by_column, drops, adds] = sizes;
  uint8_t* const keep = memory.numbers<uint8_t>(M * keep_bytes(K));
  MultiLoraBackward given{layer, memory.numbers<BF16>(M * N), N, memory.numbers<float>(M * R), drops ? keep : nullptr, memory.room<BF16>(M * K),
                          memory.room<float>(ranks * K), memory.room<float>(N * ranks), memory.room<char>(multi_lora_backward_workspace(layer))};
  const std::string said = multi_lora_backward(given, nullptr);
  memory.ask(given.dx, M * K * 2);
  memory.ask(given.da, ranks * K * 4);
  memory.ask(given.db, ranks * N * 4);
  return said;
}

// Rows of T tokens behind prompts of one and two rows, in turn.
constexpr int64_t T = 3, PROMPT_ROWS = 3, W = T + 2, D = 8;

std::string prefix_forward(Memory& memory) {
  constexpr int64_t B = 36, S = 2;  // more than a warp looks at
  uint8_t* const mask = memory.room<uint8_t>(B * T);
  for (int64_t i = 0; i < B * T; ++i) mask[i] = i != 33 * T;  // one row is padded, on the left
  int64_t *const index = memory.room<int64_t>(B), *const starts = memory.room<int64_t>(S + 1);
  for (int64_t b = 0; b < B; ++b) index[b] = b % S;
  starts[0] = 0, starts[1] = 1, starts[2] = PROMPT_ROWS;
  PrefixConcat given{};
  given.B = B, given.T = T, given.S = S, given.D = D, given.W = W, given.prompt_rows = PROMPT_ROWS;
  given.dtype = given.prompts_dtype = Dtype::FLOAT32;
  given.prompts = memory.numbers<float>(PROMPT_ROWS * D), given.prompts_strides[0] = D, given.prompts_strides[1] = 1;
  given.tokens = memory.numbers<float>(B * T * D), given.tokens_strides[0] = T * D, given.tokens_strides[1] = D, given.tokens_strides[2] = 1;
  given.prompt_index = index, given.starts = starts;
  given.mask = mask, given.mask_steps[0] = T, given.mask_steps[1] = 1, given.mask_bytes = 1, given.mask_one = 1, given.mask_nonzero = 0xFF;
  given.out = memory.room<float>(B * W * D), given.new_mask = memory.room<uint8_t>(B * W);
  given.new_positions = memory.room<int64_t>(B * W), given.source = memory.room<int64_t>(B * W);
  const char* const said = prefix_concat(given, nullptr);
  memory.ask(given.out, B * W * D * 4);
  memory.ask(given.new_mask, B * W);
  memory.ask(given.source, B * W * 8);
  return said ? said : "";
}

std::string prefix_backward(Memory& memory) {
  constexpr int64_t B = 131;  // more than a block looks at in one step
  int64_t* const source = memory.room<int64_t>(B * W);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t length = 1 + b % 2;
    for (int64_t k = 0; k < W; ++k) source[b * W + k] = k < length ? b % 2 + k : k < length + T ? PROMPT_ROWS + b * T + k - length : -1;
  }
  PrefixConcatBackward given{};
  given.B = B, given.T = T, given.D = D, given.W = W, given.prompt_rows = PROMPT_ROWS, given.dtype = Dtype::FLOAT32;
  given.dout = memory.numbers<float>(B * W * D);
  given.dout_strides[0] = W * D, given.dout_strides[1] = D, given.dout_strides[2] = 1;
  given.source = source;
  given.dprompts = memory.room<float>(PROMPT_ROWS * D), given.dembeds = memory.numbers<float>(B * T * D);
  const char* const said = prefix_concat_backward(given, nullptr);
  memory.ask(given.dprompts, PROMPT_ROWS * D * 4);
  memory.ask(given.dembeds, B * T * D * 4);
  return said ? said : "";
}

struct Scenario {
  const char* name;
  int capability;
  std::string (*run)(Memory&);
};

const Scenario SCENARIOS[] = {
    {"lora_linear, sm_90", 90, [](Memory& memory) { return forward(memory, {140, 136, 264, 4}); }},
    {"lora_linear, sm_90, rank 40, by column", 90, [](Memory& memory) { return forward(memory, {20, 136, 776, 40, true}); }},
    {"lora_linear_backward, sm_90", 90, [](Memory& memory) { return backward(memory, {140, 264, 136, 4, false, true, true}); }},
    {"lora_linear_backward, sm_90, rank 40", 90, [](Memory& memory) { return backward(memory, {20, 776, 136, 40, true, false}); }},
    {"multi_lora, sm_90", 90, [](Memory& memory) { return multi_forward(memory, {140, 136, 264, 4}); }},
    {"multi_lora_backward, sm_90", 90, [](Memory& memory) { return multi_backward(memory, {140, 264, 136, 40}); }},
    {"lora_linear, sm_80", 80, [](Memory& memory) { return forward(memory, {40, 200, 136, 4}); }},
    {"lora_linear, sm_80, rank 40, by column", 80, [](Memory& memory) { return forward(memory, {40, 200, 136, 40, true}); }},
    {"lora_linear_backward, sm_80, rank 40", 80, [](Memory& memory) { return backward(memory, {130, 136, 200, 40, false, true, true}); }},
    {"multi_lora, sm_80", 80, [](Memory& memory) { return multi_forward(memory, {80, 200, 136, 4}); }},
    {"multi_lora_backward, sm_80", 80, [](Memory& memory) { return multi_backward(memory, {80, 136, 200, 4}); }},
    {"multi_lora, 5 rows", 80, [](Memory& memory) { return multi_forward(memory, {5, 1104, 40, 4}); }},
    {"multi_lora, 40 rows, by column", 80, [](Memory& memory) { return multi_forward(memory, {40, 1104, 72, 4, true}); }},
    {"prefix_concat", 80, prefix_forward},
    {"prefix_concat_backward", 80, prefix_backward},
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {
/// The name of a scenario, or null.
const char* race_scenario(int number) { return number < static_cast<int>(std::size(SCENARIOS)) ? SCENARIOS[number].name : nullptr; }

/// What went wrong, or nothing; and what the call has written, in a number.
const char* race_run(int number, int descending, uint64_t* written) {
  static std::string said;
  emulated_capability(SCENARIOS[number].capability);
  emulated::descending = descending != 0;
  emulated::together = SCENARIOS[number].capability == 90 ? 2 : 1;  // blocks that share their thin products
  emulated::order::forget_all();
  Memory memory;
  try {
    said = SCENARIOS[number].run(memory);
  } catch (const std::exception& error) {
    said = error.what();
  }
  *written = memory.written;
  return said.c_str();
}
}
#pragma GCC visibility pop

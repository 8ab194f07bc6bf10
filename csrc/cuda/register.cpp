// The operators on a card: what Python hands over is checked, the results are allocated, and the kernels of <stem>.cu are launched on the current
// stream of the tensors' device. torch's stable ABI and no CUDA header: one binary loads into CPU and CUDA builds of torch. Numbers in the card's
// memory are not looked at here, which would wait for the card; the kernels check them where they use them.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <bit>
#include <optional>
#include <tuple>
#include <vector>

#include "../check.h"
#include "lora_linear.h"
#include "multi_lora.h"
#include "prefix_concat.h"

#ifdef FASTLORA_EMULATED  // the tests' library: tensors on the CPU
#define FASTLORA_CARD CPU
#else
#define FASTLORA_CARD CUDA
// In libtorch_cuda; weak, so that a torch without it can load this file.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));
#endif

namespace fastlora {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

/// While it lives a tensor's device is the current one.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor)
#ifdef FASTLORA_EMULATED
  {
    check_cpu(tensor, "emulated");
  }
  cudaStream_t stream() const { return nullptr; }
#else
      : index(tensor.get_device_index()), guard(index) {
  }
  cudaStream_t stream() const {
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index, &stream) == 0, "device ", index, " has no current stream");
    return static_cast<cudaStream_t>(stream);
  }

 private:
  torch::stable::accelerator::DeviceIndex index;
  torch::stable::accelerator::DeviceGuard guard;
#endif
};

void check_launch(const char* operator_name, const char* error) {
  STD_TORCH_CHECK(error == nullptr, operator_name, ": CUDA says: ", error);
}

/// That a tensor is on the card of `like`.
void check_device(const Tensor& tensor, const char* name, const Tensor& like) {
#ifndef FASTLORA_EMULATED
  STD_TORCH_CHECK(tensor.is_cuda(), name, ": got a tensor on another device, expected one on a CUDA card");
#endif
  STD_TORCH_CHECK(
      tensor.is_cpu() == like.is_cpu() && tensor.get_device_index() == like.get_device_index(), name, ": got a tensor on device ",
      tensor.get_device_index(), ", expected one on device ", like.get_device_index(), " as the other tensors");
}

constexpr std::initializer_list<ScalarType> FLOATS = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

void check_floats(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes, const Tensor& like) {
  check_device(tensor, name, like);
  check_shape(tensor, name, sizes);
  check_dtype(tensor, name, FLOATS);
}

void check_integers(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes, const Tensor& like) {
  check_device(tensor, name, like);
  check_shape(tensor, name, sizes);
  check_dtype(tensor, name, {ScalarType::Long});
}

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::BFLOAT16;
    case ScalarType::Half: return Dtype::FLOAT16;
    default: return Dtype::FLOAT32;
  }
}

template <size_t DIMS>
void copy_strides(const Tensor& tensor, int64_t (&strides)[DIMS]) {
  for (size_t i = 0; i < DIMS; ++i) strides[i] = tensor.stride(i);
}

Tensor without_elements(const Tensor& like) { return new_empty(like, std::array<int64_t, 1>{0}); }

// ---- prefix_concat

/// How the kernels read a mask of this dtype: which bits make a number other than 0, and the bits of 1. A sign does not: -0 is 0.
std::tuple<uint64_t, uint64_t> mask_bits(const Tensor& mask) {
  switch (mask.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long: return {~uint64_t(0), 1};
    case ScalarType::Half: return {0x7FFF, 0x3C00};
    case ScalarType::BFloat16: return {0x7FFF, 0x3F80};
    case ScalarType::Float: return {0x7FFFFFFF, std::bit_cast<uint32_t>(1.0f)};
    case ScalarType::Double: return {~uint64_t(0) >> 1, std::bit_cast<uint64_t>(1.0)};
    default: STD_TORCH_CHECK(false, "attention_mask: got ", describe(mask), ", expected bool, integers or floats");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prefix_concat_cuda(
    const Tensor& prompts,  // [sum P_i, D]
    const Tensor& starts,   // [S + 1]
    int64_t max_prompt,
    const Tensor& prompt_index,                 // [B]
    const std::optional<Tensor>& embeds,        // [B, T, D], or none with the next two
    const std::optional<Tensor>& input_ids,     // [B, T]
    const std::optional<Tensor>& embedding,     // [V, D]
    const Tensor& attention_mask,               // [B, T]
    const std::optional<Tensor>& position_ids,  // [B, T]
    const std::optional<Tensor>& labels) {      // [B, T]
  check_device(attention_mask, "attention_mask", attention_mask);
  check_shape(attention_mask, "attention_mask", {ANY, ANY});
  const Tensor& like = attention_mask;
  const int64_t B = like.size(0), T = like.size(1), W = T + max_prompt;
  STD_TORCH_CHECK(max_prompt >= 0, "max_prompt: got ", max_prompt, ", expected at least 0");
  check_device(prompts, "prompts", like);
  check_shape(prompts, "prompts", {ANY, ANY});
  check_dtype(prompts, "prompts", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
  check_integers(starts, "starts", {ANY}, like);
  STD_TORCH_CHECK(starts.numel() >= 2, "starts: got ", describe(starts), ", expected at least one prompt");
  check_integers(prompt_index, "prompt_index", {B}, like);
  if (embeds) {
    check_floats(*embeds, "embeds", {B, T, ANY}, like);
  } else {
    STD_TORCH_CHECK(input_ids && embedding, "embeds: got none, expected a tensor, or input_ids together with embedding");
    check_integers(*input_ids, "input_ids", {B, T}, like);
    check_floats(*embedding, "embedding", {ANY, ANY}, like);
    STD_TORCH_CHECK(embedding->size(0) >= 1, "embedding: got ", describe(*embedding), ", expected at least one row");
  }
  const Tensor& table = embeds ? *embeds : *embedding;
  const int64_t D = table.size(table.dim() - 1);
  const char* tokens_name = embeds ? "embeds" : "embedding";
  STD_TORCH_CHECK(prompts.size(1) == D, "prompts: got ", describe(prompts), ", expected rows of ", D, " as in ", tokens_name);
  if (position_ids) check_integers(*position_ids, "position_ids", {B, T}, like);
  if (labels) check_integers(*labels, "labels", {B, T}, like);

  const OnDevice device(like);
  const bool narrow = prompts.scalar_type() != ScalarType::Double;
  const Tensor prompt_rows = narrow ? prompts : torch::stable::to(prompts, table.scalar_type());
  const Tensor dense_starts = contiguous(starts), dense_index = contiguous(prompt_index);
  const std::array<int64_t, 2> sizes{B, W};
  Tensor out = new_empty(table, std::array<int64_t, 3>{B, W, D}), new_mask = new_empty(like, sizes);
  Tensor new_positions = new_empty(starts, sizes), source = new_empty(starts, sizes);
  Tensor new_labels = labels ? new_empty(*labels, sizes) : without_elements(starts);

  PrefixConcat given{};
  given.B = B, given.T = T, given.W = W, given.D = D, given.S = starts.numel() - 1;
  given.dtype = dtype_of(table);
  given.prompts = prompt_rows.const_data_ptr();
  given.prompts_dtype = dtype_of(prompt_rows);
  given.prompt_rows = prompt_rows.size(0);
  copy_strides(prompt_rows, given.prompts_strides);
  given.starts = dense_starts.const_data_ptr<int64_t>();
  given.prompt_index = dense_index.const_data_ptr<int64_t>();
  given.tokens = table.const_data_ptr();
  if (embeds) {
    copy_strides(*embeds, given.tokens_strides);
  } else {
    given.tokens_strides[1] = embedding->stride(0);
    given.tokens_strides[2] = embedding->stride(1);
    given.table_rows = embedding->size(0);
    given.ids = input_ids->const_data_ptr<int64_t>();
    copy_strides(*input_ids, given.ids_strides);
  }
  given.mask = like.const_data_ptr();
  given.mask_bytes = static_cast<int>(like.element_size());
  std::tie(given.mask_nonzero, given.mask_one) = mask_bits(like);
  for (int i = 0; i < 2; ++i) given.mask_steps[i] = like.stride(i) * given.mask_bytes;
  if (position_ids) {
    given.positions = position_ids->const_data_ptr<int64_t>();
    copy_strides(*position_ids, given.positions_strides);
  }
  if (labels) {
    given.labels = labels->const_data_ptr<int64_t>();
    copy_strides(*labels, given.labels_strides);
    given.new_labels = new_labels.mutable_data_ptr<int64_t>();
  }
  given.out = out.mutable_data_ptr();
  given.new_mask = new_mask.mutable_data_ptr();
  given.new_positions = new_positions.mutable_data_ptr<int64_t>();
  given.source = source.mutable_data_ptr<int64_t>();
  check_launch("prefix_concat", prefix_concat(given, device.stream()));
  return {out, new_mask, new_positions, new_labels, source};
}

std::tuple<Tensor, Tensor> prefix_concat_backward_cuda(
    const Tensor& dout,    // [B, W, D]
    const Tensor& source,  // [B, W]
    int64_t prompt_rows, int64_t tokens, bool need_prompts, bool need_embeds) {
  check_floats(dout, "dout", {ANY, ANY, ANY}, dout);
  const int64_t B = dout.size(0), W = dout.size(1), D = dout.size(2);
  check_integers(source, "source", {B, W}, dout);
  STD_TORCH_CHECK(prompt_rows >= 0, "prompt_rows: got ", prompt_rows, ", expected at least 0");
  STD_TORCH_CHECK(tokens >= 0, "tokens: got ", tokens, ", expected at least 0");
  const OnDevice device(dout);
  const Tensor dense_source = contiguous(source);
  const std::array<int64_t, 2> prompt_sizes{prompt_rows, D};
  Tensor dprompts = need_prompts ? new_empty(dout, prompt_sizes, ScalarType::Float)
                                 : new_empty(dout, std::array<int64_t, 1>{0}, ScalarType::Float);
  Tensor dembeds = need_embeds ? torch::stable::new_zeros(dout, std::array<int64_t, 3>{B, tokens, D}) : without_elements(dout);
  PrefixConcatBackward given{};
  given.B = B, given.T = tokens, given.W = W, given.D = D, given.prompt_rows = prompt_rows;
  given.dtype = dtype_of(dout);
  given.dout = dout.const_data_ptr();
  copy_strides(dout, given.dout_strides);
  given.source = dense_source.const_data_ptr<int64_t>();
  given.dprompts = need_prompts ? dprompts.mutable_data_ptr<float>() : nullptr;
  given.dembeds = need_embeds ? dembeds.mutable_data_ptr() : nullptr;
  check_launch("prefix_concat_backward", prefix_concat_backward(given, device.stream()));
  return {dprompts, dembeds};
}

/// The matrix with its columns side by side and its rows apart, each at a multiple of 16 bytes, the one that follows a single row too, which
/// kernels may point at: itself where it is so, else a copy.
Tensor rows_of_16_bytes(const Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1), wide = (columns + 7) / 8 * 8;
  const bool together = columns <= 1 || matrix.stride(1) == 1, apart = matrix.stride(0) % 8 == 0 && matrix.stride(0) >= columns;
  if (together && apart && reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0) return matrix;
  Tensor around = new_empty(matrix, std::array<int64_t, 2>{rows, wide});
  Tensor copy = torch::stable::narrow(around, 1, 0, columns);
  torch::stable::copy_(copy, matrix);
  return copy;
}

Matrix matrix_of(const Tensor& tensor) { return {tensor.const_data_ptr(), {tensor.stride(0), tensor.stride(1)}}; }

/// The frozen weight [N, K] as kernels read it, in whole rows or columns of 16 bytes: itself where it lies so, as nn.Linear's does where K is a multiple
/// of 8, and Conv1D's where N is; else a copy, in every call.
Tensor weight_of_16_bytes(const Tensor& weight) {
  const bool by_column = lies_by_column(matrix_of(weight), weight.size(0), weight.size(1)) && weight.stride(1) % 8 == 0;
  return by_column ? weight : rows_of_16_bytes(weight);
}

/// Raises unless x [M, K], weight [N, K] and bias fit together, in 16 bits.
void check_base(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_device(x, "x", x);
  check_shape(x, "x", {ANY, ANY});
  check_dtype(x, "x", {ScalarType::BFloat16, ScalarType::Half});
  check_device(weight, "weight", x);
  check_shape(weight, "weight", {ANY, x.size(1)});
  check_dtype(weight, "weight", {x.scalar_type()});
  if (!bias) return;
  check_device(*bias, "bias", x);
  check_shape(*bias, "bias", {weight.size(0)});
  check_dtype(*bias, "bias", {x.scalar_type()});
}

/// Raises unless lora_a [R, K], lora_b [N, R] and p fit x and weight. `which` stands behind their names.
void check_adapter(
    const Tensor& x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, double dropout_p, ScalarType dtype, const std::string& which) {
  const std::string a = "lora_a" + which, b = "lora_b" + which;
  check_device(lora_a, a.c_str(), x);
  check_shape(lora_a, a.c_str(), {ANY, x.size(1)});
  STD_TORCH_CHECK(lora_a.size(0) >= 1, a, ": got ", describe(lora_a), ", expected a rank of at least 1");
  check_dtype(lora_a, a.c_str(), {x.scalar_type(), ScalarType::Float});
  check_dtype(lora_a, a.c_str(), {dtype});
  check_device(lora_b, b.c_str(), x);
  check_shape(lora_b, b.c_str(), {weight.size(0), lora_a.size(0)});
  check_dtype(lora_b, b.c_str(), {dtype});
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1, "dropout_p", which, ": got ", dropout_p, ", expected a probability between 0 and 1");
}

void check_seed(const std::optional<Tensor>& seed, const Tensor& like, int64_t layers) {
  if (!seed) return;
  check_device(*seed, "seed", like);
  check_dtype(*seed, "seed", {ScalarType::Long});
  STD_TORCH_CHECK(seed->numel() == layers, "seed: got ", describe(*seed), ", expected ", layers, layers == 1 ? " element" : " elements");
}

/// Of a row of keep: fastlora/reference.py::keep_bytes.
int64_t keep_bytes(const Tensor& x) { return (x.size(1) + 63) / 64 * 8; }

/// Raises unless a backward's dy [G][M, N_g], and the xa and keep that its forward left, fit x, the weights and the largest rank.
/// Whether keep has elements.
bool check_saved(
    const std::vector<Tensor>& dy, const Tensor& x, const std::vector<Tensor>& weight, const Tensor& xa, const Tensor& keep, int64_t R) {
  const int64_t M = x.size(0), G = static_cast<int64_t>(weight.size());
  STD_TORCH_CHECK(dy.size() == weight.size(), "dy: got ", dy.size(), " layers, expected ", G);
  for (size_t g = 0; g < dy.size(); ++g) {
    check_device(dy[g], "dy", x);
    check_shape(dy[g], "dy", {M, weight[g].size(0)});
    check_dtype(dy[g], "dy", {x.scalar_type()});
  }
  check_device(xa, "xa", x);
  check_shape(xa, "xa", {G, M, R});
  check_dtype(xa, "xa", {ScalarType::Float});
  check_device(keep, "keep", x);
  check_dtype(keep, "keep", {ScalarType::Byte});
  if (keep.numel() == 0) return false;
  check_shape(keep, "keep", {G, M, keep_bytes(x)});
  return true;
}

/// Whether anything is dropped: fastlora/reference.py::drop_threshold.
bool drops(double dropout_p) { return 65536 * dropout_p + 0.5 >= 1; }

/// Room for dropout's bits of x [M, K] in so many layers; without elements where nothing is dropped.
Tensor new_keep(const Tensor& x, bool dropped, int64_t layers) {
  if (!dropped) return new_empty(x, std::array<int64_t, 1>{0}, ScalarType::Byte);
  return new_empty(x, std::array<int64_t, 3>{layers, x.size(0), keep_bytes(x)}, ScalarType::Byte);
}

Tensor new_workspace(const Tensor& like, int64_t bytes) { return new_empty(like, std::array<int64_t, 1>{bytes}, ScalarType::Byte); }

// ---- lora_linear

/// x in rows of 16 bytes, weight in rows or columns of them.
LoraLinear layer_of(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lora_a, const Tensor& lora_b, double scale,
    double dropout_p) {
  LoraLinear layer{};
  layer.M = x.size(0), layer.K = x.size(1), layer.N = weight.size(0), layer.R = lora_a.size(0);
  layer.dtype = dtype_of(x), layer.adapter_dtype = dtype_of(lora_a);
  layer.x = matrix_of(x), layer.weight = matrix_of(weight);
  layer.lora_a = matrix_of(lora_a), layer.lora_b = matrix_of(lora_b);
  if (bias) layer.bias = bias->const_data_ptr(), layer.bias_stride = bias->stride(0);
  layer.scale = scale, layer.dropout_p = dropout_p;
  return layer;
}

/// A layer, or several that share x [M, K].
struct Layers {
  Tensor x;
  std::vector<Tensor> weight, bias;  // bias: without elements where a layer has none; of a backward, no layers
  std::vector<Tensor> lora_a, lora_b;
  std::vector<double> scale, dropout_p;

  size_t count() const { return weight.size(); }
  std::optional<Tensor> bias_of(size_t layer) const {
    return bias.empty() || bias[layer].numel() == 0 ? std::nullopt : std::optional(bias[layer]);
  }
  int64_t ranks() const {
    int64_t ranks = 0;
    for (const Tensor& a : lora_a) ranks += a.size(0);
    return ranks;
  }
  int64_t most_ranks() const {
    int64_t most = 0;
    for (const Tensor& a : lora_a) most = std::max(most, a.size(0));
    return most;
  }

  void check() const {
    STD_TORCH_CHECK(count() >= 1, "weight: got no layer, expected at least one");
    const std::pair<const char*, size_t> counts[] = {
        {"bias", bias.empty() ? count() : bias.size()}, {"lora_a", lora_a.size()}, {"lora_b", lora_b.size()}, {"scale", scale.size()},
        {"dropout_p", dropout_p.size()}};
    for (const auto& [name, found] : counts) STD_TORCH_CHECK(found == count(), name, ": got ", found, " layers, expected ", count());
    for (size_t i = 0; i < count(); ++i) {
      check_base(x, weight[i], bias_of(i));
      const std::string which = count() > 1 ? "[" + std::to_string(i) + "]" : "";
      check_adapter(x, weight[i], lora_a[i], lora_b[i], dropout_p[i], lora_a[0].scalar_type(), which);
    }
  }
};

/// y of each layer, xa [G, M, max R_i] and keep [G, M, 8 ceil(K / 64)].
std::tuple<std::vector<Tensor>, Tensor, Tensor> forward_layers(const Layers& layers, const std::optional<Tensor>& seed) {
  layers.check();
  const Tensor& x = layers.x;
  const int64_t M = x.size(0), R = layers.most_ranks(), G = static_cast<int64_t>(layers.count());
  check_seed(seed, x, G);
  const OnDevice device(x);
  const Tensor x_rows = rows_of_16_bytes(x);
  const bool dropped = seed && std::any_of(layers.dropout_p.begin(), layers.dropout_p.end(), drops);
  const Tensor seeds = dropped ? contiguous(*seed) : without_elements(x);
  const std::array<int64_t, 3> sizes{G, M, R};  // zeros beyond a layer's own rank
  Tensor xa = layers.ranks() == G * R ? new_empty(x, sizes, ScalarType::Float) : torch::stable::new_zeros(x, sizes, ScalarType::Float);
  Tensor keep = new_keep(x, dropped, G);
  std::vector<Tensor> ys;
  for (size_t i = 0; i < layers.count(); ++i) {
    const Tensor weight = weight_of_16_bytes(layers.weight[i]);
    LoraLinearForward given{};
    given.layer = layer_of(
        x_rows, weight, layers.bias_of(i), layers.lora_a[i], layers.lora_b[i], layers.scale[i], dropped ? layers.dropout_p[i] : 0);
    ys.push_back(new_empty(x, std::array<int64_t, 2>{M, layers.weight[i].size(0)}));
    Tensor workspace = new_workspace(x, lora_linear_workspace(given.layer));
    given.seed = dropped ? seeds.const_data_ptr<int64_t>() + i : nullptr;
    given.y = ys[i].mutable_data_ptr();
    given.xa = xa.mutable_data_ptr<float>() + static_cast<int64_t>(i) * M * R;
    given.xa_stride = R;
    given.keep = dropped ? keep.mutable_data_ptr<uint8_t>() + static_cast<int64_t>(i) * M * keep_bytes(x) : nullptr;
    given.workspace = workspace.mutable_data_ptr();
    const std::string error = lora_linear(given, device.stream());
    STD_TORCH_CHECK(error.empty(), "lora_linear: ", error);
  }
  return {ys, xa, keep};
}

/// dx [M, K] of all layers, which each adds to, and every dA_i and every dB_i, one after the other; xa and keep as `forward_layers` leaves them.
std::tuple<Tensor, Tensor, Tensor> backward_layers(
    const std::vector<Tensor>& dy, const Layers& layers, const Tensor& xa, const Tensor& keep, bool need_dx, bool need_da, bool need_db) {
  layers.check();
  const Tensor& x = layers.x;
  const int64_t M = x.size(0), K = x.size(1), R = layers.most_ranks();
  const bool dropped = check_saved(dy, x, layers.weight, xa, keep, R);
  int64_t db_numbers = 0;
  for (const Tensor& b : layers.lora_b) db_numbers += b.numel();
  const OnDevice device(x);
  const Tensor x_rows = rows_of_16_bytes(x), dense_xa = contiguous(xa);
  const Tensor dense_keep = dropped ? rows_of_16_bytes(torch::stable::flatten(contiguous(keep), 0, -2)) : keep;  // read 8 bytes at a time
  Tensor dx = need_dx ? new_empty(x, std::array<int64_t, 2>{M, K}) : without_elements(x);
  Tensor da = new_empty(layers.lora_a[0], std::array<int64_t, 1>{need_da ? layers.ranks() * K : 0});
  Tensor db = new_empty(layers.lora_b[0], std::array<int64_t, 1>{need_db ? db_numbers : 0});
  char *next_da = static_cast<char*>(da.mutable_data_ptr()), *next_db = static_cast<char*>(db.mutable_data_ptr());
  for (size_t i = 0; i < layers.count(); ++i) {
    const Tensor weight = weight_of_16_bytes(layers.weight[i]), dy_rows = rows_of_16_bytes(dy[i]);
    LoraLinearBackward given{};
    given.layer = layer_of(
        x_rows, weight, std::nullopt, layers.lora_a[i], layers.lora_b[i], layers.scale[i], dropped ? layers.dropout_p[i] : 0);
    Tensor workspace = new_workspace(x, lora_linear_backward_workspace(given.layer));
    given.dy = matrix_of(dy_rows);
    given.xa = dense_xa.const_data_ptr<float>() + static_cast<int64_t>(i) * M * R;
    given.xa_stride = R;
    given.keep = dropped ? dense_keep.const_data_ptr<uint8_t>() + static_cast<int64_t>(i) * M * dense_keep.stride(0) : nullptr;
    given.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
    given.adds = i > 0;
    given.da = need_da ? next_da : nullptr;
    given.db = need_db ? next_db : nullptr;
    given.workspace = workspace.mutable_data_ptr();
    const std::string error = lora_linear_backward(given, device.stream());
    STD_TORCH_CHECK(error.empty(), "lora_linear_backward: ", error);
    next_da += need_da ? layers.lora_a[i].numel() * da.element_size() : 0;
    next_db += need_db ? layers.lora_b[i].numel() * db.element_size() : 0;
  }
  return {dx, da, db};
}

// ---- lora_linear where each row has an adapter of its own

/// The adapters as the kernels take them, checked one by one against x [M, K] and weight [N, K].
std::vector<LoraAdapter> check_adapters(
    const Tensor& x, const Tensor& weight, const std::vector<Tensor>& lora_a, const std::vector<Tensor>& lora_b,
    const std::vector<double>& scale, const std::vector<double>& dropout_p) {
  const size_t S = lora_a.size();
  STD_TORCH_CHECK(S >= 1, "lora_a: got no adapter, expected at least one");
  STD_TORCH_CHECK(lora_b.size() == S, "lora_b: got ", lora_b.size(), " adapters, expected ", S);
  STD_TORCH_CHECK(scale.size() == S, "scale: got ", scale.size(), " numbers, expected ", S);
  STD_TORCH_CHECK(dropout_p.size() == S, "dropout_p: got ", dropout_p.size(), " numbers, expected ", S);
  std::vector<LoraAdapter> adapters(S);
  for (size_t i = 0; i < S; ++i) {
    check_adapter(x, weight, lora_a[i], lora_b[i], dropout_p[i], lora_a[0].scalar_type(), "[" + std::to_string(i) + "]");
    LoraAdapter& adapter = adapters[i];
    adapter.a = lora_a[i].const_data_ptr(), adapter.b = lora_b[i].const_data_ptr(), adapter.R = lora_a[i].size(0);
    copy_strides(lora_a[i], adapter.a_strides);
    copy_strides(lora_b[i], adapter.b_strides);
    adapter.scale = scale[i], adapter.dropout_p = dropout_p[i];
  }
  return adapters;
}

/// What forward and backward are given, checked, and as the kernels take it: x in rows of 16 bytes, weight in rows or columns of them, order and
/// offsets dense.
struct MixedLayer {
  std::vector<LoraAdapter> adapters;
  Tensor x, weight, order, offsets;
  MultiLora layer{};
  int64_t ranks = 0;  // of all adapters
  bool drops = false;

  MixedLayer(const Layers& given, const Tensor& given_order, const Tensor& given_offsets) {
    STD_TORCH_CHECK(given.count() == 1, "weight: got ", given.count(), " layers, expected one where each row has an adapter of its own");
    const Tensor &given_x = given.x, &given_weight = given.weight[0];
    check_base(given_x, given_weight, given.bias_of(0));
    adapters = check_adapters(given_x, given_weight, given.lora_a, given.lora_b, given.scale, given.dropout_p);
    layer.M = given_x.size(0), layer.K = given_x.size(1), layer.N = given_weight.size(0), layer.S = static_cast<int64_t>(adapters.size());
    check_integers(given_order, "order", {layer.M}, given_x);
    check_integers(given_offsets, "offsets", {layer.S + 3}, given_x);
    for (const LoraAdapter& adapter : adapters) {
      layer.R = std::max(layer.R, adapter.R);
      ranks += adapter.R;
      drops = drops || fastlora::drops(adapter.dropout_p);
    }
    x = rows_of_16_bytes(given_x), weight = weight_of_16_bytes(given_weight), order = contiguous(given_order), offsets = contiguous(given_offsets);
    layer.dtype = dtype_of(x), layer.adapter_dtype = dtype_of(given.lora_a[0]);
    layer.x = x.const_data_ptr(), layer.x_stride = x.stride(0);
    layer.by_column = lies_by_column(matrix_of(weight), layer.N, layer.K);
    layer.weight = weight.const_data_ptr(), layer.weight_stride = weight.stride(layer.by_column ? 1 : 0);
    layer.adapters = adapters.data();
    layer.order = order.const_data_ptr<int64_t>(), layer.offsets = offsets.const_data_ptr<int64_t>();
  }
};

/// y, xa [1, M, max R_i] and keep [1, M, 8 ceil(K / 64)].
std::tuple<std::vector<Tensor>, Tensor, Tensor> forward_mixed(
    const Layers& layer, const std::optional<Tensor>& seed, const Tensor& order, const Tensor& offsets) {
  const std::optional<Tensor> bias = layer.bias_of(0);
  const MixedLayer mixed(layer, order, offsets);
  const Tensor& x = layer.x;
  check_seed(seed, x, 1);
  const OnDevice device(x);
  MultiLoraForward given{};
  given.layer = mixed.layer;
  const int64_t M = mixed.layer.M, N = mixed.layer.N;
  const bool dropped = seed && mixed.drops;
  Tensor y = new_empty(x, std::array<int64_t, 2>{M, N}), xa = new_empty(x, std::array<int64_t, 3>{1, M, given.layer.R}, ScalarType::Float);
  Tensor keep = new_keep(x, dropped, 1);
  if (bias) given.bias = bias->const_data_ptr(), given.bias_stride = bias->stride(0);
  given.seed = dropped ? seed->const_data_ptr<int64_t>() : nullptr;
  given.y = y.mutable_data_ptr();
  given.xa = xa.mutable_data_ptr<float>();
  given.keep = dropped ? keep.mutable_data_ptr<uint8_t>() : nullptr;
  Tensor workspace = new_workspace(x, multi_lora_workspace(given.layer));
  given.workspace = workspace.mutable_data_ptr();
  const std::string error = multi_lora(given, device.stream());
  STD_TORCH_CHECK(error.empty(), "multi_lora: ", error);
  return {{y}, xa, keep};
}

std::tuple<Tensor, Tensor, Tensor> backward_mixed(
    const std::vector<Tensor>& all_dy, const Layers& layer, const Tensor& xa, const Tensor& keep, const Tensor& order, const Tensor& offsets,
    bool need_dx, bool need_da, bool need_db) {
  const MixedLayer mixed(layer, order, offsets);
  const Tensor& x = layer.x;
  const bool dropped = check_saved(all_dy, x, layer.weight, xa, keep, mixed.layer.R) && mixed.drops;
  const Tensor& dy = all_dy[0];
  const OnDevice device(x);
  const Tensor dy_rows = rows_of_16_bytes(dy), dense_xa = contiguous(xa), dense_keep = dropped ? rows_of_16_bytes(torch::stable::flatten(contiguous(keep), 0, 1)) : keep;
  const int64_t M = mixed.layer.M, K = mixed.layer.K, N = mixed.layer.N;
  MultiLoraBackward given{};
  given.layer = mixed.layer;
  Tensor dx = need_dx ? new_empty(x, std::array<int64_t, 2>{M, K}) : without_elements(x);
  Tensor da = new_empty(layer.lora_a[0], std::array<int64_t, 1>{need_da ? mixed.ranks * K : 0});
  Tensor db = new_empty(layer.lora_b[0], std::array<int64_t, 1>{need_db ? mixed.ranks * N : 0});
  Tensor workspace = new_workspace(x, multi_lora_backward_workspace(given.layer));
  given.dy = dy_rows.const_data_ptr();
  given.dy_stride = dy_rows.stride(0);
  given.xa = dense_xa.const_data_ptr<float>();
  given.keep = dropped ? dense_keep.const_data_ptr<uint8_t>() : nullptr;
  given.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  given.da = need_da ? da.mutable_data_ptr() : nullptr;
  given.db = need_db ? db.mutable_data_ptr() : nullptr;
  given.workspace = workspace.mutable_data_ptr();
  const std::string error = multi_lora_backward(given, device.stream());
  STD_TORCH_CHECK(error.empty(), "multi_lora_backward: ", error);
  return {dx, da, db};
}

// ---- what is registered

std::tuple<std::vector<Tensor>, Tensor, Tensor> lora_linear_cuda(
    const Tensor& x,                                                         // [M, K]
    const std::vector<Tensor>& weight, const std::vector<Tensor>& bias,      // G of [N_g, K], [N_g] or no elements
    const std::vector<Tensor>& lora_a, const std::vector<Tensor>& lora_b,    // G S of [R_gi, K], [N_g, R_gi]
    const std::vector<double>& scale, const std::vector<double>& dropout_p,  // G S
    const std::optional<Tensor>& seed,                                       // [G]
    const std::optional<Tensor>& order,                                      // [M], or none: S is 1
    const std::optional<Tensor>& offsets) {                                  // [S + 3]
  const Layers layers{x, weight, bias, lora_a, lora_b, scale, dropout_p};
  return order ? forward_mixed(layers, seed, *order, offsets.value()) : forward_layers(layers, seed);
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward_cuda(
    const std::vector<Tensor>& dy,  // G of [M, N_g]
    const Tensor& x, const std::vector<Tensor>& weight, const std::vector<Tensor>& lora_a, const std::vector<Tensor>& lora_b,
    const Tensor& xa,    // [G, M, max R_gi] float32
    const Tensor& keep,  // [G, M, 8 ceil(K / 64)] uint8, or no elements
    const std::vector<double>& scale, const std::vector<double>& dropout_p, const std::optional<Tensor>& order,
    const std::optional<Tensor>& offsets, bool need_dx, bool need_da, bool need_db) {
  const Layers layers{x, weight, {}, lora_a, lora_b, scale, dropout_p};
  return order ? backward_mixed(dy, layers, xa, keep, *order, offsets.value(), need_dx, need_da, need_db)
               : backward_layers(dy, layers, xa, keep, need_dx, need_da, need_db);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, FASTLORA_CARD, m) {
  m.impl("prefix_concat_cuda", TORCH_BOX(&prefix_concat_cuda));
  m.impl("prefix_concat_backward_cuda", TORCH_BOX(&prefix_concat_backward_cuda));
  m.impl("lora_linear_cuda", TORCH_BOX(&lora_linear_cuda));
  m.impl("lora_linear_backward_cuda", TORCH_BOX(&lora_linear_backward_cuda));
}

}  // namespace fastlora

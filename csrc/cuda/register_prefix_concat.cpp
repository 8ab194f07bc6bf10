// prefix_concat on a card; prefix_concat.cu has its kernels.
#include "register.h"

#include <bit>
#include <optional>
#include <tuple>

#include "../check_prefix_concat.h"
#include "prefix_concat.h"

namespace fastlora {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

constexpr std::initializer_list<ScalarType> FLOATS = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

void check_launch(const char* operator_name, const char* error) {
  STD_TORCH_CHECK(error == nullptr, operator_name, ": CUDA says: ", error);
}

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
  const Tensor& like = attention_mask;
  check_card(like, "attention_mask");
  const Tensor& table = check_prefix_concat(
      prompts, starts, max_prompt, prompt_index, embeds, input_ids, embedding, attention_mask, position_ids, labels, FLOATS);
  const int64_t B = like.size(0), T = like.size(1), W = T + max_prompt, D = prompts.size(1);
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
  check_card(dout, "dout");
  check_prefix_concat_backward(dout, source, prompt_rows, tokens, FLOATS);
  const int64_t B = dout.size(0), W = dout.size(1), D = dout.size(2);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, FASTLORA_CARD, m) {
  m.impl("prefix_concat_cuda", TORCH_BOX(&prefix_concat_cuda));
  m.impl("prefix_concat_backward_cuda", TORCH_BOX(&prefix_concat_backward_cuda));
}

}  // namespace fastlora

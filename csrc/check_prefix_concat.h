// What prefix_concat asks of its arguments, whoever computes it; `floats`: in which dtypes. Numbers in starts and source are not looked at.
#pragma once

#include <optional>

#include "check.h"

namespace fastlora {

/// Raises unless the arguments but the prompts' starts fit together; where attention_mask is its caller has checked. Prompts may be [S, P, D].
/// The rows of tokens: embeds, or else embedding.
inline const Tensor& check_prefix_batch(
    const Tensor& prompts, int64_t max_prompt, const std::optional<Tensor>& prompt_index, const std::optional<Tensor>& embeds,
    const std::optional<Tensor>& input_ids, const std::optional<Tensor>& embedding, const Tensor& attention_mask,
    const std::optional<Tensor>& position_ids, const std::optional<Tensor>& labels, std::initializer_list<ScalarType> floats) {
  const Tensor& like = attention_mask;
  check_shape(attention_mask, "attention_mask", {ANY, ANY});
  STD_TORCH_CHECK(max_prompt >= 0, "max_prompt: got ", max_prompt, ", expected at least 0");
  const int64_t B = like.size(0), T = like.size(1);
  check_device(prompts, "prompts", like);
  check_dtype(prompts, "prompts", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
  if (prompt_index) check(*prompt_index, "prompt_index", {B}, {ScalarType::Long}, like);
  if (embeds) {
    check(*embeds, "embeds", {B, T, ANY}, floats, like);
  } else {
    STD_TORCH_CHECK(input_ids && embedding, "embeds: got none, expected a tensor, or input_ids together with embedding");
    check(*input_ids, "input_ids", {B, T}, {ScalarType::Long}, like);
    check(*embedding, "embedding", {ANY, ANY}, floats, like);
    STD_TORCH_CHECK(embedding->size(0) >= 1, "embedding: got ", describe(*embedding), ", expected at least one row");
  }
  const Tensor& table = embeds ? *embeds : *embedding;
  const int64_t D = table.size(table.dim() - 1);
  const char* tokens_name = embeds ? "embeds" : "embedding";
  const bool fits = (prompts.dim() == 2 || prompts.dim() == 3) && prompts.size(prompts.dim() - 1) == D;
  STD_TORCH_CHECK(fits, "prompts: got ", describe(prompts), ", expected rows of ", D, " as in ", tokens_name);
  if (position_ids) check(*position_ids, "position_ids", {B, T}, {ScalarType::Long}, like);
  if (labels) check(*labels, "labels", {B, T}, {ScalarType::Long}, like);
  return table;
}

/// The same of the operator's own arguments.
inline const Tensor& check_prefix_concat(
    const Tensor& prompts, const Tensor& starts, int64_t max_prompt, const Tensor& prompt_index, const std::optional<Tensor>& embeds,
    const std::optional<Tensor>& input_ids, const std::optional<Tensor>& embedding, const Tensor& attention_mask,
    const std::optional<Tensor>& position_ids, const std::optional<Tensor>& labels, std::initializer_list<ScalarType> floats) {
  check_shape(prompts, "prompts", {ANY, ANY});
  check(starts, "starts", {ANY}, {ScalarType::Long}, attention_mask);
  STD_TORCH_CHECK(starts.numel() >= 2, "starts: got ", describe(starts), ", expected at least one prompt");
  return check_prefix_batch(
      prompts, max_prompt, prompt_index, embeds, input_ids, embedding, attention_mask, position_ids, labels, floats);
}

/// The same of its backward; where dout is its caller has checked.
inline void check_prefix_concat_backward(
    const Tensor& dout, const Tensor& source, int64_t prompt_rows, int64_t tokens, std::initializer_list<ScalarType> floats) {
  check(dout, "dout", {ANY, ANY, ANY}, floats, dout);
  check(source, "source", {dout.size(0), dout.size(1)}, {ScalarType::Long}, dout);
  STD_TORCH_CHECK(prompt_rows >= 0, "prompt_rows: got ", prompt_rows, ", expected at least 0");
  STD_TORCH_CHECK(tokens >= 0, "tokens: got ", tokens, ", expected at least 0");
}

}  // namespace fastlora

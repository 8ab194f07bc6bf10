// Rows [P_i ; x] with their mask, positions and labels, the padding kept on its side; and the gradients of prompts and embeddings.
// The equations are fastlora/reference.py::prefix_layout, prefix_concat and prefix_concat_backward. Where each column comes from is
// worked out first, in integers; then every output row is one copy. In the backward a prompt row's gradient is summed in float32 (float64
// for float64) over its batch rows, in their order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../check_prefix_concat.h"

namespace fastlora {
namespace {

using torch::stable::contiguous;
using torch::stable::parallel_for;

constexpr int64_t GRAIN = 1 << 15;  // bytes worth a thread

constexpr std::initializer_list<ScalarType> FLOATS = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double};

/// The starts of the prompts, which must ascend from 0 to the rows of `prompts`, none longer than max_prompt.
std::vector<int64_t> check_starts(const Tensor& starts, int64_t prompt_rows, int64_t max_prompt) {
  const Tensor dense = contiguous(starts);
  const int64_t* begin = dense.const_data_ptr<int64_t>();
  const std::vector<int64_t> values(begin, begin + dense.numel());
  STD_TORCH_CHECK(
      values.front() == 0 && values.back() == prompt_rows, "starts: got ", values.front(), " to ", values.back(), ", expected 0 to ",
      prompt_rows, ", the rows of prompts");
  for (size_t i = 0; i + 1 < values.size(); ++i) {
    const int64_t length = values[i + 1] - values[i];
    const bool fits = length >= 0 && length <= max_prompt;
    STD_TORCH_CHECK(fits, "starts: got a prompt of ", length, " rows, expected 0 to max_prompt = ", max_prompt);
  }
  return values;
}

/// One row of the batch: its prompt, how much of it is real, and where it begins in the result.
struct BatchRow {
  int64_t prompt_begin, prompt_length;
  bool prompt_exists;
  int64_t tokens;
  int64_t begin;
};

std::vector<BatchRow> lay_out(
    const std::vector<int64_t>& starts, const int64_t* prompt_index, const bool* real, int64_t B, int64_t T, int64_t W) {
  const int64_t S = static_cast<int64_t>(starts.size()) - 1;
  std::vector<BatchRow> rows(B);
  bool any_left = false;
  const auto padded_left = [&](int64_t b) { return rows[b].tokens > 0 && !real[b * T]; };
  for (int64_t b = 0; b < B; ++b) {
    const int64_t prompt = std::clamp<int64_t>(prompt_index[b], 0, S - 1);
    rows[b].prompt_exists = prompt == prompt_index[b];
    rows[b].prompt_begin = starts[prompt];
    rows[b].prompt_length = starts[prompt + 1] - starts[prompt];
    rows[b].tokens = std::count(real + b * T, real + (b + 1) * T, true);
    any_left = any_left || padded_left(b);
  }
  for (int64_t b = 0; b < B; ++b) {
    const bool whole = rows[b].tokens == T || rows[b].tokens == 0;
    const bool left = padded_left(b) || (whole && any_left);
    rows[b].begin = left ? W - rows[b].prompt_length - rows[b].tokens : 0;
  }
  return rows;
}

/// source [B, W]: row j of the prompts as j, token (b, t) as prompt_rows + b T + t, padding as -1.
void write_source(const std::vector<BatchRow>& rows, const bool* real, int64_t prompt_rows, int64_t T, int64_t W, int64_t* source) {
  for (int64_t b = 0; b < static_cast<int64_t>(rows.size()); ++b, source += W) {
    std::fill(source, source + W, -1);
    int64_t w = rows[b].begin;
    for (int64_t j = 0; j < rows[b].prompt_length; ++j) source[w++] = rows[b].prompt_begin + j;
    for (int64_t t = 0; t < T; ++t) {
      if (real[b * T + t]) source[w++] = prompt_rows + b * T + t;
    }
  }
}

Tensor without_elements(const Tensor& like) { return torch::stable::new_empty(like, std::array<int64_t, 1>{0}); }

/// A number as a tensor of this dtype holds it.
template <class Word>
Word word_of(const Tensor& like, double number) {
  if (like.scalar_type() == ScalarType::Long) return static_cast<Word>(static_cast<int64_t>(number));
  Tensor one = torch::stable::new_empty(like, std::array<int64_t, 1>{1});
  torch::stable::fill_(one, number);
  return *static_cast<const Word*>(one.const_data_ptr());
}

template <class Word>
void move_words(const Tensor& from, Word prompt, Word padding, const int64_t* source, int64_t prompt_rows, const Tensor& to) {
  const Word* values = static_cast<const Word*>(from.const_data_ptr());
  Word* out = static_cast<Word*>(to.mutable_data_ptr());
  const int64_t count = to.numel();
  for (int64_t i = 0; i < count; ++i) {
    out[i] = source[i] < 0 ? padding : source[i] < prompt_rows ? prompt : values[source[i] - prompt_rows];
  }
}

/// [B, W] with `prompt` at prompts, values [B, T] at tokens, `padding` at padding; whatever the dtype.
Tensor move_values(const Tensor& values, double prompt, double padding, const int64_t* source, int64_t prompt_rows, int64_t W) {
  const Tensor from = contiguous(values);
  const Tensor to = torch::stable::new_empty(values, std::array<int64_t, 2>{values.size(0), W});
  const auto move = [&]<class Word>(Word) {
    move_words<Word>(from, word_of<Word>(from, prompt), word_of<Word>(from, padding), source, prompt_rows, to);
  };
  switch (values.element_size()) {
    case 1: move(uint8_t{}); break;
    case 2: move(uint16_t{}); break;
    case 4: move(uint32_t{}); break;
    default: move(uint64_t{});
  }
  return to;
}

Tensor new_positions(
    const std::vector<BatchRow>& rows, const std::optional<Tensor>& position_ids, const Tensor& source, int64_t prompt_rows) {
  const Tensor positions = torch::stable::new_empty(source, source.sizes());
  const std::optional<Tensor> given = position_ids ? std::optional(contiguous(*position_ids)) : std::nullopt;
  const int64_t* from = given ? given->const_data_ptr<int64_t>() : nullptr;
  const int64_t* at = source.const_data_ptr<int64_t>();
  int64_t* to = positions.mutable_data_ptr<int64_t>();
  for (const BatchRow& row : rows) {
    for (int64_t w = 0; w < source.size(1); ++w, ++at, ++to) {
      *to = *at < 0 ? 0 : from && *at >= prompt_rows ? from[*at - prompt_rows] + row.prompt_length : w - row.begin;
    }
  }
  return positions;
}

/// A table of rows, each dense in memory.
struct Table {
  explicit Table(const Tensor& tensor) : kept(contiguous(tensor)), data(static_cast<const char*>(kept.const_data_ptr())) {}

  Tensor kept;
  const char* data;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prefix_concat_cpu(
    const Tensor& prompts,  // [sum P_i, D]
    const Tensor& starts,   // [S + 1]
    int64_t max_prompt,
    const Tensor& prompt_index,               // [B]
    const std::optional<Tensor>& embeds,      // [B, T, D], or none with the next two
    const std::optional<Tensor>& input_ids,   // [B, T]
    const std::optional<Tensor>& embedding,   // [V, D]
    const Tensor& attention_mask,             // [B, T]
    const std::optional<Tensor>& position_ids,  // [B, T]
    const std::optional<Tensor>& labels) {      // [B, T]
  check_cpu(attention_mask, "attention_mask");
  const Tensor& table = check_prefix_concat(
      prompts, starts, max_prompt, prompt_index, embeds, input_ids, embedding, attention_mask, position_ids, labels, FLOATS);
  const int64_t B = attention_mask.size(0), T = attention_mask.size(1), W = T + max_prompt, D = prompts.size(1), prompt_rows = prompts.size(0);
  const std::vector<int64_t> begins = check_starts(starts, prompt_rows, max_prompt);

  const Tensor real = contiguous(torch::stable::to(attention_mask, ScalarType::Bool));
  const Tensor index = contiguous(prompt_index);
  const std::vector<BatchRow> rows = lay_out(begins, index.const_data_ptr<int64_t>(), real.const_data_ptr<bool>(), B, T, W);
  const Tensor source = torch::stable::new_empty(starts, std::array<int64_t, 2>{B, W});
  write_source(rows, real.const_data_ptr<bool>(), prompt_rows, T, W, source.mutable_data_ptr<int64_t>());
  const int64_t* from = source.const_data_ptr<int64_t>();

  const Table tokens(table), prompt_table(torch::stable::to(prompts, table.scalar_type()));
  const std::optional<Tensor> ids = embeds ? std::nullopt : std::optional(contiguous(*input_ids));
  const int64_t* id = ids ? ids->const_data_ptr<int64_t>() : nullptr;
  const int64_t V = embeds ? B * T : embedding->size(0);
  const Tensor out = torch::stable::new_empty(table, std::array<int64_t, 3>{B, W, D});
  Tensor nan = torch::stable::new_empty(table, std::array<int64_t, 1>{D});
  torch::stable::fill_(nan, std::numeric_limits<double>::quiet_NaN());
  const char* nan_row = static_cast<const char*>(nan.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t bytes = D * static_cast<int64_t>(table.element_size());
  parallel_for(0, B * W, GRAIN / (bytes + 1) + 1, [&](int64_t begin, int64_t end) {
    int64_t b = begin / W;
    for (int64_t i = begin; i < end; ++i) {
      if (i == (b + 1) * W) ++b;
      if (from[i] < 0) {
        std::memset(to + i * bytes, 0, bytes);
      } else if (from[i] < prompt_rows) {
        std::memcpy(to + i * bytes, rows[b].prompt_exists ? prompt_table.data + from[i] * bytes : nan_row, bytes);
      } else {
        const int64_t token = id ? id[from[i] - prompt_rows] : from[i] - prompt_rows;
        std::memcpy(to + i * bytes, token >= 0 && token < V ? tokens.data + token * bytes : nan_row, bytes);
      }
    }
  });
  const Tensor mask = move_values(attention_mask, 1, 0, from, prompt_rows, W);
  const Tensor new_labels = labels ? move_values(*labels, -100, -100, from, prompt_rows, W) : without_elements(starts);
  return {out, mask, new_positions(rows, position_ids, source, prompt_rows), new_labels, source};
}

/// total[d] = the sum of the rows at `places` of dout, one after the other.
template <class T, class Sum>
void sum_rows(const T* dout, const int64_t* place, const int64_t* place_end, int64_t D, Sum* total) {
  std::fill(total, total + D, Sum(0));
  for (; place != place_end; ++place) {
    const T* row = dout + *place * D;
    for (int64_t d = 0; d < D; ++d) total[d] += static_cast<Sum>(row[d]);
  }
}

template <class T, class Sum>
void prompt_gradient(const Tensor& dout, const std::vector<int64_t>& begins, const std::vector<int64_t>& places, const Tensor& dprompts) {
  const int64_t D = dout.size(2);
  const T* from = static_cast<const T*>(dout.const_data_ptr());
  Sum* to = static_cast<Sum*>(dprompts.mutable_data_ptr());
  parallel_for(0, dprompts.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) sum_rows(from, places.data() + begins[j], places.data() + begins[j + 1], D, to + j * D);
  });
}

/// dprompts [prompt_rows, D]: a prompt row's gradient is the sum over the columns that it was copied to, in their order.
Tensor sum_prompts(const Tensor& dout, const int64_t* source, int64_t prompt_rows) {
  const int64_t columns = dout.size(0) * dout.size(1);
  std::vector<int64_t> begins(prompt_rows + 1, 0);  // places[begins[j] : begins[j + 1]] are the columns of prompt row j
  for (int64_t i = 0; i < columns; ++i) {
    if (source[i] >= 0 && source[i] < prompt_rows) ++begins[source[i] + 1];
  }
  for (int64_t j = 0; j < prompt_rows; ++j) begins[j + 1] += begins[j];
  std::vector<int64_t> places(begins.back()), next(begins.begin(), begins.end() - 1);
  for (int64_t i = 0; i < columns; ++i) {
    if (source[i] >= 0 && source[i] < prompt_rows) places[next[source[i]]++] = i;
  }
  const bool wide = dout.scalar_type() == ScalarType::Double;
  const std::array<int64_t, 2> sizes{prompt_rows, dout.size(2)};
  const Tensor dprompts = torch::stable::new_empty(dout, sizes, wide ? ScalarType::Double : ScalarType::Float);
  switch (dout.scalar_type()) {
    case ScalarType::Float: prompt_gradient<float, float>(dout, begins, places, dprompts); break;
    case ScalarType::BFloat16: prompt_gradient<torch::headeronly::BFloat16, float>(dout, begins, places, dprompts); break;
    case ScalarType::Half: prompt_gradient<torch::headeronly::Half, float>(dout, begins, places, dprompts); break;
    default: prompt_gradient<double, double>(dout, begins, places, dprompts);
  }
  return dprompts;
}

/// dembeds [B, T, D]: a token's gradient is its column's, and zero for padding.
Tensor move_tokens(const Tensor& dout, const int64_t* source, int64_t prompt_rows, int64_t tokens) {
  const Tensor dembeds = torch::stable::new_zeros(dout, std::array<int64_t, 3>{dout.size(0), tokens, dout.size(2)});
  const int64_t bytes = dout.size(2) * static_cast<int64_t>(dout.element_size());
  const char* from = static_cast<const char*>(dout.const_data_ptr());
  char* to = static_cast<char*>(dembeds.mutable_data_ptr());
  parallel_for(0, dout.size(0) * dout.size(1), GRAIN / (bytes + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (source[i] >= prompt_rows) std::memcpy(to + (source[i] - prompt_rows) * bytes, from + i * bytes, bytes);
    }
  });
  return dembeds;
}

std::tuple<Tensor, Tensor> prefix_concat_backward_cpu(
    const Tensor& dout,    // [B, W, D]
    const Tensor& source,  // [B, W]
    int64_t prompt_rows, int64_t tokens, bool need_prompts, bool need_embeds) {
  check_cpu(dout, "dout");
  check_prefix_concat_backward(dout, source, prompt_rows, tokens, FLOATS);
  const Tensor dense = contiguous(dout), places = contiguous(source);
  const int64_t* from = places.const_data_ptr<int64_t>();
  const int64_t most = prompt_rows + dout.size(0) * tokens;
  for (int64_t i = 0; i < places.numel(); ++i) {
    STD_TORCH_CHECK(from[i] >= -1 && from[i] < most, "source: got ", from[i], ", expected -1 to ", most - 1);
  }
  const ScalarType wide = dout.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor dprompts = need_prompts ? sum_prompts(dense, from, prompt_rows) : torch::stable::new_empty(dout, std::array<int64_t, 1>{0}, wide);
  Tensor dembeds = need_embeds ? move_tokens(dense, from, prompt_rows, tokens) : without_elements(dout);
  return {dprompts, dembeds};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("prefix_concat_cpu", TORCH_BOX(&prefix_concat_cpu));
  m.impl("prefix_concat_backward_cpu", TORCH_BOX(&prefix_concat_backward_cpu));
}

}  // namespace fastlora

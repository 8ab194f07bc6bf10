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
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../check_prefix_concat.h"
#include "new_tensor.h"

namespace fastlora {
namespace {

using torch::stable::parallel_for;

constexpr int64_t GRAIN = 1 << 17;  // bytes worth a thread

constexpr std::initializer_list<ScalarType> FLOATS = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double};

std::optional<Tensor> dense_if_any(const std::optional<Tensor>& tensor) { return tensor ? std::optional(dense(*tensor)) : std::nullopt; }

Tensor with_dtype(const Tensor& tensor, ScalarType dtype) { return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype); }

const int64_t* numbers(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr<int64_t>() : nullptr; }

/// Raises unless the starts of the prompts ascend from 0 to the rows of `prompts`, none longer than max_prompt.
void check_starts(const std::vector<int64_t>& starts, int64_t prompt_rows, int64_t max_prompt) {
  STD_TORCH_CHECK(
      starts.front() == 0 && starts.back() == prompt_rows, "starts: got ", starts.front(), " to ", starts.back(), ", expected 0 to ",
      prompt_rows, ", the rows of prompts");
  for (size_t i = 0; i + 1 < starts.size(); ++i) {
    const int64_t length = starts[i + 1] - starts[i];
    const bool fits = length >= 0 && length <= max_prompt;
    STD_TORCH_CHECK(fits, "starts: got a prompt of ", length, " rows, expected 0 to max_prompt = ", max_prompt);
  }
}

constexpr std::initializer_list<ScalarType> INTEGERS = {ScalarType::Bool, ScalarType::Byte, ScalarType::Char,
                                                        ScalarType::Short, ScalarType::Int, ScalarType::Long};

bool is_integer(const Tensor& tensor) { return std::find(INTEGERS.begin(), INTEGERS.end(), tensor.scalar_type()) != INTEGERS.end(); }

/// use(Word{}) with the unsigned integer that has the size of the tensor's elements.
template <class Use>
void with_word(const Tensor& tensor, const Use& use) {
  switch (tensor.element_size()) {
    case 1: use(uint8_t{}); break;
    case 2: use(uint16_t{}); break;
    case 4: use(uint32_t{}); break;
    default: use(uint64_t{});
  }
}

/// Which tokens are real [B, T]: those whose mask is not 0.
std::vector<uint8_t> read_mask(const Tensor& attention_mask) {
  const Tensor mask = dense(is_integer(attention_mask) ? attention_mask : torch::stable::to(attention_mask, ScalarType::Bool));
  std::vector<uint8_t> real(mask.numel());
  with_word(mask, [&]<class Word>(Word) {
    const Word* from = static_cast<const Word*>(mask.const_data_ptr());
    for (size_t i = 0; i < real.size(); ++i) real[i] = from[i] != 0;
  });
  return real;
}

/// One row of the batch: its prompt, how much of it is real, and where it begins in the result.
struct BatchRow {
  int64_t prompt_begin, prompt_length;
  bool prompt_exists;
  int64_t tokens;
  int64_t begin;
};

/// prompt_index: null where every row has the first prompt.
std::vector<BatchRow> lay_out(
    const std::vector<int64_t>& starts, const int64_t* prompt_index, const std::vector<uint8_t>& real, int64_t B, int64_t T, int64_t W) {
  const int64_t S = static_cast<int64_t>(starts.size()) - 1;
  std::vector<BatchRow> rows(B);
  bool any_left = false;
  const auto padded_left = [&](int64_t b) { return rows[b].tokens > 0 && !real[b * T]; };
  for (int64_t b = 0; b < B; ++b) {
    const int64_t wanted = prompt_index ? prompt_index[b] : 0, prompt = std::clamp<int64_t>(wanted, 0, S - 1);
    rows[b].prompt_exists = prompt == wanted;
    rows[b].prompt_begin = starts[prompt];
    rows[b].prompt_length = starts[prompt + 1] - starts[prompt];
    rows[b].tokens = std::accumulate(real.begin() + b * T, real.begin() + (b + 1) * T, int64_t{0});
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
void write_source(
    const std::vector<BatchRow>& rows, const std::vector<uint8_t>& real, int64_t prompt_rows, int64_t T, int64_t W, int64_t* source) {
  for (int64_t b = 0; b < static_cast<int64_t>(rows.size()); ++b, source += W) {
    int64_t w = rows[b].begin;
    std::fill(source, source + w, -1);
    for (int64_t j = 0; j < rows[b].prompt_length; ++j) source[w++] = rows[b].prompt_begin + j;
    if (rows[b].tokens == T) {
      for (int64_t t = 0; t < T; ++t) source[w++] = prompt_rows + b * T + t;
    } else {
      for (int64_t t = 0; t < T; ++t) {
        if (real[b * T + t]) source[w++] = prompt_rows + b * T + t;
      }
    }
    std::fill(source + w, source + W, -1);
  }
}

/// A number as a tensor of this dtype holds it.
template <class Word>
Word word_of(const Tensor& like, double number) {
  if (is_integer(like)) return static_cast<Word>(static_cast<int64_t>(number));
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
  const Tensor from = dense(values), to = new_tensor(values, {values.size(0), W}, values.scalar_type());
  with_word(from, [&]<class Word>(Word) {
    move_words<Word>(from, word_of<Word>(from, prompt), word_of<Word>(from, padding), source, prompt_rows, to);
  });
  return to;
}

/// position_ids: null where none are given.
Tensor new_positions(
    const Tensor& like, const std::vector<BatchRow>& rows, const int64_t* position_ids, const int64_t* source, int64_t prompt_rows, int64_t W) {
  const Tensor positions = new_tensor(like, {static_cast<int64_t>(rows.size()), W}, ScalarType::Long);
  int64_t* to = positions.mutable_data_ptr<int64_t>();
  for (const BatchRow& row : rows) {
    for (int64_t w = 0; w < W; ++w, ++source, ++to) {
      *to = *source < 0 ? 0 : position_ids && *source >= prompt_rows ? position_ids[*source - prompt_rows] + row.prompt_length : w - row.begin;
    }
  }
  return positions;
}

/// Rows of the same length, dense in memory.
struct Table {
  Table(const Tensor& tensor, int64_t bytes) : kept(dense(tensor)), data(static_cast<const char*>(kept.const_data_ptr())), row_bytes(bytes) {}

  const char* row(int64_t number) const { return data + number * row_bytes; }

  Tensor kept;
  const char* data;
  int64_t row_bytes;
};

/// Writes the number where a row is made of it.
void fill_row(const Tensor& like, double number, char* to, int64_t row_bytes) {
  with_word(like, [&]<class Word>(Word) {
    const Word word = word_of<Word>(like, number);
    for (int64_t at = 0; at < row_bytes; at += sizeof(Word)) std::memcpy(to + at, &word, sizeof(Word));
  });
}

/// What the result's rows are copied from.
struct Sources {
  Table prompts, tokens;
  const int64_t* ids;  // of the tokens: which row is each; null where each is its own
  int64_t count;       // of the tokens' rows
  const int64_t* source;
  const std::vector<BatchRow>& rows;
  int64_t prompt_rows, W;
  const char* nan_row;  // in the place of rows that do not exist
};

/// Rows begin to end of the result [B W, D]; what lies in one piece is copied in one.
void copy_rows(const Sources& from, int64_t begin, int64_t end, char* out) {
  const int64_t* source = from.source;
  const int64_t bytes = from.tokens.row_bytes;
  if (bytes == 0) return;
  for (int64_t i = begin, next; i < end; i = next) {
    const int64_t b = i / from.W, row_end = std::min(end, (b + 1) * from.W);
    char* to = out + i * bytes;
    next = i + 1;
    if (source[i] < 0) {
      while (next < row_end && source[next] < 0) ++next;
      std::memset(to, 0, (next - i) * bytes);
    } else if (source[i] < from.prompt_rows && from.rows[b].prompt_exists) {
      while (next < row_end && source[next] >= 0 && source[next] < from.prompt_rows) ++next;
      std::memcpy(to, from.prompts.row(source[i]), (next - i) * bytes);
    } else if (source[i] < from.prompt_rows) {
      std::memcpy(to, from.nan_row, bytes);
    } else if (from.ids) {
      const int64_t id = from.ids[source[i] - from.prompt_rows];
      std::memcpy(to, id >= 0 && id < from.count ? from.tokens.row(id) : from.nan_row, bytes);
    } else {
      while (next < row_end && source[next] == source[next - 1] + 1) ++next;
      std::memcpy(to, from.tokens.row(source[i] - from.prompt_rows), (next - i) * bytes);
    }
  }
}

enum Missing : int64_t { NOTHING, A_TOKEN, A_PROMPT };  // the number does not exist

Missing find_missing(const std::vector<BatchRow>& rows, const int64_t* ids, int64_t V, const std::vector<uint8_t>& real) {
  if (ids) {
    bool missing = false;
    for (size_t i = 0; i < real.size(); ++i) missing |= real[i] && static_cast<uint64_t>(ids[i]) >= static_cast<uint64_t>(V);
    if (missing) return A_TOKEN;
  }
  return std::all_of(rows.begin(), rows.end(), [](const BatchRow& row) { return row.prompt_exists; }) ? NOTHING : A_PROMPT;
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

/// The operator, and whether a number does not exist; its arguments are checked.
std::tuple<Result, Missing> concatenate(
    const Tensor& prompts, const std::vector<int64_t>& starts, int64_t max_prompt, const std::optional<Tensor>& prompt_index,
    const Tensor& table, const std::optional<Tensor>& input_ids, const Tensor& attention_mask, const std::optional<Tensor>& position_ids,
    const std::optional<Tensor>& labels) {
  const int64_t B = attention_mask.size(0), T = attention_mask.size(1), W = T + max_prompt;
  const int64_t D = table.size(table.dim() - 1), prompt_rows = starts.back();
  const std::optional<Tensor> index = dense_if_any(prompt_index), ids = dense_if_any(input_ids), given = dense_if_any(position_ids);
  const std::vector<uint8_t> real = read_mask(attention_mask);
  const std::vector<BatchRow> rows = lay_out(starts, numbers(index), real, B, T, W);
  const Tensor source = new_tensor(table, {B, W}, ScalarType::Long);
  write_source(rows, real, prompt_rows, T, W, source.mutable_data_ptr<int64_t>());
  const int64_t* from = source.const_data_ptr<int64_t>();

  const int64_t bytes = D * static_cast<int64_t>(table.element_size()), count = ids ? table.size(0) : B * T;
  const Missing missing = find_missing(rows, numbers(ids), count, real);
  std::vector<char> nan_row(missing ? bytes : 0);
  fill_row(table, std::numeric_limits<double>::quiet_NaN(), nan_row.data(), static_cast<int64_t>(nan_row.size()));
  const Sources sources{
      Table(with_dtype(prompts, table.scalar_type()), bytes), Table(table, bytes), numbers(ids), count, from, rows, prompt_rows, W,
      nan_row.data()};
  const Tensor out = new_tensor(table, {B, W, D}, table.scalar_type());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  parallel_for(0, B * W, GRAIN / (bytes + 1) + 1, [&](int64_t begin, int64_t end) { copy_rows(sources, begin, end, to); });

  const Tensor mask = move_values(attention_mask, 1, 0, from, prompt_rows, W);
  const Tensor new_labels = labels ? move_values(*labels, -100, -100, from, prompt_rows, W) : new_tensor(table, {0}, ScalarType::Long);
  return {Result{out, mask, new_positions(table, rows, numbers(given), from, prompt_rows, W), new_labels, source}, missing};
}

Result prefix_concat_cpu(
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
  const Tensor lined_up = dense(starts);
  const int64_t* first = lined_up.const_data_ptr<int64_t>();
  const std::vector<int64_t> begins(first, first + lined_up.numel());
  check_starts(begins, prompts.size(0), max_prompt);
  const std::optional<Tensor> ids = embeds ? std::nullopt : input_ids;
  return std::get<0>(concatenate(prompts, begins, max_prompt, prompt_index, table, ids, attention_mask, position_ids, labels));
}

/// The same for a call that nobody traces: prompts may be [S, P, D], starts are plain numbers, without an index every row has the first prompt;
/// and whether a token's or a prompt's number does not exist (Missing).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, int64_t> prefix_concat_now_cpu(
    const Tensor& prompts, const std::vector<int64_t>& starts, int64_t max_prompt, const std::optional<Tensor>& prompt_index,
    const std::optional<Tensor>& embeds, const std::optional<Tensor>& input_ids, const std::optional<Tensor>& embedding,
    const Tensor& attention_mask, const std::optional<Tensor>& position_ids, const std::optional<Tensor>& labels) {
  check_cpu(attention_mask, "attention_mask");
  const Tensor& table = check_prefix_batch(
      prompts, max_prompt, prompt_index, embeds, input_ids, embedding, attention_mask, position_ids, labels, FLOATS);
  STD_TORCH_CHECK(starts.size() >= 2, "starts: got ", starts.size(), " numbers, expected at least 2");
  check_starts(starts, prompts.dim() == 3 ? prompts.size(0) * prompts.size(1) : prompts.size(0), max_prompt);
  const std::optional<Tensor> ids = embeds ? std::nullopt : input_ids;
  auto [result, missing] = concatenate(prompts, starts, max_prompt, prompt_index, table, ids, attention_mask, position_ids, labels);
  return std::tuple_cat(std::move(result), std::tuple{static_cast<int64_t>(missing)});
}

/// total[d] += the rows at so many `places` of dout, one after the other.
template <int COUNT, class T, class Sum>
void add_rows(const T* dout, const int64_t* places, int64_t D, Sum* total) {
  const T* rows[COUNT];
  for (int i = 0; i < COUNT; ++i) rows[i] = dout + places[i] * D;
  for (int64_t d = 0; d < D; ++d) {
    Sum sum = total[d];
    for (int i = 0; i < COUNT; ++i) sum += static_cast<Sum>(rows[i][d]);
    total[d] = sum;
  }
}

/// total[d] = the sum of the rows at `places` of dout, one after the other.
template <class T, class Sum>
void sum_rows(const T* dout, const int64_t* place, const int64_t* place_end, int64_t D, Sum* total) {
  std::fill(total, total + D, Sum(0));
  for (; place_end - place >= 4; place += 4) add_rows<4>(dout, place, D, total);
  for (; place != place_end; ++place) add_rows<1>(dout, place, D, total);
}

template <class T, class Sum>
void prompt_gradient(const Tensor& dout, const std::vector<int64_t>& begins, const std::vector<int64_t>& places, const Tensor& dprompts) {
  const int64_t D = dout.size(2), rows = static_cast<int64_t>(begins.size()) - 1;
  const T* from = static_cast<const T*>(dout.const_data_ptr());
  Sum* to = static_cast<Sum*>(dprompts.mutable_data_ptr());
  const int64_t bytes = rows ? static_cast<int64_t>(places.size()) * D * static_cast<int64_t>(sizeof(T)) / rows : 0;  // that a row reads
  parallel_for(0, rows, GRAIN / (bytes + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) sum_rows(from, places.data() + begins[j], places.data() + begins[j + 1], D, to + j * D);
  });
}

/// dprompts [.., D] of these sizes: a prompt row's gradient is the sum over the columns that it was copied to, in their order.
Tensor sum_prompts(const Tensor& dout, const int64_t* source, int64_t prompt_rows, const std::vector<int64_t>& sizes) {
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
  const Tensor dprompts = new_tensor(dout, sizes, wide ? ScalarType::Double : ScalarType::Float);
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

/// prompts: the sizes of their gradient.
std::tuple<Tensor, Tensor> gradients(
    const Tensor& dout, const Tensor& source, int64_t prompt_rows, const std::vector<int64_t>& prompts, int64_t tokens, bool need_prompts,
    bool need_embeds) {
  check_cpu(dout, "dout");
  check_prefix_concat_backward(dout, source, prompt_rows, tokens, FLOATS);
  const Tensor rows = dense(dout), places = dense(source);
  const int64_t* from = places.const_data_ptr<int64_t>();
  const int64_t most = prompt_rows + dout.size(0) * tokens;
  for (int64_t i = 0; i < places.numel(); ++i) {
    STD_TORCH_CHECK(from[i] >= -1 && from[i] < most, "source: got ", from[i], ", expected -1 to ", most - 1);
  }
  const ScalarType wide = dout.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor dprompts = need_prompts ? sum_prompts(rows, from, prompt_rows, prompts) : new_tensor(dout, {0}, wide);
  Tensor dembeds = need_embeds ? move_tokens(rows, from, prompt_rows, tokens) : new_tensor(dout, {0}, dout.scalar_type());
  return {dprompts, dembeds};
}

std::tuple<Tensor, Tensor> prefix_concat_backward_cpu(
    const Tensor& dout,    // [B, W, D]
    const Tensor& source,  // [B, W]
    int64_t prompt_rows, int64_t tokens, bool need_prompts, bool need_embeds) {
  check_shape(dout, "dout", {ANY, ANY, ANY});
  return gradients(dout, source, prompt_rows, {prompt_rows, dout.size(2)}, tokens, need_prompts, need_embeds);
}

/// The same with dprompts in the shape of the prompts.
std::tuple<Tensor, Tensor> prefix_concat_backward_now_cpu(
    const Tensor& dout, const Tensor& source, const std::vector<int64_t>& prompts, int64_t tokens, bool need_prompts, bool need_embeds) {
  check_shape(dout, "dout", {ANY, ANY, ANY});
  const bool fits = prompts.size() >= 2 && prompts.back() == dout.size(2);
  STD_TORCH_CHECK(fits, "prompts: got ", prompts.size(), " sizes, expected at least 2, the last of them ", dout.size(2));
  int64_t prompt_rows = 1;
  for (size_t i = 0; i + 1 < prompts.size(); ++i) prompt_rows *= prompts[i];
  return gradients(dout, source, prompt_rows, prompts, tokens, need_prompts, need_embeds);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("prefix_concat_cpu", TORCH_BOX(&prefix_concat_cpu));
  m.impl("prefix_concat_now_cpu", TORCH_BOX(&prefix_concat_now_cpu));
  m.impl("prefix_concat_backward_cpu", TORCH_BOX(&prefix_concat_backward_cpu));
  m.impl("prefix_concat_backward_now_cpu", TORCH_BOX(&prefix_concat_backward_now_cpu));
}

}  // namespace fastlora

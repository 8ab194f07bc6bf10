// fingerprint_cpu: a number that changes with the elements of a weight, from 256 of them, spread over all of it, or from every one.
//
// A packed copy of a weight is used only while the weight's own numbers stand still, and of many writes torch keeps no count (fused optimisers,
// `.data`, numpy, another process). The weight is cut into SAMPLES pieces of equal length, row after row; of each piece one element is read, whose
// place in it follows from the golden ratio, so that no column is favoured. A write to the whole weight passes only if it leaves every one of
// them bit for bit as it was. A weight of no more elements than that is read whole. So are an adapter's A and B where `whole` asks for it, which
// are small, and written to in any place: each change of one element gives another number, and two changes the same one by a chance of 2^-64.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <utility>

#include "../check.h"
#include "new_tensor.h"

namespace fastlora {
namespace {

constexpr int64_t SAMPLES = 256;                // a power of two: no division stands between one read from memory and the next
constexpr uint64_t GOLDEN = 2654435769;         // 2^32 over the golden ratio
constexpr uint64_t PRIME = 0x9E3779B97F4A7C15;  // odd: the multiplication loses nothing

/// A weight [rows, columns], its strides in elements.
struct Matrix {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
};

template <class Bits>
uint64_t hash(const Matrix& matrix) {
  const int64_t elements = matrix.rows * matrix.columns;
  const Bits* const data = static_cast<const Bits*>(matrix.data);
  const bool dense = matrix.column_stride == 1 && matrix.row_stride == matrix.columns;  // an element's number is its place
  uint64_t sum = PRIME;
  const auto add = [&](int64_t element) {
    const int64_t at = dense ? element : element / matrix.columns * matrix.row_stride + element % matrix.columns * matrix.column_stride;
    Bits bits;
    std::memcpy(&bits, data + at, sizeof bits);
    sum = (sum ^ bits) * PRIME;
    sum ^= sum >> 32;
  };
  if (elements <= SAMPLES) {
    for (int64_t element = 0; element < elements; ++element) add(element);
    return sum;
  }
  // elements · i / SAMPLES without a product that overflows.
  const auto piece = [&](int64_t i) { return elements / SAMPLES * i + elements % SAMPLES * i / SAMPLES; };
  for (int64_t i = 0; i < SAMPLES; ++i) {
    const uint64_t length = static_cast<uint64_t>(piece(i + 1) - piece(i));
    add(piece(i) + static_cast<int64_t>((GOLDEN * static_cast<uint64_t>(i) & 0xFFFFFFFF) * length >> 32));
  }
  return sum;
}

/// Of every element: eight sums side by side, each of every eighth word of eight bytes, so that no product waits for the one before.
uint64_t hash_all(const char* data, int64_t bytes) {
  constexpr int64_t SUMS = 8, WORD = sizeof(uint64_t);
  uint64_t sums[SUMS];
  for (int64_t i = 0; i < SUMS; ++i) sums[i] = PRIME + static_cast<uint64_t>(i);
  const auto add = [](uint64_t& sum, uint64_t word) {
    sum = (sum ^ word) * PRIME;
    sum ^= sum >> 32;
  };
  int64_t at = 0;
  for (; at + SUMS * WORD <= bytes; at += SUMS * WORD) {
    uint64_t words[SUMS];
    std::memcpy(words, data + at, sizeof words);
    for (int64_t i = 0; i < SUMS; ++i) add(sums[i], words[i]);
  }
  for (int64_t i = 0; at < bytes; at += WORD, ++i) {
    uint64_t word = 0;
    std::memcpy(&word, data + at, static_cast<size_t>(bytes - at < WORD ? bytes - at : WORD));
    add(sums[i], word);
  }
  for (int64_t i = 1; i < SUMS; ++i) add(sums[0], sums[i]);
  return sums[0];
}

int64_t fingerprint_cpu(const Tensor& weight, bool whole) {  // [N, K]
  check_cpu(weight, "weight");
  check_shape(weight, "weight", {ANY, ANY});
  check_dtype(weight, "weight", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Byte, ScalarType::Char});
  if (weight.numel() == 0) return 0;
  Matrix matrix{weight.const_data_ptr(), weight.size(0), weight.size(1), weight.stride(0), weight.stride(1)};
  if (matrix.row_stride < matrix.column_stride) {  // a weight and its transpose have one fingerprint
    std::swap(matrix.rows, matrix.columns);
    std::swap(matrix.row_stride, matrix.column_stride);
  }
  STD_TORCH_CHECK(matrix.data, "weight: got ", describe(weight), " without memory, expected a weight that can be read");
  if (whole) {
    const Tensor all = dense(weight);
    return static_cast<int64_t>(hash_all(static_cast<const char*>(all.const_data_ptr()), all.numel() * all.element_size()));
  }
  switch (weight.element_size()) {
    case 4: return static_cast<int64_t>(hash<uint32_t>(matrix));
    case 2: return static_cast<int64_t>(hash<uint16_t>(matrix));
    default: return static_cast<int64_t>(hash<uint8_t>(matrix));  // a quantised one
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) { m.impl("fingerprint_cpu", TORCH_BOX(&fingerprint_cpu)); }

}  // namespace fastlora

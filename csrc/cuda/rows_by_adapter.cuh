// Which rows are an adapter's, as fastlora/reference.py::lora_linear is told by order and offsets. An adapter's rows are a group, and nothing else is:
// groups are numbered 0 (rows of the base alone), 1 to S (adapter i is group i + 1) and S + 1 (rows whose adapter does not exist). Group g has the
// sorted places offsets[g] : offsets[g + 1], order[place] is the row. All is found on the card.
#pragma once

#include "product.cuh"

namespace fastlora {

/// The rows of each group. Numbers that cannot be are moved to the nearest that can, or the row is left alone.
struct RowsByAdapter {
  const int64_t *order, *offsets;
  int64_t M;
  int count;  // adapters

  __device__ int64_t begin(int group) const { return max(int64_t{0}, min(offsets[group], M)); }
  __device__ int64_t row(int64_t place) const {
    const int64_t row = order[place];
    return row < M ? max(row, int64_t{-1}) : -1;
  }
  __device__ bool adapts(int group) const { return group >= 1 && group <= count; }
  /// The first group that ends after the place.
  __device__ int of(int64_t place) const {
    int low = 0, high = count + 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (begin(middle + 1) > place) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
};

/// Rows of many adapters: what OneAdapter is for one. The pieces of group g, `size` places each, are numbered from begin(g) / size + g on: no two
/// groups have a number in common, some numbers are nobody's, and none depends on how many pieces other groups have. Likewise its padded places.
struct ManyAdapters : RowsByAdapter {
  static constexpr bool MANY = true;
  const Adapter* adapters;  // [S]
  int* group_of_row;        // [M padded to ROW_BLOCK]: what is noted; before, 0, and NO_ROW beyond M

  static constexpr int NO_ROW = -1;
  static int pieces(int64_t M, int64_t S, int size) { return static_cast<int>(M / size + S + 2); }

  __device__ int begin(int group) const { return static_cast<int>(RowsByAdapter::begin(group)); }

  __device__ Piece piece(int number, int size) const {
    int group = 0;
    for (int high = count + 1; group < high;) {
      const int middle = (group + high + 1) / 2;
      if (begin(middle) / size + middle <= number) {
        group = middle;
      } else {
        high = middle - 1;
      }
    }
    const int first = begin(group), within = number - group - first / size, from = first + within * size;
    const int padded = (first / PLACES + group) * PLACES + within * size;
    return {group, from, min(from + size, begin(group + 1)), padded, within, number - group - 1};
  }

  __device__ Adapter of(int group) const { return adapts(group) ? adapters[group - 1] : Adapter{0, 0, 0, 0, 1.f, 1.f}; }
  __device__ bool drops(const Adapter& adapter) const { return adapter.threshold != 0; }

  __device__ int row(const Piece& piece, int place) const {
    const int64_t row = place < piece.end ? RowsByAdapter::row(place) : -1;
    return static_cast<int>(row < 0 ? M : row);
  }

  __device__ void note(int row, int group) const { group_of_row[row] = group; }

  __device__ int after(int row, int group) const {
    const int4 four = four_of(row);
    const auto beyond = [&](int one) { return static_cast<unsigned>(one) - group - 1u; };
    const unsigned next = __reduce_min_sync(~0u, min(min(beyond(four.x), beyond(four.y)), min(beyond(four.z), beyond(four.w))));
    return next < static_cast<unsigned>(count + 1 - group) ? group + 1 + static_cast<int>(next) : 0;
  }
  __device__ bool alone(int row, int group) const {
    const int4 four = four_of(row);
    const auto fits = [&](int one) { return one == group || one == NO_ROW; };
    return __all_sync(~0u, fits(four.x) && fits(four.y) && fits(four.z) && fits(four.w));
  }
  __device__ bool exists(int group) const { return group <= count; }
  __device__ bool has(int row, int group) const { return group_of_row[row] == group; }

 private:
  __device__ int4 four_of(int row) const { return *reinterpret_cast<const int4*>(group_of_row + row + threadIdx.x % 32 * 4); }
};

}  // namespace fastlora

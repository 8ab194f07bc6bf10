// y = x Wᵀ + b + xa_i B_iᵀ for a few rows: bound by reading W once, whoever computes; and y_i += s xa_i Bᵀ for rows of one adapter that lie apart.
// Compiled once per instruction set, as vector.h.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "rows.h"
#include "vector.h"

namespace fastlora::FASTLORA_ISA {
namespace {

/// Calls body with the compile-time number that equals count, 1 to MOST.
template <int MOST, class Body>
inline void with_count(int64_t count, const Body& body) {
  if constexpr (MOST > 1) {
    if (count < MOST) return with_count<MOST - 1>(count, body);
  }
  body(std::integral_constant<int, MOST>{});
}

/// total[i G + g] = x[i] · w[g] for G rows of the weight, `stride` elements apart. Fetches the next G rows meanwhile.
template <int I, int G, class T>
inline void dot_rows(const T* const* x, const T* w, int64_t stride, int64_t K, Floats* total) {
  Floats sum[I * G] = {};
  const auto step = [&](int64_t l, auto load_at) __attribute__((always_inline)) {
    Floats rows[G], values[I];
    for_each<G>([&](auto g) __attribute__((always_inline)) {
      rows[g] = load_at(w + g * stride + l);
      __builtin_prefetch(w + (G + g) * stride + l, 0, 2);
    });
    for_each<I>([&](auto i) __attribute__((always_inline)) { values[i] = load_at(x[i] + l); });
    for_each<I * G>([&](auto j) __attribute__((always_inline)) { sum[j] += values[j / G] * rows[j % G]; });
  };
  int64_t l = 0;
  for (; l + WIDTH <= K; l += WIDTH) step(l, [](const T* from) __attribute__((always_inline)) { return load(from); });
  if (l < K) step(l, [&](const T* from) { return load_some(from, K - l); });
  for_each<I * G>([&](auto j) __attribute__((always_inline)) { total[j] = sum[j]; });
}

#if defined(__AVX512BF16__)
/// The same in bfloat16: two products a lane.
template <int I, int G>
inline void dot_rows(const BFloat16* const* x, const BFloat16* w, int64_t stride, int64_t K, Floats* total) {
  Floats sum[I * G] = {};
  for (int64_t l = 0; l < K; l += 2 * WIDTH) {
    const __mmask32 lanes = lanes_below(K - l);
    __m512i rows[G], values[I];
    for_each<G>([&](auto g) __attribute__((always_inline)) {
      rows[g] = load_pairs(w + g * stride + l, lanes);
      __builtin_prefetch(w + (G + g) * stride + l, 0, 2);
    });
    for_each<I>([&](auto i) __attribute__((always_inline)) { values[i] = load_pairs(x[i] + l, lanes); });
    for_each<I * G>([&](auto j) __attribute__((always_inline)) { sum[j] = dot(sum[j], values[j / G], rows[j % G]); });
  }
  for_each<I * G>([&](auto j) __attribute__((always_inline)) { total[j] = sum[j]; });
}
#endif

/// total[g] += xa · B[n + g].
template <int G, class B>
inline void dot_adapter(const float* xa, const B* lora_b, int64_t rank, int64_t n, Floats* total) {
  for (int g = 0; g < G; ++g) {
    const B* row = lora_b + (n + g) * rank;
    int64_t r = 0;
    for (; r + WIDTH <= rank; r += WIDTH) total[g] += load(xa + r) * load(row + r);
    if (r < rank) total[g] += load_some(xa + r, rank - r) * load_some(row + r, rank - r);
  }
}

template <int G>
inline void add_adapter(const FewRows& task, int64_t i, int64_t n, Floats* total) {
  if (!task.xa || !task.lora_b[i]) return;
  const float* xa = task.xa + i * task.xa_stride;
  switch (task.adapter_kind) {
    case Kind::FLOAT32: return dot_adapter<G>(xa, static_cast<const float*>(task.lora_b[i]), task.rank[i], n, total);
    case Kind::BFLOAT16: return dot_adapter<G>(xa, static_cast<const BFloat16*>(task.lora_b[i]), task.rank[i], n, total);
    case Kind::FLOAT16: return dot_adapter<G>(xa, static_cast<const Float16*>(task.lora_b[i]), task.rank[i], n, total);
  }
}

/// y[n : n + count] = values + bias, rounded once.
template <class T>
inline void finish(const FewRows& task, int64_t i, int64_t n, Floats values, int64_t count) {
  if (task.bias) values += load_some(static_cast<const T*>(task.bias) + n, count);
  if (task.wide) {
    store_some(static_cast<float*>(task.y) + i * task.y_stride + n, values, count);
  } else {
    store_some(static_cast<T*>(task.y) + i * task.y_stride + n, values, count);
  }
}

/// The columns n to n + G of y, for I rows.
template <int I, int G, class T>
void few_rows_tile(const FewRows& task, int64_t n) {
  const T* x[I];
  for (int i = 0; i < I; ++i) x[i] = static_cast<const T*>(task.x) + i * task.x_stride;
  const T* w = static_cast<const T*>(task.weight) + n * task.weight_stride;
  constexpr int SUMS = (I * G + WIDTH - 1) / WIDTH * WIDTH;
  Floats total[SUMS] = {};
  dot_rows<I, G>(x, w, task.weight_stride, task.in, total);
  for (int i = 0; i < I; ++i) add_adapter<G>(task, i, n, total + i * G);
  float flat[SUMS];
  for (int i = 0; i < SUMS; i += WIDTH) store(flat + i, sums(total + i));
  for (int i = 0; i < I; ++i) finish<T>(task, i, n, load_some(flat + i * G, G), G);
}

/// W lies by column (W[n][k] at k · weight_stride + n): COLUMNS columns of y at a time, summed in the first-level cache while W streams by.
template <class T>
void few_rows_by_column(const FewRows& task, int64_t begin, int64_t end) {
  constexpr int64_t COLUMNS = 256;
  alignas(64) float sum[FEW_ROWS][COLUMNS];
  for (int64_t n = begin; n < end; n += COLUMNS) {
    const int64_t columns = end - n < COLUMNS ? end - n : COLUMNS;
    for (int64_t i = 0; i < task.rows; ++i) {
      for (int64_t l = 0; l < COLUMNS; l += WIDTH) store(sum[i] + l, Floats{});
    }
    const T* w = static_cast<const T*>(task.weight) + n;
    for (int64_t k = 0; k < task.in; k += 4) {
      const int64_t depth = task.in - k < 4 ? task.in - k : 4;
      with_count<4>(depth, [&](auto deep) {
        float x[FEW_ROWS][4];
        for (int64_t i = 0; i < task.rows; ++i) {
          const Floats values = load_some(static_cast<const T*>(task.x) + i * task.x_stride + k, deep());
          for (int d = 0; d < deep(); ++d) x[i][d] = values[d];
        }
        const auto step = [&](int64_t l, int64_t count) {
          Floats rows[deep()];
          for (int d = 0; d < deep(); ++d) {
            const T* from = w + (k + d) * task.weight_stride + l;
            rows[d] = count == WIDTH ? load(from) : load_some(from, count);
          }
          for (int64_t i = 0; i < task.rows; ++i) {
            Floats total = load(sum[i] + l);
            for (int d = 0; d < deep(); ++d) total += x[i][d] * rows[d];
            store(sum[i] + l, total);
          }
        };
        int64_t l = 0;
        for (; l + WIDTH <= columns; l += WIDTH) step(l, WIDTH);
        if (l < columns) step(l, columns - l);
      });
    }
    for (int64_t i = 0; i < task.rows; ++i) {
      for (int64_t l = 0; l < columns; l += WIDTH) {
        const int64_t count = columns - l < WIDTH ? columns - l : WIDTH;
        Floats values = load(sum[i] + l);
        for (int64_t g = 0; g < count; ++g) {
          Floats update[WIDTH] = {};
          add_adapter<1>(task, i, n + l + g, update);
          values[g] += sums(update)[0];
        }
        finish<T>(task, i, n + l, values, count);
      }
    }
  }
}

/// Rows n to n + count of B_i, the ranks from r on: lane c of ranks[d] is B[n + c][r + d]; zeros for what is not there.
template <bool WHOLE, class B>
__attribute__((always_inline)) inline void load_ranks(const B* lora_b, int64_t rank, int64_t n, int64_t count, int64_t r, Floats* ranks) {
  const B* from = lora_b + n * rank + r;
  const int64_t depth = rank - r;
  for_each<WIDTH>([&](auto c) __attribute__((always_inline)) {
    const bool there = WHOLE || c() < count;
    ranks[c()] = !there ? Floats{} : depth >= WIDTH ? load(from + c() * rank) : load_some(from + c() * rank, depth);
  });
  transpose(ranks);
}

/// y[n : n + count] += s part, of one row.
template <bool WHOLE, class T>
inline void add_update(const FewRowsUpdate& task, int64_t i, int64_t n, int64_t count, Floats part) {
  T* to = static_cast<T*>(task.y[i]) + n;
  if (WHOLE) return store(to, load(to) + task.scale * part);
  store_some(to, load_some(to, count) + task.scale * part, count);
}

/// The columns n to n + count of y's rows, a vector of them or, where not WHOLE, fewer; lanes are columns.
template <int M, bool WHOLE, class T, class B>
void few_rows_update_together(const FewRowsUpdate& task, int64_t n, int64_t count) {
  const B* lora_b = static_cast<const B*>(task.lora_b);
  Floats total[M] = {};
  for (int64_t r = 0; r < task.rank; r += WIDTH) {
    Floats ranks[WIDTH];
    load_ranks<WHOLE>(lora_b, task.rank, n, count, r, ranks);
    const int64_t depth = task.rank - r < WIDTH ? task.rank - r : WIDTH;
    Floats part[M] = {};  // summed by itself, so that rounding grows with the parts, not with R
    for (int64_t d = 0; d < depth; ++d) {
      for_each<M>([&](auto i) __attribute__((always_inline)) { part[i] += task.xa[i][r + d] * ranks[d]; });
    }
    for (int i = 0; i < M; ++i) total[i] += part[i];
  }
  for (int i = 0; i < M; ++i) add_update<WHOLE, T>(task, i, n, count, total[i]);
}

/// The same a row at a time; lanes are ranks, and sums over them are made once for all ranks.
template <bool WHOLE, class T, class B>
void few_rows_update_by_row(const FewRowsUpdate& task, int64_t n, int64_t count) {
  const B* from = static_cast<const B*>(task.lora_b) + n * task.rank;
  const int64_t whole = task.rank / WIDTH * WIDTH;
  for (int64_t i = 0; i < task.rows; ++i) {
    const float* xa = task.xa[i];
    Floats total[WIDTH] = {};
    const auto add = [&](int64_t r, auto load_at) __attribute__((always_inline)) {
      const Floats values = load_at(xa + r);
      for_each<WIDTH>([&](auto c) __attribute__((always_inline)) {
        if (WHOLE || c() < count) total[c()] += values * load_at(from + c() * task.rank + r);
        __builtin_prefetch(from + (WIDTH + c()) * task.rank + r, 0, 2);
      });
    };
    for (int64_t r = 0; r < whole; r += WIDTH) add(r, [](const auto* at) __attribute__((always_inline)) { return load(at); });
    if (whole < task.rank) add(whole, [&](const auto* at) __attribute__((always_inline)) { return load_some(at, task.rank - whole); });
    add_update<WHOLE, T>(task, i, n, count, sums(total));
  }
}

/// Whether rows are better taken one at a time: a transposition of B costs four times its products with a row, sums over lanes as much once a row.
inline bool is_by_row(const FewRowsUpdate& task) { return 5 * task.rows < task.rank; }

template <class T, class B>
void few_rows_update_of(const FewRowsUpdate& task, int64_t begin, int64_t end) {
  const int64_t whole = begin + (end - begin) / WIDTH * WIDTH;
  if (is_by_row(task)) {
    for (int64_t n = begin; n < whole; n += WIDTH) few_rows_update_by_row<true, T, B>(task, n, WIDTH);
    if (whole < end) few_rows_update_by_row<false, T, B>(task, whole, end - whole);
    return;
  }
  with_count<FEW_ROWS>(task.rows, [&](auto rows) {
    for (int64_t n = begin; n < whole; n += WIDTH) few_rows_update_together<rows(), true, T, B>(task, n, WIDTH);
    if (whole < end) few_rows_update_together<rows(), false, T, B>(task, whole, end - whole);
  });
}

void few_rows_update(const FewRowsUpdate& task, int64_t begin, int64_t end) {
  with_kind(task.kind, [&](auto* type) {
    with_kind(task.adapter_kind, [&](auto* adapter_type) {
      few_rows_update_of<std::remove_pointer_t<decltype(type)>, std::remove_pointer_t<decltype(adapter_type)>>(task, begin, end);
    });
  });
}

template <class T>
void few_rows_of(const FewRows& task, int64_t begin, int64_t end) {
  if (task.by_column) return few_rows_by_column<T>(task, begin, end);
  with_count<FEW_ROWS>(task.rows, [&](auto rows) {
    constexpr int AT_ONCE = REGISTERS == 32 ? (rows() <= 6 ? 4 : 3) : (rows() <= 2 ? 4 : 2);  // rows of W at once: rows x AT_ONCE sums in registers
    int64_t n = begin;
    for (; n + AT_ONCE <= end; n += AT_ONCE) few_rows_tile<rows(), AT_ONCE, T>(task, n);
    for (; n < end; ++n) few_rows_tile<rows(), 1, T>(task, n);
  });
}

void few_rows(const FewRows& task, int64_t begin, int64_t end) {
  switch (task.kind) {
    case Kind::FLOAT32: return few_rows_of<float>(task, begin, end);
    case Kind::BFLOAT16: return few_rows_of<BFloat16>(task, begin, end);
    case Kind::FLOAT16: return few_rows_of<Float16>(task, begin, end);
  }
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

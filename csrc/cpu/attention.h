// out = softmax(scale q kᵀ) v of one segment of tokens and one head of keys, for all heads of queries that share it; and its gradients. Compiled once
// per instruction set, as vector.h.
//
// The segment's keys and values are widened to float32 once; they stay in the second-level cache. A block of queries then meets a block of keys at a
// time, with a running maximum and sum (Milakov and Gimelshein 2018, Online normalizer calculation for softmax; Dao et al. 2022, FlashAttention).
// The backward computes the probabilities again, from lse = log sum exp. All sums are float32, of at most BLOCK products before they are added.
#pragma once

#include "few_rows.h"
#include "product.h"
#include "rows.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t QUERIES = 8 * TILE_ROWS;   // of a block
constexpr int64_t KEYS = 2 * PANEL_COLUMNS;  // of a block
constexpr float NOWHERE = -1e30f;            // a masked score; what differs from the largest by more than 87 counts nothing

inline int64_t padded(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

inline int64_t fewer(int64_t a, int64_t b) { return a < b ? a : b; }

/// A matrix in the room: rows of `stride` floats.
struct Panel {
  float* data;
  int64_t stride;

  float* row(int64_t i) const { return data + i * stride; }
};

/// c [count, columns] (+)= a b: element (i, l) of a lies at a[i · down + l · right]; count is at most TILE_ROWS, columns are padded to vectors.
inline void multiply(int64_t count, int64_t columns, int64_t depth, const float* a, int64_t down, int64_t right, Panel b, Panel c, bool add) {
  with_count<TILE_ROWS>(count, [&](auto rows) {
    for (int64_t column = 0; column < columns; column += TILE_COLUMNS) {
      with_count<TILE_VECTORS>(fewer(TILE_VECTORS, (columns - column + WIDTH - 1) / WIDTH), [&](auto vectors) {
        constexpr int R = rows(), V = vectors();
        Floats total[R * V] = {};
        for (int64_t l = 0; l < depth; ++l) {
          Floats values[V];
          for_each<V>([&](auto j) __attribute__((always_inline)) { values[j()] = load(b.row(l) + column + j() * WIDTH); });
          for_each<R>([&](auto i) __attribute__((always_inline)) {
            const float coefficient = a[i() * down + l * right];
            for_each<V>([&](auto j) __attribute__((always_inline)) { total[i() * V + j()] += coefficient * values[j()]; });
          });
        }
        for_each<R * V>([&](auto n) __attribute__((always_inline)) {
          float* to = c.row(n() / V) + column + n() % V * WIDTH;
          store(to, add ? load(to) + total[n()] : total[n()]);
        });
      });
    }
  });
}

/// The rows of one head, widened; zeros up to the stride.
template <class T>
void widen(const void* from, const int64_t* stride, int64_t head, int64_t begin, int64_t count, int64_t width, Panel to) {
  for (int64_t i = 0; i < count; ++i) {
    const T* row = static_cast<const T*>(from) + (begin + i) * stride[0] + head * stride[1];
    for_each_vector(width, [&](int64_t l, int64_t left) { store(to.row(i) + l, load_up_to(row + l, left)); });
  }
}

template <class T>
void narrow_rows(Panel from, int64_t count, int64_t width, T* to, int64_t to_stride) {
  for (int64_t i = 0; i < count; ++i) {
    for_each_vector(width, [&](int64_t l, int64_t left) { store_up_to(to + i * to_stride + l, load(from.row(i) + l), left); });
  }
}

/// to [width, padded tokens] = fromᵀ [tokens, width]; zeros for the tokens that are not there.
void turn(Panel from, int64_t tokens, int64_t width, Panel to) {
  for (int64_t i = 0; i < to.stride; i += WIDTH) {
    for (int64_t l = 0; l < padded(width, WIDTH); l += WIDTH) {
      Floats block[WIDTH];
      for_each<WIDTH>([&](auto n) __attribute__((always_inline)) { block[n()] = i + n() < tokens ? load(from.row(i + n()) + l) : Floats{}; });
      transpose(block);
      for_each<WIDTH>([&](auto n) __attribute__((always_inline)) { store(to.row(l + n()) + i, block[n()]); });
    }
  }
}

/// Hands out the room, in whole vectors.
struct Room {
  float* next;

  Panel panel(int64_t rows, int64_t stride) {
    const Panel taken{next, stride};
    next += padded(rows, WIDTH) * stride;
    return taken;
  }
};

struct Sizes {
  int64_t tokens, width;

  int64_t columns() const { return padded(width, WIDTH); }      // of a row of q, k or v
  int64_t keys() const { return padded(tokens, PANEL_COLUMNS); }  // of a row of kᵀ
};

int64_t attention_room(int64_t tokens, int64_t width, bool backward) {
  const Sizes sizes{tokens, width};
  const int64_t whole = padded(tokens, WIDTH) * sizes.columns(), turned = sizes.columns() * sizes.keys();
  const int64_t rows = padded(QUERIES, WIDTH) * sizes.columns(), scores = padded(QUERIES, WIDTH) * KEYS;
  return backward ? 4 * whole + 2 * turned + 3 * rows + 2 * scores : 2 * whole + turned + 2 * rows + scores;
}

/// e^x, and 0 where that is below e^-87.
inline Floats probability(Floats x) { return (Floats)choose(x < -87.0f, Words{}, (Words)exponential(x)); }

/// Of a block of queries that begins at `query` and one of keys that begins at `key`: how many keys row i may look at, of `keys` there.
inline int64_t seen(bool causal, int64_t query, int64_t key, int64_t keys, int64_t i) {
  return causal ? fewer(keys, query + i + 1 - key) : keys;
}

/// scores [queries, KEYS] = a bᵀ for the keys from `key` on, as far as a tile of queries sees any of them.
inline void score(Panel a, int64_t width, Panel turned, bool causal, int64_t query, int64_t queries, int64_t key, int64_t keys, Panel scores) {
  for (int64_t i = 0; i < queries; i += TILE_ROWS) {
    const int64_t count = fewer(TILE_ROWS, queries - i), last = seen(causal, query, key, keys, i + count - 1);
    if (last <= 0) continue;
    multiply(count, last, width, a.row(i), a.stride, 1, {turned.data + key, turned.stride}, {scores.row(i), scores.stride}, false);
  }
}

template <class T>
void attention_of(const Attention& task, int64_t begin, int64_t end, int64_t kv_head, float* memory) {
  const Sizes sizes{end - begin, task.width};
  const int64_t group = task.heads / task.kv_heads, columns = sizes.columns(), width = task.width;
  Room room{memory};
  const Panel keys = room.panel(sizes.tokens, columns), values = room.panel(sizes.tokens, columns);
  const Panel turned = room.panel(columns, sizes.keys());
  const Panel query = room.panel(QUERIES, columns), total = room.panel(QUERIES, columns), scores = room.panel(QUERIES, KEYS);
  widen<T>(task.k, task.k_stride, kv_head, begin, sizes.tokens, width, keys);
  widen<T>(task.v, task.v_stride, kv_head, begin, sizes.tokens, width, values);
  turn(keys, sizes.tokens, width, turned);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t i0 = 0; i0 < sizes.tokens; i0 += QUERIES) {
      const int64_t queries = fewer(QUERIES, sizes.tokens - i0), limit = task.causal ? i0 + queries : sizes.tokens;
      float highest[QUERIES], sum[QUERIES];
      for (int64_t i = 0; i < queries; ++i) highest[i] = NOWHERE, sum[i] = 0;
      widen<T>(task.q, task.q_stride, head, begin + i0, queries, width, query);
      for (int64_t j0 = 0; j0 < limit; j0 += KEYS) {
        const int64_t there = fewer(KEYS, limit - j0);
        score(query, width, turned, task.causal, i0, queries, j0, there, scores);
        for (int64_t i = 0; i < queries; ++i) {
          const int64_t count = seen(task.causal, i0, j0, there, i);
          // Where the tile's other rows see more, this one's share of it is zeros.
          const int64_t tile = i / TILE_ROWS * TILE_ROWS + TILE_ROWS - 1, depth = seen(task.causal, i0, j0, there, fewer(tile, queries - 1));
          float* row = scores.row(i);
          if (depth <= 0) continue;
          Floats most = Floats{} + highest[i];
          for (int64_t j = 0; j < depth; j += WIDTH) {
            const Floats value = task.scale * load(row + j);
            store(row + j, value);
          }
          for (int64_t j = count < 0 ? 0 : count; j < padded(depth, WIDTH); ++j) row[j] = NOWHERE;
          for (int64_t j = 0; j < depth; j += WIDTH) {
            const Floats value = load(row + j);
            most = (Floats)choose(value > most, (Words)value, (Words)most);
          }
          float now = most[0];
          for (int n = 1; n < WIDTH; ++n) now = most[n] > now ? most[n] : now;
          Floats sums{};
          for (int64_t j = 0; j < depth; j += WIDTH) {
            const Floats p = probability(load(row + j) - now);
            store(row + j, p);
            sums += p;
          }
          float part = 0;
          for (int n = 0; n < WIDTH; ++n) part += sums[n];
          const float before = j0 ? probability(Floats{} + (highest[i] - now))[0] : 0;
          highest[i] = now;
          sum[i] = sum[i] * before + part;
          if (j0) {
            for (int64_t l = 0; l < columns; l += WIDTH) store(total.row(i) + l, load(total.row(i) + l) * before);
          }
        }
        for (int64_t i = 0; i < queries; i += TILE_ROWS) {
          const int64_t count = fewer(TILE_ROWS, queries - i), depth = seen(task.causal, i0, j0, there, i + count - 1);
          if (depth <= 0) continue;
          multiply(count, width, depth, scores.row(i), KEYS, 1, {values.row(j0), columns}, {total.row(i), columns}, j0 != 0);
        }
      }
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t row = (begin + i0 + i) * task.heads + head;
        for (int64_t l = 0; l < columns; l += WIDTH) store(total.row(i) + l, load(total.row(i) + l) / sum[i]);
        task.lse[row] = highest[i] + __builtin_logf(sum[i]);
      }
      narrow_rows(total, queries, width, static_cast<T*>(task.out) + ((begin + i0) * task.heads + head) * width, task.heads * width);
    }
  }
}

/// dV = Pᵀ dout;  dS = scale P (dout Vᵀ - rowsum(dout out));  dQ = dS K;  dK = dSᵀ Q.
template <class T>
void attention_gradients_of(const Attention& task, int64_t begin, int64_t end, int64_t kv_head, float* memory) {
  const Sizes sizes{end - begin, task.width};
  const int64_t group = task.heads / task.kv_heads, columns = sizes.columns(), width = task.width;
  Room room{memory};
  const Panel keys = room.panel(sizes.tokens, columns), values = room.panel(sizes.tokens, columns);
  const Panel dk = room.panel(sizes.tokens, columns), dv = room.panel(sizes.tokens, columns);
  const Panel turned_keys = room.panel(columns, sizes.keys()), turned_values = room.panel(columns, sizes.keys());
  const Panel query = room.panel(QUERIES, columns), dout = room.panel(QUERIES, columns), dq = room.panel(QUERIES, columns);
  const Panel scores = room.panel(QUERIES, KEYS), dscores = room.panel(QUERIES, KEYS);
  widen<T>(task.k, task.k_stride, kv_head, begin, sizes.tokens, width, keys);
  widen<T>(task.v, task.v_stride, kv_head, begin, sizes.tokens, width, values);
  turn(keys, sizes.tokens, width, turned_keys);
  turn(values, sizes.tokens, width, turned_values);
  for (int64_t i = 0; i < sizes.tokens * columns; i += WIDTH) store(dk.data + i, Floats{}), store(dv.data + i, Floats{});
  const int64_t dense[2] = {task.heads * width, width};
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t i0 = 0; i0 < sizes.tokens; i0 += QUERIES) {
      const int64_t queries = fewer(QUERIES, sizes.tokens - i0), limit = task.causal ? i0 + queries : sizes.tokens;
      widen<T>(task.q, task.q_stride, head, begin + i0, queries, width, query);
      widen<T>(task.dout, dense, head, begin + i0, queries, width, dout);
      float along[QUERIES];
      const T* out = static_cast<const T*>(task.out) + ((begin + i0) * task.heads + head) * width;
      for (int64_t i = 0; i < queries; ++i) {
        along[i] = sum_over(width, [&](int64_t l, int64_t count) { return load(dout.row(i) + l) * load_up_to(out + i * dense[0] + l, count); });
      }
      for (int64_t j0 = 0; j0 < limit; j0 += KEYS) {
        const int64_t there = fewer(KEYS, limit - j0);
        score(query, width, turned_keys, task.causal, i0, queries, j0, there, scores);
        score(dout, width, turned_values, task.causal, i0, queries, j0, there, dscores);
        for (int64_t i = 0; i < queries; ++i) {
          const float lse = task.lse[(begin + i0 + i) * task.heads + head];
          int64_t count = seen(task.causal, i0, j0, there, i);
          if (count < 0) count = 0;
          for (int64_t j = 0; j < count; j += WIDTH) {
            const Floats p = probability(load(scores.row(i) + j) * task.scale - lse);
            store(scores.row(i) + j, p);
            store(dscores.row(i) + j, p * (load(dscores.row(i) + j) - along[i]) * task.scale);
          }
          for (int64_t j = count; j < padded(there, WIDTH); ++j) scores.row(i)[j] = 0, dscores.row(i)[j] = 0;
        }
        for (int64_t j = 0; j < there; j += TILE_ROWS) {
          const int64_t count = fewer(TILE_ROWS, there - j);
          const int64_t first = task.causal && j0 + j > i0 ? j0 + j - i0 : 0;  // the first query that sees the tile's first key
          const int64_t depth = queries - first;
          if (depth <= 0) break;
          multiply(count, width, depth, scores.row(first) + j, 1, KEYS, {dout.row(first), columns}, {dv.row(j0 + j), columns}, true);
          multiply(count, width, depth, dscores.row(first) + j, 1, KEYS, {query.row(first), columns}, {dk.row(j0 + j), columns}, true);
        }
        for (int64_t i = 0; i < queries; i += TILE_ROWS) {
          const int64_t count = fewer(TILE_ROWS, queries - i), depth = seen(task.causal, i0, j0, there, i + count - 1);
          if (depth <= 0) continue;
          multiply(count, width, depth, dscores.row(i), KEYS, 1, {keys.row(j0), columns}, {dq.row(i), columns}, j0 != 0);
        }
      }
      narrow_rows(dq, queries, width, static_cast<T*>(task.dq) + ((begin + i0) * task.heads + head) * width, dense[0]);
    }
  }
  const int64_t place = (begin * task.kv_heads + kv_head) * width;
  narrow_rows(dk, sizes.tokens, width, static_cast<T*>(task.dk) + place, task.kv_heads * width);
  narrow_rows(dv, sizes.tokens, width, static_cast<T*>(task.dv) + place, task.kv_heads * width);
}

void attention(const Attention& task, int64_t begin, int64_t end, int64_t kv_head, float* room) {
  with_kind(task.kind, [&](auto* type) { attention_of<std::remove_pointer_t<decltype(type)>>(task, begin, end, kv_head, room); });
}

void attention_backward(const Attention& task, int64_t begin, int64_t end, int64_t kv_head, float* room) {
  with_kind(task.kind, [&](auto* type) { attention_gradients_of<std::remove_pointer_t<decltype(type)>>(task, begin, end, kv_head, room); });
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

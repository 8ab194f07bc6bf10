// out = softmax(scale q kᵀ) v of some queries and one head of keys, for all heads of queries that share it; and its gradients. Compiled once per
// instruction set, as vector.h.
//
// A part's keys and values are widened to float32 once; they stay in the second-level cache. A block of queries then meets a block of keys at a
// time, the ancestors' before its own, with a running maximum and sum (Milakov and Gimelshein 2018, Online normalizer calculation for softmax; Dao et al. 2022, FlashAttention).
// The backward computes the probabilities again, from lse = log sum exp. All sums are float32, of at most BLOCK products before they are added.
#pragma once

#include "few_rows.h"
#include "register_tile.h"
#include "rows.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t QUERIES = 8 * TILE_ROWS;    // of a block
constexpr int64_t KEYS = 2 * PANEL_COLUMNS;   // of a block
constexpr float NOWHERE = -__builtin_inff();  // a masked score: below all that are seen; what differs from the largest by more than 87 counts nothing

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
        const auto left = [&](auto i, int64_t l) __attribute__((always_inline)) { return a[i() * down + l * right]; };
        const auto values = [&](int64_t l, auto j) __attribute__((always_inline)) { return load(b.row(l) + column + j() * WIDTH); };
        add_products<R, V>(0, depth, left, values, total);
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

/// Where the keys of one segment lie in the room, widened, and the sums of their gradients.
struct Stretch {
  Panel keys, values, turned_keys, turned_values, dk, dv;  // the last three are a backward's
};

/// The next in the room; the sums where they are left for others.
inline Stretch next_stretch(Room& room, const Attention& task, int64_t kv_head, const AttentionKeys& of, bool backward) {
  const int64_t columns = padded(task.width, WIDTH), across = padded(of.count, PANEL_COLUMNS);
  Stretch stretch{room.panel(of.count, columns), room.panel(of.count, columns), room.panel(columns, across), {}, {}, {}};
  if (!backward) return stretch;
  stretch.turned_values = room.panel(columns, across);
  if (of.sum < 0) {
    stretch.dk = room.panel(of.count, columns), stretch.dv = room.panel(of.count, columns);
  } else {
    float* left = task.sums + kv_head * task.sum_stride + of.sum;
    stretch.dk = {left, task.sum_columns}, stretch.dv = {left + of.count * task.sum_columns, task.sum_columns};
  }
  return stretch;
}

int64_t attention_room(const AttentionPart& part, int64_t width, bool backward) {
  const int64_t columns = padded(width, WIDTH);
  const auto room_of = [&](const AttentionKeys& keys) {
    const int64_t whole = padded(keys.count, WIDTH) * columns, turned = columns * padded(keys.count, PANEL_COLUMNS);
    return backward ? 4 * whole + 2 * turned : 2 * whole + turned;
  };
  int64_t before = 0, most = 0;
  for (int64_t i = 0; i < part.ancestor_count; ++i) before += room_of(part.ancestors[i]);
  for (int64_t i = 0; i < part.query_count; ++i) {
    const int64_t own = room_of(part.queries[i].keys);
    most = own > most ? own : most;
  }
  const int64_t rows = padded(QUERIES, WIDTH) * columns, scores = padded(QUERIES, WIDTH) * KEYS;
  return before + most + (backward ? 3 * rows + 2 * scores : 2 * rows + scores);
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

/// The keys and values of a segment in their places, and zeros where the gradients are summed.
template <class T>
Stretch load_stretch(Room& room, const Attention& task, int64_t kv_head, const AttentionKeys& of, bool backward) {
  const Stretch stretch = next_stretch(room, task, kv_head, of, backward);
  widen<T>(task.k, task.k_stride, kv_head, of.begin, of.count, task.width, stretch.keys);
  widen<T>(task.v, task.v_stride, kv_head, of.begin, of.count, task.width, stretch.values);
  turn(stretch.keys, of.count, task.width, stretch.turned_keys);
  if (!backward) return stretch;
  turn(stretch.values, of.count, task.width, stretch.turned_values);
  for (int64_t i = 0; i < of.count * stretch.dk.stride; i += WIDTH) store(stretch.dk.data + i, Floats{}), store(stretch.dv.data + i, Floats{});
  return stretch;
}

/// Calls body(stretch, causal, limit) for all that a block of queries sees, the eldest ancestor first: of each the first `limit` keys.
template <class Body>
inline void for_each_seen(
    Room room, const Attention& task, const AttentionPart& part, const AttentionQueries& own, int64_t kv_head, bool backward, int64_t end,
    const Body& body) {
  for (int64_t i = 0; i <= part.ancestor_count; ++i) {
    const bool is_own = i == part.ancestor_count, causal = is_own && task.causal;
    const AttentionKeys& keys = is_own ? own.keys : part.ancestors[i];
    body(next_stretch(room, task, kv_head, keys, backward), causal, causal ? end : keys.count);
  }
}

template <class T>
void attention_of(const Attention& task, const AttentionPart& part, int64_t kv_head, float* memory) {
  const int64_t group = task.heads / task.kv_heads, width = task.width, columns = padded(width, WIDTH);
  Room room{memory};
  const Panel query = room.panel(QUERIES, columns), total = room.panel(QUERIES, columns), scores = room.panel(QUERIES, KEYS);
  const Room stretches = room;
  for (int64_t i = 0; i < part.ancestor_count; ++i) load_stretch<T>(room, task, kv_head, part.ancestors[i], false);
  for (int64_t of = 0; of < part.query_count; ++of) {
    const AttentionQueries& own = part.queries[of];
    Room last = room;
    load_stretch<T>(last, task, kv_head, own.keys, false);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int64_t i0 = 0; i0 < own.count; i0 += QUERIES) {
        const int64_t queries = fewer(QUERIES, own.count - i0), place = own.first + i0;
        float highest[QUERIES], sum[QUERIES];
        for (int64_t i = 0; i < queries; ++i) highest[i] = NOWHERE, sum[i] = 0;
        widen<T>(task.q, task.q_stride, head, own.begin + i0, queries, width, query);
        bool met = false;  // keys before these
        for_each_seen(stretches, task, part, own, kv_head, false, place + queries, [&](const Stretch& stretch, bool causal, int64_t limit) {
          for (int64_t j0 = 0; j0 < limit; j0 += KEYS) {
            const int64_t there = fewer(KEYS, limit - j0);
            score(query, width, stretch.turned_keys, causal, place, queries, j0, there, scores);
            for (int64_t i = 0; i < queries; ++i) {
              const int64_t count = seen(causal, place, j0, there, i);
              // Where the tile's other rows see more, this one's share of it is zeros.
              const int64_t tile = i / TILE_ROWS * TILE_ROWS + TILE_ROWS - 1, depth = seen(causal, place, j0, there, fewer(tile, queries - 1));
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
              const float base = now == NOWHERE ? 0 : now;  // nothing counts yet, and -inf less itself would be NaN for good
              Floats sums{};
              for (int64_t j = 0; j < depth; j += WIDTH) {
                const Floats p = probability(load(row + j) - base);
                store(row + j, p);
                sums += p;
              }
              float added = 0;
              for (int n = 0; n < WIDTH; ++n) added += sums[n];
              const float before = met ? probability(Floats{} + (highest[i] - base))[0] : 0;
              highest[i] = now;
              sum[i] = sum[i] * before + added;
              if (met) {
                for (int64_t l = 0; l < columns; l += WIDTH) store(total.row(i) + l, load(total.row(i) + l) * before);
              }
            }
            for (int64_t i = 0; i < queries; i += TILE_ROWS) {
              const int64_t count = fewer(TILE_ROWS, queries - i), depth = seen(causal, place, j0, there, i + count - 1);
              if (depth <= 0) continue;
              multiply(count, width, depth, scores.row(i), KEYS, 1, {stretch.values.row(j0), columns}, {total.row(i), columns}, met);
            }
            met = true;
          }
        });
        for (int64_t i = 0; i < queries; ++i) {
          const int64_t row = (own.begin + i0 + i) * task.heads + head;
          for (int64_t l = 0; l < columns; l += WIDTH) store(total.row(i) + l, load(total.row(i) + l) / sum[i]);
          task.lse[row] = highest[i] + __builtin_logf(sum[i]);
        }
        narrow_rows(total, queries, width, static_cast<T*>(task.out) + ((own.begin + i0) * task.heads + head) * width, task.heads * width);
      }
    }
  }
}

template <class T>
void narrow_sums(const Attention& task, int64_t kv_head, const AttentionKeys& of, const Stretch& stretch) {
  if (of.sum >= 0) return;
  const int64_t place = (of.begin * task.kv_heads + kv_head) * task.width;
  narrow_rows(stretch.dk, of.count, task.width, static_cast<T*>(task.dk) + place, task.kv_heads * task.width);
  narrow_rows(stretch.dv, of.count, task.width, static_cast<T*>(task.dv) + place, task.kv_heads * task.width);
}

/// Of each query one over the sum of its probabilities as lse gives them, and rowsum(P dP) of those that add up to one, dP = dout Vᵀ.
///
/// lse and out are rounded. Where one key has nearly all the weight, dS is a small difference of dP and rowsum(dout out), and errs by as much;
/// the sums of the very P and dP that it is made of do not (reference.py::attention_backward).
template <class ForEach>
void sum_rows(const Attention& task, const AttentionQueries& own, int64_t i0, int64_t queries, int64_t head, const Panel& query, const Panel& dout,
              const Panel& scores, const Panel& dscores, const ForEach& for_each, float* factor, float* along) {
  const int64_t place = own.first + i0;
  for (int64_t i = 0; i < queries; ++i) factor[i] = along[i] = 0;
  for_each([&](const Stretch& stretch, bool causal, int64_t limit) {
    for (int64_t j0 = 0; j0 < limit; j0 += KEYS) {
      const int64_t there = fewer(KEYS, limit - j0);
      score(query, task.width, stretch.turned_keys, causal, place, queries, j0, there, scores);
      score(dout, task.width, stretch.turned_values, causal, place, queries, j0, there, dscores);
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t count = seen(causal, place, j0, there, i);
        if (count <= 0) continue;
        const float lse = task.lse[(own.begin + i0 + i) * task.heads + head];
        for (int64_t j = 0; j < count; j += WIDTH) store(scores.row(i) + j, probability(load(scores.row(i) + j) * task.scale - lse));
        factor[i] += sum_over(count, [&](int64_t j, int64_t left) { return load_up_to(scores.row(i) + j, left); });
        along[i] += sum_over(count, [&](int64_t j, int64_t left) { return load_up_to(scores.row(i) + j, left) * load_up_to(dscores.row(i) + j, left); });
      }
    }
  });
  for (int64_t i = 0; i < queries; ++i) factor[i] = 1 / factor[i], along[i] *= factor[i];
}

/// dV = Pᵀ dout;  dS = scale P (dP - rowsum(P dP)), dP = dout Vᵀ;  dQ = dS K;  dK = dSᵀ Q. Of 16 bits rowsum(P dP) is rowsum(dout out), which eager
/// knows no better.
template <class T>
void attention_gradients_of(const Attention& task, const AttentionPart& part, int64_t kv_head, float* memory) {
  const int64_t group = task.heads / task.kv_heads, width = task.width, columns = padded(width, WIDTH);
  Room room{memory};
  const Panel query = room.panel(QUERIES, columns), dout = room.panel(QUERIES, columns), dq = room.panel(QUERIES, columns);
  const Panel scores = room.panel(QUERIES, KEYS), dscores = room.panel(QUERIES, KEYS);
  const Room stretches = room;
  for (int64_t i = 0; i < part.ancestor_count; ++i) load_stretch<T>(room, task, kv_head, part.ancestors[i], true);
  const int64_t dense[2] = {task.heads * width, width};
  for (int64_t of = 0; of < part.query_count; ++of) {
    const AttentionQueries& own = part.queries[of];
    Room last = room;
    const Stretch own_stretch = load_stretch<T>(last, task, kv_head, own.keys, true);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (int64_t i0 = 0; i0 < own.count; i0 += QUERIES) {
        const int64_t queries = fewer(QUERIES, own.count - i0), place = own.first + i0;
        widen<T>(task.q, task.q_stride, head, own.begin + i0, queries, width, query);
        widen<T>(task.dout, dense, head, own.begin + i0, queries, width, dout);
        const auto for_each = [&](const auto& body) { for_each_seen(stretches, task, part, own, kv_head, true, place + queries, body); };
        float along[QUERIES], factor[QUERIES];
        const T* out = static_cast<const T*>(task.out) + ((own.begin + i0) * task.heads + head) * width;
        if constexpr (std::is_same_v<T, float>) {
          sum_rows(task, own, i0, queries, head, query, dout, scores, dscores, for_each, factor, along);
        } else {
          for (int64_t i = 0; i < queries; ++i) {
            factor[i] = 1;
            along[i] = sum_over(width, [&](int64_t l, int64_t count) { return load(dout.row(i) + l) * load_up_to(out + i * dense[0] + l, count); });
          }
        }
        bool met = false;  // keys before these
        for_each([&](const Stretch& stretch, bool causal, int64_t limit) {
          for (int64_t j0 = 0; j0 < limit; j0 += KEYS) {
            const int64_t there = fewer(KEYS, limit - j0);
            score(query, width, stretch.turned_keys, causal, place, queries, j0, there, scores);
            score(dout, width, stretch.turned_values, causal, place, queries, j0, there, dscores);
            for (int64_t i = 0; i < queries; ++i) {
              const float lse = task.lse[(own.begin + i0 + i) * task.heads + head];
              int64_t count = seen(causal, place, j0, there, i);
              if (count < 0) count = 0;
              for (int64_t j = 0; j < count; j += WIDTH) {
                const Floats p = probability(load(scores.row(i) + j) * task.scale - lse) * factor[i];
                store(scores.row(i) + j, p);
                store(dscores.row(i) + j, p * (load(dscores.row(i) + j) - along[i]) * task.scale);
              }
              for (int64_t j = count; j < padded(there, WIDTH); ++j) scores.row(i)[j] = 0, dscores.row(i)[j] = 0;
            }
            for (int64_t j = 0; j < there; j += TILE_ROWS) {
              const int64_t count = fewer(TILE_ROWS, there - j);
              const int64_t first = causal && j0 + j > place ? j0 + j - place : 0;  // the first query that sees the tile's first key
              const int64_t depth = queries - first;
              if (depth <= 0) break;
              const Panel dk{stretch.dk.row(j0 + j), stretch.dk.stride}, dv{stretch.dv.row(j0 + j), stretch.dv.stride};
              multiply(count, width, depth, scores.row(first) + j, 1, KEYS, {dout.row(first), columns}, dv, true);
              multiply(count, width, depth, dscores.row(first) + j, 1, KEYS, {query.row(first), columns}, dk, true);
            }
            for (int64_t i = 0; i < queries; i += TILE_ROWS) {
              const int64_t count = fewer(TILE_ROWS, queries - i), depth = seen(causal, place, j0, there, i + count - 1);
              if (depth <= 0) continue;
              multiply(count, width, depth, dscores.row(i), KEYS, 1, {stretch.keys.row(j0), columns}, {dq.row(i), columns}, met);
            }
            met = true;
          }
        });
        narrow_rows(dq, queries, width, static_cast<T*>(task.dq) + ((own.begin + i0) * task.heads + head) * width, dense[0]);
      }
    }
    narrow_sums<T>(task, kv_head, own.keys, own_stretch);
  }
  Room again = stretches;
  for (int64_t i = 0; i < part.ancestor_count; ++i) {
    const AttentionKeys& of = part.ancestors[i];
    narrow_sums<T>(task, kv_head, of, next_stretch(again, task, kv_head, of, true));
  }
}

template <class T>
void attention_sums_of(const Attention& task, const AttentionKeys* shares, int64_t count, int64_t kv_head, int64_t key, int64_t begin, int64_t end) {
  const float* sums = task.sums + kv_head * task.sum_stride;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t place = ((key + i) * task.kv_heads + kv_head) * task.width;
    for_each_vector(task.width, [&](int64_t l, int64_t left) {
      Floats dk{}, dv{};
      for (const AttentionKeys* share = shares; share < shares + count; ++share) {
        if (i >= share->count) continue;
        const float* from = sums + share->sum + i * task.sum_columns + l;
        dk += load(from), dv += load(from + share->count * task.sum_columns);
      }
      store_up_to(static_cast<T*>(task.dk) + place + l, dk, left);
      store_up_to(static_cast<T*>(task.dv) + place + l, dv, left);
    });
  }
}

void attention(const Attention& task, const AttentionPart& part, int64_t kv_head, float* room) {
  with_kind(task.kind, [&](auto* type) { attention_of<std::remove_pointer_t<decltype(type)>>(task, part, kv_head, room); });
}

void attention_backward(const Attention& task, const AttentionPart& part, int64_t kv_head, float* room) {
  with_kind(task.kind, [&](auto* type) { attention_gradients_of<std::remove_pointer_t<decltype(type)>>(task, part, kv_head, room); });
}

void attention_sum(const Attention& task, const AttentionKeys* shares, int64_t count, int64_t kv_head, int64_t key, int64_t begin, int64_t end) {
  with_kind(task.kind, [&](auto* type) {
    attention_sums_of<std::remove_pointer_t<decltype(type)>>(task, shares, count, kv_head, key, begin, end);
  });
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

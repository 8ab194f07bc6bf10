// Rows of a big activation, and their masks, as the adapters' passes take them (adapter_passes.h). Compiled once per instruction set, as vector.h.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t ROW_BLOCK = 64;       // rows whose gradient is summed by itself, so that rounding grows with the blocks, not the rows
constexpr int64_t COLUMN_BLOCK = 2048;  // at most, of 64 rows: in bfloat16 they stay in the second-level cache
static_assert(COLUMN_BLOCK % COLUMN_UNIT == 0 && COLUMN_UNIT % DECISIONS == 0);

inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

/// Some rows of v from one column on, and the bits of their masks.
template <class T, int COUNT>
struct Block {
  T* v[COUNT];
  const uint8_t* keep[COUNT];  // of the whole row
  int64_t column;

  /// WIDTH elements l columns further on, or the `count` that are left; zero where dropped.
  template <bool DROPS>
  Floats load(int64_t i, int64_t l, int64_t count) const {
    const Floats value = count >= WIDTH ? FASTLORA_ISA::load(v[i] + l) : load_some(v[i] + l, count);
    return DROPS ? kept(value, keep[i], column + l) : value;
  }
};

/// v[i][l] += change where kept, for one vector or the `count` columns that are left.
template <bool DROPS, class T, int COUNT>
inline void add_to(const Block<T, COUNT>& block, int64_t i, int64_t l, int64_t count, Floats change) {
  if (DROPS) change = kept(change, block.keep[i], block.column + l);
  T* to = block.v[i] + l;
  if (count >= WIDTH) {
    store(to, load(to) + change);
  } else {
    store_some(to, load_some(to, count) + change, count);
  }
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

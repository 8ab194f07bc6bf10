// How a product's sums leave the registers of tensor cores of either kind: with the bias, rounded, in pieces of 16 bytes. Fragments are those of
// m16n8k16 and of wgmma: lane t of four holds columns 2 t and 2 t + 1 of each, which is 4 bytes of a row, so four lanes trade four fragments for
// one whole fragment each.
//
//     instructions for a row of 32 columns: 4 round, 16 select and 3 exchange, 1 writes
//
// All of them stand between the last product of a tile and the first of the next, so what can be asked once is asked once for the whole tile.
#pragma once

#include "product.cuh"

namespace fastlora {

/// The bias of a lane's columns among 32: 2 t and 2 t + 1 of each of four fragments. IS: whether there is one; WHOLE: see write_sums.
template <class T, bool IS, bool WHOLE>
struct Bias {
  float value[4][2] = {};

  template <class G>
  __device__ Bias(const Product<T, G>& task, int column) {
    if constexpr (IS) {  // beyond N it is whatever there is at the end
      const int t = threadIdx.x % 4;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if constexpr (WHOLE) {
          value[i / 2][i % 2] = static_cast<float>(task.bias[min(column + i / 2 * 8, task.N - 8) + 2 * t + i % 2]);
        } else {
          value[i / 2][i % 2] = static_cast<float>(task.bias[min(column + i / 2 * 8 + 2 * t + i % 2, task.N - 1) * task.bias_stride]);
        }
      }
    }
  }
};

/// value[i ^ t] in the place of value[i], t < 4.
__device__ __forceinline__ void exchange_places(uint32_t (&value)[4], int t) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool swaps = t & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t low = value[i], high = value[i | bit];
      value[i] = swaps ? high : low, value[i | bit] = swaps ? low : high;
    }
  }
}

/// Lane t of four gives value[j] to lane j, and gets in value[j] what lane j had for it.
__device__ __forceinline__ void trade(uint32_t (&value)[4]) {
  const int t = threadIdx.x % 4;
  exchange_places(value, t);  // value[r] is for lane t ^ r
#pragma unroll
  for (int r = 1; r < 4; ++r) value[r] = __shfl_xor_sync(~0u, value[r], r);
  exchange_places(value, t);
}

/// Writes one row's sums of the four fragments from `column` on.
template <class T, class G, bool IS, bool WHOLE>
__device__ __forceinline__ void write_32(
    const Product<T, G>& task, int row, int column, const Bias<T, IS, WHOLE>& bias, const float (&sum)[4][2]) {
  Eight mine;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    mine.pair[j] = IS ? pack<T>(sum[j][0] + bias.value[j][0], sum[j][1] + bias.value[j][1]) : pack<T>(sum[j][0], sum[j][1]);
  }
  const int t = threadIdx.x % 4, first = column + (WHOLE ? 8 : 2) * t;
  if constexpr (WHOLE) trade(mine.pair);
  if (row >= task.M || first >= task.N) return;
  T* const to = task.y + static_cast<int64_t>(row) * task.N + first;
  if constexpr (WHOLE) {
    *reinterpret_cast<Eight*>(to) = mine;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int ahead = i / 2 * 8 + i % 2;
      if (first + ahead < task.N) reinterpret_cast<uint16_t*>(to)[ahead] = static_cast<uint16_t>(mine.pair[i / 2] >> 16 * (i % 2));
    }
  }
}

/// Calls write(there is a bias, all fragments are whole), constants both: N is a multiple of 8 then, and a bias has no gaps. CAN: whether there
/// may be a bias.
template <bool CAN, class T, class G, class Write>
__device__ __forceinline__ void write_sums(const Product<T, G>& task, Write write) {
  const bool whole = task.N % 8 == 0;
  if (CAN && task.bias) {
    whole && task.bias_stride == 1 ? write(std::bool_constant<CAN>{}, std::true_type{}) : write(std::bool_constant<CAN>{}, std::false_type{});
  } else {
    whole ? write(std::false_type{}, std::true_type{}) : write(std::false_type{}, std::false_type{});
  }
}

}  // namespace fastlora

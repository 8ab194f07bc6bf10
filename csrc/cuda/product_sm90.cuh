// The product with the frozen weight on Hopper (sm_90a): wgmma on tiles that the copy engine brings into a queue of stages. The grid is persistent, a
// block a multiprocessor, and a block is three warpgroups:
//
//     producer    one thread asks for tiles; before the first rank step it waits for the launch that has shrunk its rows
//     consumers   two warpgroups, each 64 rows of the tile of 128 x 256
//
// The launch before may still run when this one begins: the frozen part, which has nothing to do with it, does not wait for its end. What its own
// predecessors wrote is there by then.
#pragma once

#include <type_traits>

#include "product_epilogue.cuh"

namespace fastlora::sm90 {

constexpr int HEIGHT = 128;  // of a tile
constexpr int WIDTH = 256;
constexpr int DEPTH = 64;  // of a stage: 128 bytes
constexpr int STAGES = 4;
constexpr int WARPGROUP = 128;
constexpr int THREADS = 3 * WARPGROUP;
constexpr int CONSUMER_WARPS = 8;
constexpr int LEFT = HEIGHT * DEPTH * 2, RIGHT = WIDTH * DEPTH * 2;  // bytes of a stage's operands
constexpr int TOLD = 256;  // bytes of barriers, and what is told of stages
constexpr int SHARED = STAGES * (LEFT + RIGHT) + TOLD;
// Registers a thread. At the start all have 168; the producer's warpgroup leaves most of its own to the consumers.
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS <= 3 * 168);

/// One launch.
template <class T, class G>
struct Task {
  TensorMap x, w, p, q;  // in boxes of HEIGHT rows; of WIDTH rows, or of DEPTH rows where it lies across the depth; as x; as w
  Product<T, G> product;
  int tiles;
};

__device__ inline uint64_t* barriers() { return reinterpret_cast<uint64_t*>(shared_memory() + STAGES * (LEFT + RIGHT)); }

/// What the producer tells the consumers of a stage of the rank steps.
struct alignas(16) RankStage {
  RankStep step;
  bool more;  // stages of this tile follow
};
static_assert(2 * STAGES * sizeof(uint64_t) + STAGES * sizeof(RankStage) <= TOLD);

/// Where a producer or a consumer is in the queue of stages.
struct Stage {
  int at = 0;
  uint32_t parity = 0;  // of the phase in which it is filled

  __device__ unsigned char* left() const { return shared_memory() + at * (LEFT + RIGHT); }
  __device__ unsigned char* right() const { return left() + LEFT; }
  __device__ uint64_t* full() const { return barriers() + at; }
  __device__ uint64_t* empty() const { return barriers() + STAGES + at; }
  __device__ RankStage& rank() const { return reinterpret_cast<RankStage*>(barriers() + 2 * STAGES)[at]; }  // after the barriers
  __device__ void next() {
    at = (at + 1) % STAGES;
    parity ^= at == 0;
  }
};

/// The whole warp walks through the stages, its first thread asks for what is in them.
template <class T, class G, bool BACK, bool ACROSS>
__device__ void produce(const Task<T, G>& task) {
  const bool asks = threadIdx.x % 32 == 0;
  Stage stage;
  const auto bring = [&]<bool WIDE>(
      std::bool_constant<WIDE>, const TensorMap* left, int row, int left_depth, const TensorMap* right, int column, int right_depth) {
    arrive_expecting(stage.full(), LEFT + RIGHT);
    copy_box(stage.left(), left, stage.full(), row, left_depth);
    if constexpr (WIDE) {
#pragma unroll
      for (int i = 0; i < WIDTH / 64; ++i) copy_box(stage.right() + i * DEPTH * 128, right, stage.full(), right_depth, column + i * 64);
    } else {
      copy_box(stage.right(), right, stage.full(), column, right_depth);
    }
  };
  for (int number = blockIdx.x; number < task.tiles; number += gridDim.x) {
    const Tile tile = tile_of(number, task.product.M, task.product.N, HEIGHT, WIDTH);
    for (int depth = 0; depth < task.product.depth; depth += DEPTH, stage.next()) {
      if (!asks) continue;
      wait_barrier(stage.empty(), stage.parity ^ 1, {Awaited::FREE_STAGE, stage.at, number});
      bring(std::bool_constant<ACROSS>{}, &task.x, tile.row, depth, &task.w, tile.column, depth);
    }
    __syncwarp();  // who does not ask waits here
    if (number == blockIdx.x) wait_for_launch_before();
    RankSteps<G, BACK, DEPTH> steps(task.product.groups, tile.row);
    do {  // one stage at least, which tells that no other follows
      const RankStep step = steps.step();
      if (steps.left()) steps.next();
      if (asks) {
        wait_barrier(stage.empty(), stage.parity ^ 1, {Awaited::FREE_STAGE, stage.at, number});
        stage.rank() = {step, steps.left()};
        if (step.depths) {
          bring(std::bool_constant<BACK>{}, &task.p, tile.row, step.p, &task.q, tile.column, step.q);
        } else {
          arrive(stage.full());
        }
      }
      stage.next();
    } while (steps.left());
  }
}

/// Two rows' bits of the 64 columns that are multiplied next.
struct Bits { uint64_t upper, lower; };

/// sum += the rank step for the rows that have its adapter and where its bits are set, 64 columns at a time, or it would need as many registers
/// as the sum. `next`: the bits of the first 64, of one adapter; those that follow are asked for one step ahead, which hides them. Of many adapters
/// there are no registers for that.
template <class T, class G, bool BACK>
__device__ __forceinline__ void add_selected(
    const Product<T, G>& product, const RankStep& step, int row, int column, uint64_t left, const unsigned char* right, Bits next, float (&sum)[128]) {
#pragma unroll
  for (int block = 0; block < WIDTH / 64; ++block) {
    float part[32];
#pragma unroll 1
    for (int k = 0; k * 16 < step.depths; ++k) {
      const unsigned char* const columns = right + block * DEPTH * 128;
      begin_products();
      multiply_operands<T, BACK>(part, left + k * (32 >> 4), BACK ? operand(columns + k * 16 * 128, DEPTH * 128) : operand(columns + k * 32, 0), k);
      commit_products();
    }
    const Bits asked = next;
    const KeptRows<T, G, BACK> kept(product, row, column + (G::MANY ? block : block + 1) * 64);
    if (G::MANY) {
      next = {kept.bits(step, 0), kept.bits(step, 8)};
    } else if (block + 1 < WIDTH / 64) {
      next = {kept.word(0), kept.word(8)};
    }
    wait_products<0>();
    forget(part);  // or what they are multiplied with may come before the wait
    const Bits bits = G::MANY ? next : Bits{asked.upper >> column % 64, asked.lower >> column % 64};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float* const to = sum + block * 32 + j * 4;
      const int first = BACK ? j * 8 : 0;  // in the forward a row has the adapter, all of it, or not
      add_kept(to[0], to[1], part[j * 4], part[j * 4 + 1], bits.upper, first, step.factor);
      add_kept(to[2], to[3], part[j * 4 + 2], part[j * 4 + 3], bits.lower, first, step.factor);
    }
  }
}

/// Asks for 64 rows of a tile of y, which will be added to, to be in the cache by then.
template <class T, class G>
__device__ void prefetch_tile(const Product<T, G>& product, int row, int column) {
  for (int i = threadIdx.x % WARPGROUP; i < 64 * WIDTH / 64; i += WARPGROUP) {  // a cache line holds 64
    const int m = row + i / (WIDTH / 64), n = column + i % (WIDTH / 64) * 64;
    if (m < product.M && n < product.N) prefetch(product.y + static_cast<int64_t>(m) * product.N + n);
  }
}

template <class T, class G, bool BACK, bool ACROSS>
__device__ void consume(const Task<T, G>& task, int consumer) {
  constexpr bool ADDS = BACK && !G::MANY;  // whether it may
  const Product<T, G>& product = task.product;
  const int lane = threadIdx.x % 32, frozen = divide_up(product.depth, DEPTH);
  Stage stage;
  const auto left = [&](int k) { return operand(stage.left() + consumer * 64 * 128 + k * 32, 0); };
  const auto right = [&]<bool WIDE>(std::bool_constant<WIDE>, int k) {
    return WIDE ? operand(stage.right() + k * 16 * 128, DEPTH * 128) : operand(stage.right() + k * 32, 0);
  };
  for (int number = blockIdx.x; number < task.tiles; number += gridDim.x) {
    const Tile tile = tile_of(number, product.M, product.N, HEIGHT, WIDTH);
    float sum[128];
    if (ADDS && product.adds) prefetch_tile(product, tile.row + consumer * 64, tile.column);
    Stage before;  // whose products are not waited for
    for (int step = 0; step < frozen; ++step, stage.next()) {
      wait_barrier(stage.full(), stage.parity, {Awaited::BOXES, stage.at, number});
      begin_products();
#pragma unroll
      for (int k = 0; k < DEPTH / 16; ++k) multiply_operands<T, ACROSS>(sum, left(k), right(std::bool_constant<ACROSS>{}, k), step | k);
      commit_products();
      wait_products<1>();
      if (lane == 0 && step > 0) arrive(before.empty());
      before = stage;
    }
    wait_products<0>();
    if (lane == 0) arrive(before.empty());
    uint32_t thread = threadIdx.x;
    forget(thread);  // or the row keeps a register all along
    const int row = tile.row + consumer * 64 + static_cast<int>(thread % WARPGROUP / 32 * 16 + thread % 32 / 4);
    if (ADDS && product.adds) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const float2 two = read_two(product, row + i % 2 * 8, tile.column + static_cast<int>(thread % 4 * 2) + i / 2 * 8);
        sum[2 * i] += two.x, sum[2 * i + 1] += two.y;
      }
    }
    const int first_column = tile.column + static_cast<int>(thread % 4 * 2);
    for (bool more = true; more; stage.next()) {
      Bits bits{};
      if (BACK && !G::MANY && product.keep) {  // before the wait, which hides it
        const KeptRows<T, G, BACK> kept(product, row, first_column);
        bits = {kept.word(0), kept.word(8)};
      }
      wait_barrier(stage.full(), stage.parity, {Awaited::BOXES, stage.at, number});
      const RankStep step = stage.rank().step;
      more = stage.rank().more;
      if ((BACK || G::MANY) && !step.alone) {
        add_selected<T, G, BACK>(product, step, row, first_column, left(0), stage.right(), bits, sum);
      } else {
#pragma unroll 1
        for (int k = 0; k * 16 < step.depths; ++k) {
          begin_products();
          multiply_operands<T, BACK>(sum, left(k), right(std::bool_constant<BACK>{}, k), 1);
          commit_products();
        }
        wait_products<0>();
      }
      __syncwarp();  // all have read what the producer told
      if (lane == 0) arrive(stage.empty());
    }
    write_sums<!BACK>(product, [&]<bool BIAS, bool WHOLE>(std::bool_constant<BIAS>, std::bool_constant<WHOLE>) {
#pragma unroll
      for (int block = 0; block < WIDTH / 32; ++block) {
        const int column = tile.column + block * 32;
        const Bias<T, BIAS, WHOLE> bias(product, column);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float part[4][2];
#pragma unroll
          for (int j = 0; j < 8; ++j) part[j / 2][j % 2] = sum[block * 16 + j / 2 * 4 + half * 2 + j % 2];
          write_32(product, row + half * 8, column, bias, part);
        }
      }
    });
  }
}

template <class T, class G, bool BACK, bool ACROSS>
__device__ void run(const Task<T, G>& task) {
  let_next_launch_begin();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      init_barrier(barriers() + i, 1);
      init_barrier(barriers() + STAGES + i, CONSUMER_WARPS);
    }
    publish_barriers();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / WARPGROUP;
  if (warpgroup == 0) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x < 32) produce<T, G, BACK, ACROSS>(task);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume<T, G, BACK, ACROSS>(task, warpgroup - 1);
  }
}

}  // namespace fastlora::sm90

// The functions of csrc/cuda/ptx.cuh for a CPU: the same operands and results, lane by lane. Copies arrive when they are waited for, no earlier, so
// that a wait that is missing shows.
#pragma once

#include <deque>
#include <map>

#include "emulated_cuda.h"

namespace fastlora {

namespace order = emulated::order;
using order::Site;
inline order::Thread& this_thread() { return emulated::current->order; }
inline uint32_t thread_number() { return static_cast<uint32_t>(emulated::current - emulated::current->block->fibers.data()); }

template <class T>
uint32_t pack(float low, float high) {
  return std::bit_cast<uint16_t>(static_cast<T>(low)) | static_cast<uint32_t>(std::bit_cast<uint16_t>(static_cast<T>(high))) << 16;
}

template <class T>
float half_of(uint32_t pair, int high) { return std::bit_cast<T>(static_cast<uint16_t>(pair >> 16 * high)); }

inline uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xFFFF) | b << 16; }
inline uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000); }

template <uint32_t WHICH>
uint32_t from_signs(uint32_t bytes) {
  uint32_t all = 0;
  for (int i = 0; i < 4; ++i) all |= (bytes >> (WHICH >> 4 * i & 7) * 8 + 7 & 1) * 0xFFu << 8 * i;
  return all;
}

inline void forget(uint32_t&) {}
template <int SIZE>
void forget(float (&)[SIZE]) {}

struct Copy {
  void* to;
  const void* from;
  int size, bytes;
};

/// A thread's asynchronous instructions: those of the set that is not ended, and the sets that are not waited for.
template <class Instruction>
struct Pending {
  std::vector<Instruction> open;
  std::deque<std::vector<Instruction>> ended;
  uint32_t number = 1;  // of the open set

  void commit() {
    ended.push_back(std::move(open));
    open.clear();
    ++number;
  }
  uint32_t done() const { return number - 1 - static_cast<uint32_t>(ended.size()); }  // the newest set that was waited for
  template <class Run>
  void wait(size_t pending, Run run) {
    for (; ended.size() > pending; ended.pop_front()) {
      for (const Instruction& instruction : ended.front()) run(instruction);
    }
  }
};

/// What belongs to a thread or a block, made when it is first asked for, and gone with it.
template <class State>
State& state_of(std::shared_ptr<void>& place) {
  if (!place) place = std::make_shared<State>();
  return *static_cast<State*>(place.get());
}

/// Where the byte lies that is at `address` without the 128-byte swizzle.
EMULATED_UNWATCHED inline uintptr_t swizzled(uintptr_t address) { return address ^ (address >> 7 & 7) << 4; }

struct OperandProduct {
  float* d;
  int size;
  uint64_t a, b;
  bool across, add;
  float (*number)(uint16_t);
  uint32_t number_of_set;

  /// Eight rows of 128 bytes are swizzled by their addresses: an operand that begins between them would need an offset in it.
  static bool between_rows(uint64_t operand) { return begin(operand) >> 7 & 7; }
  static uintptr_t begin(uint64_t operand) { return (operand & ((uint64_t{1} << 44) - 1)) << 4; }
  static constexpr int DEPTH = 16;
  /// What the lane's warp reads, for its first lane.
  void touch() const {
    if (threadIdx.x % 32) return;
    const auto read = [&](uintptr_t address, size_t bytes) {
      const uint32_t set = number_of_set;
      order::touch_by(this_thread(), order::TENSOR_CORES, thread_number() / 32, set, reinterpret_cast<void*>(address), bytes, order::READ | order::ASYNC);
    };
    const auto rows = [&](uint64_t operand, int first, int count) {
      for (int row = first; row < first + count; ++row) {
        for (int depth = 0; depth < DEPTH; depth += 8) read(swizzled(begin(operand) + row / 8 * 1024 + row % 8 * 128 + depth * 2), 16);
      }
    };
    rows(a, static_cast<int>(threadIdx.x % 128 / 32 * 16), 16);
    if (!across) return rows(b, 0, 2 * size);
    for (int block = 0; block < 2 * size / 64; ++block) {
      for (int depth = 0; depth < DEPTH; ++depth) read(begin(b) + block * (b >> 44 << 4) + depth / 8 * 1024 + depth % 8 * 128, 128);
    }
  }
  EMULATED_UNWATCHED float at(uintptr_t address) const { return number(*reinterpret_cast<const uint16_t*>(swizzled(address))); }
  EMULATED_UNWATCHED float left(int row, int depth) const { return at(begin(a) + row / 8 * 1024 + row % 8 * 128 + depth * 2); }
  EMULATED_UNWATCHED float right(int column, int depth) const {
    if (!across) return at(begin(b) + column / 8 * 1024 + column % 8 * 128 + depth * 2);
    return at(begin(b) + column / 64 * (b >> 44 << 4) + depth / 8 * 1024 + depth % 8 * 128 + column % 64 * 2);
  }
  EMULATED_UNWATCHED void compute() const {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    float rows[2][16];
    for (int i = 0; i < 32; ++i) rows[i / 16][i % 16] = left(row + i / 16 * 8, i % 16);
    for (int i = 0; i < size; i += 4) {
      for (int half = 0; half < 2; ++half) {
        float sums[2] = {add ? d[i + half] : 0, add ? d[i + 2 + half] : 0};
        for (int depth = 0; depth < 16; ++depth) {
          const float number = right(i * 2 + lane % 4 * 2 + half, depth);
          sums[0] += rows[0][depth] * number;
          sums[1] += rows[1][depth] * number;
        }
        d[i + half] = sums[0];
        d[i + 2 + half] = sums[1];
      }
    }
  }
};
struct ThreadState {
  Pending<Copy> copies;
  Pending<OperandProduct> products;
  bool products_begun = false;
};
inline ThreadState& thread_state() { return state_of<ThreadState>(emulated::current->instructions); }

template <int SIZE>
void copy_async(void* shared, const void* global, int bytes) {
  const order::Quiet quiet;
  const auto address = reinterpret_cast<uintptr_t>(global);
  if (bytes < 0 || bytes > SIZE) emulated::fail("a copy of more or fewer bytes than there is room for");
  if (reinterpret_cast<uintptr_t>(shared) % SIZE || address % SIZE) emulated::fail("a copy that is not aligned to its size");
  Pending<Copy>& copies = thread_state().copies;
  copies.open.push_back({shared, global, SIZE, bytes});
  order::touch_by(this_thread(), order::COPIES, thread_number(), copies.number, global, bytes, order::READ);
  order::touch_by(this_thread(), order::COPIES, thread_number(), copies.number, shared, SIZE, order::WRITE);
}
inline void prefetch(const void* global) {
  const order::Quiet quiet;
  static_cast<void>(*static_cast<const volatile unsigned char*>(global));
}
inline void commit_copies(Site at = Site::current()) {
  const order::Quiet quiet;
  if (order::orders("commit_copies", at)) thread_state().copies.commit();
}
template <int PENDING>
void wait_copies(Site at = Site::current()) {
  const order::Quiet quiet;
  if (!order::orders("wait_copies", at)) return;
  Pending<Copy>& copies = thread_state().copies;
  copies.wait(PENDING + order::weaker("wait_copies", at), [](const Copy& copy) {
    if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.size - copy.bytes);
  });
  order::learn(this_thread(), order::COPIES, thread_number(), copies.done());
}

struct Quad { uint32_t word[4]; };

template <bool TRANSPOSED>
void load_8x8(uint32_t (&to)[4], const void* row) {
  const order::Quiet quiet;
  if (reinterpret_cast<uintptr_t>(row) % 16) emulated::fail("a row of a matrix that is not aligned to 16 bytes");
  const Quad got = emulated::collective<Quad>(~0u, row, [](const void* const* const* in, Quad* const* out, unsigned) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const auto number = [&](int r, int c) {
          const uint16_t* const at = static_cast<const uint16_t*>(*in[8 * i + r]) + c;
          order::touch(emulated::current->warp->seats[lane].fiber->order, at, sizeof(*at), order::READ);
          return static_cast<uint32_t>(*at);
        };
        const int g = lane / 4, t = lane % 4 * 2;
        out[lane]->word[i] = TRANSPOSED ? number(t, g) | number(t + 1, g) << 16 : number(g, t) | number(g, t + 1) << 16;
      }
    }
  });
  std::copy(got.word, got.word + 4, to);
}
inline void load_matrices(uint32_t (&to)[4], const void* row) { load_8x8<false>(to, row); }
inline void load_transposed(uint32_t (&to)[4], const void* row) { load_8x8<true>(to, row); }

template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Given { float d[4]; uint32_t a[4], b[2]; };
  struct Sum { float d[4]; };
  Given given{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  const Sum sum = emulated::collective<Sum>(~0u, given, [](const Given* const* in, Sum* const* out, unsigned) {
    float left[16][16], right[16][8];  // [row, depth], [depth, column]
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) left[g + i % 2 * 8][t + i / 2 * 8 + half] = half_of<T>(in[lane]->a[i], half);
        for (int i = 0; i < 2; ++i) right[t + i * 8 + half][g] = half_of<T>(in[lane]->b[i], half);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float total = in[lane]->d[i];
        for (int depth = 0; depth < 16; ++depth) total += left[row][depth] * right[depth][column];
        out[lane]->d[i] = total;
      }
    }
  });
  std::copy(sum.d, sum.d + 4, d);
}

// Hopper's. Boxes arrive when their barrier is waited for, products are computed when they are waited for, both no earlier.

struct TensorMap {
  const uint16_t* data;
  int64_t rows, columns, stride;
  int box_rows, box_columns;
};

/// Which card this thread uses, and which card's context the driver finds on it, -1: none yet, as on a thread that autograd has just begun.
inline thread_local int device_now = 0, context_now = -1;

inline bool describe(TensorMap& map, bool, const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows, int box_columns) {
  if (context_now != device_now) return false;
  map = {static_cast<const uint16_t*>(matrix), rows, columns, stride, box_rows, box_columns};
  const bool aligned = reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && stride % 8 == 0, some = rows >= 1 && columns >= 1;
  return aligned && some && stride >= columns && box_rows <= 256 && box_columns == 64;
}

struct Box {
  unsigned char* to;
  const TensorMap* map;
  int row, column;

  int bytes() const { return map->box_rows * map->box_columns * 2; }
  /// What the copy engine does for it, in this phase of a barrier.
  void touch(uint32_t barrier, uint32_t phase) const {
    const auto by_engine = [&](const void* address, size_t bytes, int access) {
      order::touch_by(this_thread(), order::COPY_ENGINE, barrier, phase, address, bytes, access | order::ASYNC);
    };
    for (int64_t r = row; r < std::min<int64_t>(row + map->box_rows, map->rows); ++r) {
      const int64_t columns = std::min<int64_t>(map->box_columns, map->columns - column);
      if (columns > 0) by_engine(map->data + r * map->stride + column, columns * 2, order::READ);
    }
    by_engine(to, bytes(), order::WRITE);
  }
  EMULATED_UNWATCHED void bring() const {
    for (int r = 0; r < map->box_rows; ++r) {
      for (int c = 0; c < map->box_columns; ++c) {
        const bool inside = row + r < map->rows && column + c < map->columns;
        const uintptr_t at = swizzled(reinterpret_cast<uintptr_t>(to) + r * 128 + c * 2);
        *reinterpret_cast<uint16_t*>(at) = inside ? map->data[(row + r) * map->stride + column + c] : 0;
      }
    }
  }
};

/// As on a card, but that it counts how often a thread looks.
class Patience {
  static constexpr int MOST = emulated::IDLE_ROUNDS / 2;
  mutable int looked = 0;

 public:
  void spend(const Awaited& awaited) const {
    const order::Quiet quiet;
    if (++looked > MOST) emulated::fail(in_words(awaited));
  }
};
inline void hear_of_waits() {}

struct CountingBarrier {
  int count, missing;
  int64_t bytes;  // announced and not there
  uint32_t parity;
  std::vector<Box> boxes;
  uint32_t number;     // of this barrier in its block
  uint32_t initialised_by;
  uint32_t ended = 0;  // phases
  order::Knowledge arrived{}, of_ended{};

  void try_end() {
    if (missing || bytes || !boxes.empty()) return;
    missing = count;
    parity ^= 1;
    ++ended;
    of_ended = arrived;
  }
};
inline auto& counting_barriers() { return state_of<std::map<uint64_t*, CountingBarrier>>(emulated::current->block->instructions); }

inline void init_barrier(uint64_t* barrier, int count, Site at = Site::current()) {
  const order::Quiet quiet;
  if (!order::orders("init_barrier", at)) return;
  count -= order::weaker("init_barrier", at);
  const uint32_t number = static_cast<uint32_t>(counting_barriers().size());
  counting_barriers()[barrier] = {count, count, 0, 0, {}, number, thread_number()};
  order::touch(this_thread(), barrier, sizeof(*barrier), order::WRITE);
}
inline void publish_barriers(Site at = Site::current()) {
  const order::Quiet quiet;
  if (!order::orders("publish_barriers", at)) return;
  for (const auto& [barrier, state] : counting_barriers()) {
    if (state.initialised_by == thread_number()) order::publish(this_thread(), barrier, sizeof(*barrier));
  }
}
/// The barrier, if there is one.
inline CountingBarrier& counting_barrier(uint64_t* barrier) {
  const auto found = counting_barriers().find(barrier);
  if (found == counting_barriers().end()) emulated::fail("a barrier that is not initialised");
  return found->second;
}
inline void arrive_at(uint64_t* barrier, int bytes, bool orders) {
  CountingBarrier& state = counting_barrier(barrier);
  order::touch(this_thread(), barrier, sizeof(*barrier), order::ATOMIC | order::WRITE);
  if (orders) order::give(this_thread(), state.arrived);
  if (state.missing-- == 0) emulated::fail("more threads arrive at a barrier than it counts");
  state.bytes += bytes;
  state.try_end();
}
inline void arrive_expecting(uint64_t* barrier, int bytes, Site at = Site::current()) {
  const order::Quiet quiet;
  arrive_at(barrier, bytes, order::orders("arrive_expecting", at));
}
inline void arrive(uint64_t* barrier, Site at = Site::current()) {
  const order::Quiet quiet;
  arrive_at(barrier, 0, order::orders("arrive", at));
}
inline void wait_barrier(uint64_t* barrier, uint32_t parity, const Awaited& awaited, Site at = Site::current()) {
  const order::Quiet quiet;
  const bool orders = order::orders("wait_barrier", at);
  const Patience patience;
  CountingBarrier& state = counting_barrier(barrier);
  order::touch(this_thread(), barrier, sizeof(*barrier), order::ATOMIC);
  for (; state.parity == parity; __nanosleep(0)) {
    patience.spend(awaited);
    for (const Box& box : state.boxes) {
      box.bring();
      state.bytes -= box.bytes();
    }
    state.boxes.clear();
    state.try_end();
    if (state.parity != parity) break;
  }
  if (!orders) return;
  order::take(this_thread(), state.of_ended);
  order::learn(this_thread(), order::COPY_ENGINE, state.number, state.ended);
}
inline int boxes_until_one_is_lost = -1;
extern "C" __attribute__((weak, visibility("default"))) void emulated_lose_box(int after) { boxes_until_one_is_lost = after; }
inline void copy_box(void* shared, const TensorMap* map, uint64_t* barrier, int row, int column) {
  const order::Quiet quiet;
  if (boxes_until_one_is_lost >= 0 && boxes_until_one_is_lost-- == 0) return;
  if (reinterpret_cast<uintptr_t>(shared) % 1024) emulated::fail("a box that is not aligned to the swizzle's 1024 bytes");
  CountingBarrier& state = counting_barrier(barrier);
  const Box box{static_cast<unsigned char*>(shared), map, row, column};
  const uint32_t phase = state.ended + 1;
  order::touch_by(
      this_thread(), order::COPY_ENGINE, state.number, phase, barrier, sizeof(*barrier), order::ATOMIC | order::WRITE | order::ASYNC);
  box.touch(state.number, phase);
  state.boxes.push_back(box);
}
template <int COUNT>
void take_registers() {}
template <int COUNT>
void give_registers() {}

/// Address and distance as on a card, in 16 bytes; the address has more bits.
inline uint64_t operand(const void* shared, int apart) {
  return reinterpret_cast<uint64_t>(shared) >> 4 | static_cast<uint64_t>(apart >> 4) << 44;
}

template <class T, bool ACROSS, int SIZE>
void multiply_operands(float (&d)[SIZE], uint64_t a, uint64_t b, int add) {
  const order::Quiet quiet;
  const auto number = [](uint16_t bits) EMULATED_UNWATCHED { return static_cast<float>(std::bit_cast<T>(bits)); };
  if (!thread_state().products_begun) emulated::fail("a product before its set's begin_products");
  if (OperandProduct::between_rows(a) || OperandProduct::between_rows(b)) emulated::fail("an operand that begins between eight rows");
  Pending<OperandProduct>& products = thread_state().products;
  products.open.push_back({d, SIZE, a, b, ACROSS, add != 0, number, products.number});
  products.open.back().touch();
}
inline void begin_products(Site at = Site::current()) {
  const order::Quiet quiet;
  thread_state().products_begun = order::orders("begin_products", at);
}
inline void commit_products(Site at = Site::current()) {
  const order::Quiet quiet;
  if (order::orders("commit_products", at)) thread_state().products.commit();
  thread_state().products_begun = false;
}
template <int PENDING>
void wait_products(Site at = Site::current()) {
  const order::Quiet quiet;
  Pending<OperandProduct>& products = thread_state().products;
  if (order::orders("wait_products", at)) {
    products.wait(PENDING + order::weaker("wait_products", at), [](const OperandProduct& product) { product.compute(); });
    order::learn(this_thread(), order::TENSOR_CORES, thread_number() / 32, products.done());
  }
  emulated::collective<int>(~0u, 0, [](const int* const*, int* const*, unsigned) {});  // the tensor cores read for all lanes at once
}

}  // namespace fastlora

// The card that the host asks about.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
inline int emulated_capability_now = 80;  // compute capability times 10
extern "C" __attribute__((weak, visibility("default"))) void emulated_capability(int capability) { emulated_capability_now = capability; }
extern "C" __attribute__((weak, visibility("default"))) void emulated_device(int device) { fastlora::device_now = device; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = fastlora::device_now;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  fastlora::device_now = fastlora::context_now = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  constexpr int MULTIPROCESSORS = 2;
  const int values[] = {MULTIPROCESSORS, emulated_capability_now / 10, emulated_capability_now % 10};
  *value = values[attribute];
  return cudaSuccess;
}

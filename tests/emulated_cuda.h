// CUDA's programming model on one thread of a CPU: a C++20 compiler with -DFASTLORA_EMULATED makes of csrc/cuda/*.cu a library that runs here, so
// that a kernel's arithmetic, indices and barriers are tested without a card. csrc/cuda/launch.h includes it in place of CUDA's own headers.
//
// Every thread of a block is a fiber with a stack of its own. It runs until it waits: at __syncthreads, at a warp's exchange (`collective`), or in a
// loop on memory that another thread will write (`__nanosleep`). Blocks run one after another, or as many together as emulated_together says; only where
// all that run wait for memory does the next one join them. Threads are resumed in ascending order, or in descending order after emulated_descending(1): a kernel that lacks a barrier gives
// another result in one of the two. Shared memory is all ones, that is NaN, when a block begins (declared with __shared__: when the process begins;
// a kernel whose blocks wait for one another keeps all of it in shared_memory()). What would hang on a card ends the launch with an exception.
#pragma once

#include <stdlib.h>
#include <sys/mman.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "emulated_order.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ static

struct uint3 { unsigned x, y, z; };
struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulated {

constexpr size_t STACK = 1 << 17;   // bytes a thread
constexpr int IDLE_ROUNDS = 10000;  // of waiting for memory, before it is taken for a hang
inline bool descending = false;
inline size_t together = 1;  // blocks that run at the same time from their beginning

struct Block;
struct Fiber;

/// One thread's place in an exchange of its warp: what it gives and where it wants the result.
struct Seat {
  Fiber* fiber = nullptr;  // none: the warp has no such thread, or it has ended
  unsigned mask = 0;       // the lanes it waits for, none: it does not wait
  void (*finish)(Seat* seats, unsigned mask) = nullptr;
  const void* in = nullptr;
  void* out = nullptr;
};

struct Warp {
  Seat seats[32];
  unsigned there = 0;    // the lanes whose seats have a fiber
  unsigned waiting = 0;  // and those whose seats have a mask
};

struct Barrier {
  std::vector<Fiber*> arrived;
  order::Knowledge knowledge;
};

/// What a thread runs on. When one ends, the next may go on from there, which costs no system call.
struct Stack {
  char* memory = nullptr;
  bool entered = false;  // `place` is where to go on
  jmp_buf place;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Fiber {
  enum State { READY, WAITING, IDLE, ENDED } state = READY;
  Block* block = nullptr;
  uint3 thread{};
  unsigned lane = 0;
  Warp* warp = nullptr;
  Stack* stack = nullptr;
  std::shared_ptr<void> instructions;  // emulated_ptx.h's: what it has under way for this thread
  order::Thread order;
  bool ordered = true;  // by the barrier that it waits at
};

struct Block {
  uint3 index{};
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;  // of its threads that have not ended
  std::unique_ptr<unsigned char, decltype(&free)> memory{nullptr, free};  // shared
  size_t bytes = 0;
  size_t alive = 0;
  bool waited = false;  // for the launch before
  int word = 0;  // of __syncthreads_or
  std::shared_ptr<void> instructions;  // emulated_ptx.h's
};

inline Fiber* current = nullptr;
inline const std::function<void()>* kernel = nullptr;
inline std::string failure;
inline jmp_buf scheduler;
inline void* scheduler_fake_stack = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size = 0;

inline void before_switch([[maybe_unused]] void** fake, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake, stack, size);
#endif
}

inline void after_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** stack, [[maybe_unused]] size_t* size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, stack, size);
#endif
}

/// From a fiber to the scheduler, until it is resumed.
inline void leave(Fiber::State state) {
  Stack* const stack = current->stack;  // a fiber that has ended is gone when its stack is resumed
  current->state = state;
  before_switch(&stack->fake_stack, scheduler_stack, scheduler_stack_size);
  if (_setjmp(stack->place) == 0) _longjmp(scheduler, 1);
  after_switch(stack->fake_stack, &scheduler_stack, &scheduler_stack_size);
}

/// Ends the launch with an exception.
[[noreturn]] inline void fail(const std::string& message) {
  const uint3 block = current->block->index, thread = current->thread;
  const auto place = [](uint3 at) { return std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z); };
  failure = message + " (block " + place(block) + ", thread " + place(thread) + ")";
  for (;;) leave(Fiber::WAITING);
}

inline void release(Fiber* fiber) { fiber->state = Fiber::READY; }

inline void try_barrier(Block& block) {
  Barrier& barrier = block.barrier;
  if (barrier.arrived.empty() || barrier.arrived.size() < block.alive) return;
  for (Fiber* fiber : barrier.arrived) {
    if (fiber->ordered) order::take(fiber->order, barrier.knowledge);
    release(fiber);
  }
  barrier.arrived.clear();
  barrier.knowledge = {};
}

/// bar.sync. Whether it orders the threads' accesses.
inline void meet(bool orders) {
  Block& block = *current->block;
  Barrier& barrier = block.barrier;
  current->ordered = orders;
  if (orders) order::give(current->order, barrier.knowledge);
  current->state = Fiber::WAITING;
  barrier.arrived.push_back(current);
  try_barrier(block);
  if (current->state == Fiber::WAITING) leave(Fiber::WAITING);
}

inline void try_collective(Warp& warp, unsigned mask) {
  const unsigned lanes = mask & warp.there;
  if (!lanes || (lanes & ~warp.waiting)) return;
  for (unsigned left = lanes; left; left &= left - 1) {
    if (warp.seats[std::countr_zero(left)].mask != mask) return;
  }
  warp.seats[std::countr_zero(lanes)].finish(warp.seats, lanes);
  warp.waiting &= ~lanes;
  for (unsigned left = lanes; left; left &= left - 1) {
    Seat& seat = warp.seats[std::countr_zero(left)];
    seat.mask = 0;
    release(seat.fiber);
  }
}

/// The lanes of `mask` meet; then `compute(in, out, lanes)` runs once, with arrays of 32 pointers to what each lane gave and to what it gets
/// (null outside `lanes`). Shuffles, votes and the tensor cores' instructions are made of it. `compute` captures nothing.
template <class Out, class In, class Compute>
Out collective(unsigned mask, const In& in, Compute compute) {
  const order::Quiet quiet;
  static_assert(std::is_empty_v<Compute>);
  const auto finish = [](Seat* seats, unsigned lanes) {
    const In* ins[32] = {};
    Out* outs[32] = {};
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      ins[lane] = static_cast<const In*>(seats[lane].in);
      outs[lane] = static_cast<Out*>(seats[lane].out);
    }
    Compute{}(ins, outs, lanes);
  };
  Warp& warp = *current->warp;
  if (!(mask >> current->lane & 1)) fail("a lane takes part in an exchange whose mask leaves it out");
  Out out{};
  warp.seats[current->lane] = {current, mask, finish, &in, &out};
  warp.waiting |= 1u << current->lane;
  for (unsigned left = mask & warp.waiting; left; left &= left - 1) {
    const Seat& seat = warp.seats[std::countr_zero(left)];
    if (seat.mask != mask || seat.finish != static_cast<void (*)(Seat*, unsigned)>(finish)) {
      fail("lanes of one warp meet at different instructions, or with different masks");
    }
  }
  current->state = Fiber::WAITING;
  try_collective(warp, mask);
  if (current->state == Fiber::WAITING) leave(Fiber::WAITING);
  current->state = Fiber::READY;
  return out;
}

/// A thread ends; who waits for all threads no longer waits for it.
inline void end_thread() {
  Fiber* const self = current;
  Block& block = *self->block;
  --block.alive;
  try_barrier(block);
  self->warp->seats[self->lane].fiber = nullptr;
  self->warp->there &= ~(1u << self->lane);
  for (const Seat& seat : self->warp->seats) {
    if (seat.fiber && seat.mask) try_collective(*self->warp, seat.mask);
  }
  leave(Fiber::ENDED);
}

inline void enter() {
  after_switch(nullptr, &scheduler_stack, &scheduler_stack_size);
  for (;;) {
    (*kernel)();
    end_thread();
  }
}

/// From the scheduler to a fiber, until it waits.
inline void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  blockIdx = fiber.block->index;
#ifdef FASTLORA_ORDER
  order::stack = reinterpret_cast<uintptr_t>(fiber.stack->memory), order::stack_size = STACK;
#endif
  Stack& stack = *fiber.stack;
  before_switch(&scheduler_fake_stack, stack.memory, STACK);
  if (_setjmp(scheduler) == 0) {
    if (stack.entered) _longjmp(stack.place, 1);
    stack.entered = true;
    ucontext_t first;
    getcontext(&first);
    first.uc_stack.ss_sp = stack.memory;
    first.uc_stack.ss_size = STACK;
    first.uc_link = nullptr;
    makecontext(&first, enter, 0);
    setcontext(&first);
  }
  after_switch(scheduler_fake_stack, nullptr, nullptr);
}

inline std::vector<Stack*> spare_stacks;

inline Stack* new_stack() {
  if (spare_stacks.empty()) {
    void* const memory = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("the emulated card has no memory for the stack of a thread");
    return new Stack{static_cast<char*>(memory)};
  }
  Stack* const stack = spare_stacks.back();
  spare_stacks.pop_back();
  return stack;
}

inline std::unique_ptr<Block> begin_block(size_t number, size_t shared) {
  auto block = std::make_unique<Block>();
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  block->index = {
      static_cast<unsigned>(number % gridDim.x), static_cast<unsigned>(number / gridDim.x % gridDim.y),
      static_cast<unsigned>(number / gridDim.x / gridDim.y)};
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, std::max<size_t>(shared, 1)) != 0) throw std::bad_alloc();
  block->memory.reset(static_cast<unsigned char*>(std::memset(memory, 0xFF, shared)));
  block->bytes = shared;
  order::begin_block(memory, shared);
  block->fibers.resize(threads);
  block->warps.resize((threads + 31) / 32);
  block->alive = threads;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block->fibers[i];
    fiber.block = block.get();
    fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber.lane = i % 32;
    fiber.warp = &block->warps[i / 32];
    fiber.warp->seats[fiber.lane].fiber = &fiber;
    fiber.warp->there |= 1u << fiber.lane;
    fiber.stack = new_stack();
    order::begin_thread(fiber.order, static_cast<uint32_t>(number), i);
  }
  return block;
}

inline void end_block(Block& block) {
  for (Fiber& fiber : block.fibers) {
    spare_stacks.push_back(fiber.stack);
    if (fiber.state == Fiber::ENDED) continue;
    fiber.stack->entered = false;  // its thread never returns: the next one begins anew
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack->memory, STACK);
  }
}

/// Resumes every thread that is ready. Whether one did more than wait for memory.
inline bool run_round(std::vector<std::unique_ptr<Block>>& running) {
  bool progress = false;
  for (auto& block : running) {
    const size_t threads = block->fibers.size();
    for (size_t i = 0; i < threads; ++i) {
      Fiber& fiber = block->fibers[descending ? threads - 1 - i : i];
      if (fiber.state == Fiber::WAITING || fiber.state == Fiber::ENDED) continue;
      resume(fiber);
      progress = progress || fiber.state != Fiber::IDLE;
      if (!failure.empty()) return false;
    }
  }
  return progress;
}

/// early: it begins before the launch before has ended, which each of its blocks waits for (launch_early).
inline void run(dim3 grid, dim3 block, size_t shared, bool early, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z, threads = static_cast<size_t>(block.x) * block.y * block.z;
  const bool fits = blocks && grid.x <= 0x7FFFFFFF && grid.y <= 65535 && grid.z <= 65535 && threads && threads <= 1024 && shared <= 232448;
  if (!fits) throw std::runtime_error("no card can launch this: a grid or block is empty or too large, or the shared memory is");
  gridDim = grid;
  blockDim = block;
  kernel = &body;
  failure.clear();
  order::begin_launch(early);
  std::vector<std::unique_ptr<Block>> running;
  size_t begun = 0;
  int idle_rounds = 0;
  const auto begin_next = [&] {
    running.push_back(begin_block(descending ? blocks - 1 - begun : begun, shared));
    ++begun;
  };
  while (begun < blocks || !running.empty()) {
    while (begun < blocks && running.size() < together) begin_next();
    const bool progress = run_round(running);
    idle_rounds = progress ? 0 : idle_rounds + 1;
    if (failure.empty() && !progress && begun < blocks) begin_next();
    const bool spins = std::any_of(running.begin(), running.end(), [](const auto& one) {
      return std::any_of(one->fibers.begin(), one->fibers.end(), [](const Fiber& fiber) { return fiber.state == Fiber::IDLE; });
    });
    if (failure.empty() && begun == blocks && idle_rounds > (spins ? IDLE_ROUNDS : 1)) failure = "the threads wait for one another forever";
    std::erase_if(running, [&](const auto& one) {
      if (one->alive) return false;
      if (early && !one->waited && failure.empty()) failure = "a block of a launch that begins early does not wait for the launch before";
      end_block(*one);
      return true;
    });
    if (!failure.empty()) {
      for (auto& one : running) end_block(*one);
      throw std::runtime_error("emulated kernel: " + failure);
    }
  }
}

}  // namespace emulated

/// For the tests, by ctypes: whether threads and blocks run in descending order from now on.
extern "C" __attribute__((weak, visibility("default"))) void emulated_descending(int on) { emulated::descending = on != 0; }
/// Likewise: so many blocks begin together, or fewer where a launch has fewer.
extern "C" __attribute__((weak, visibility("default"))) void emulated_together(int blocks) { emulated::together = static_cast<size_t>(blocks); }

// What device code calls.

inline void __syncthreads(emulated::order::Site at = emulated::order::Site::current()) {
  const emulated::order::Quiet quiet;
  emulated::meet(emulated::order::orders("__syncthreads", at));
}
inline void __syncwarp(unsigned mask = ~0u, emulated::order::Site at = emulated::order::Site::current()) {
  const emulated::order::Quiet quiet;
  emulated::collective<int>(mask, emulated::order::orders("__syncwarp", at), [](const bool* const* in, int* const*, unsigned) {
    emulated::order::Knowledge all;
    const emulated::Seat* const seats = emulated::current->warp->seats;
    for (int lane = 0; lane < 32; ++lane) {
      if (in[lane] && *in[lane]) emulated::order::give(seats[lane].fiber->order, all);
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (in[lane] && *in[lane]) emulated::order::take(seats[lane].fiber->order, all);
    }
  });
}
inline void __nanosleep(unsigned) {
  const emulated::order::Quiet quiet;
  emulated::leave(emulated::Fiber::IDLE);
}
inline void __threadfence(emulated::order::Site at = emulated::order::Site::current()) {
  const emulated::order::Quiet quiet;
  if (emulated::order::orders("__threadfence", at)) emulated::order::fence(emulated::current->order);
}
[[noreturn]] inline void __trap() {
  const emulated::order::Quiet quiet;
  emulated::fail("trap");
}

namespace emulated {
template <class T>
T shuffle(unsigned mask, T value, unsigned from) {
  struct Given { T value; unsigned from; };
  return collective<T>(mask, Given{value, from}, [](const Given* const* in, T* const* out, unsigned lanes) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      if (!in[in[lane]->from]) fail("a shuffle reads a lane that takes no part in it");
      *out[lane] = in[in[lane]->from]->value;
    }
  });
}

/// Where the lane's part of the warp begins, cut into parts of `width` lanes.
inline unsigned part_begin(int width) { return current->lane & ~(static_cast<unsigned>(width) - 1); }
}  // namespace emulated

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const emulated::order::Quiet quiet;
  return emulated::shuffle(mask, value, emulated::part_begin(width) + (static_cast<unsigned>(from) & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const emulated::order::Quiet quiet;
  const unsigned lane = emulated::current->lane, from = lane ^ bits;
  return emulated::shuffle(mask, value, from < emulated::part_begin(width) + width ? from : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const emulated::order::Quiet quiet;
  const unsigned lane = emulated::current->lane;
  return emulated::shuffle(mask, value, lane >= emulated::part_begin(width) + by ? lane - by : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const emulated::order::Quiet quiet;
  const unsigned lane = emulated::current->lane;
  return emulated::shuffle(mask, value, lane + by < emulated::part_begin(width) + width ? lane + by : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulated::collective<unsigned>(mask, predicate, [](const int* const* in, unsigned* const* out, unsigned lanes) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(in[lane] && *in[lane]) << lane;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (lanes >> lane & 1) *out[lane] = votes;
    }
  });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return emulated::collective<unsigned>(mask, value, [](const unsigned* const* in, unsigned* const* out, unsigned lanes) {
    unsigned least = ~0u;
    for (unsigned lane = 0; lane < 32; ++lane) least = lanes >> lane & 1 ? std::min(least, *in[lane]) : least;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (lanes >> lane & 1) *out[lane] = least;
    }
  });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
inline int __syncthreads_or(int predicate, emulated::order::Site at = emulated::order::Site::current()) {
  const emulated::order::Quiet quiet;
  if (!emulated::order::orders("__syncthreads_or", at)) return predicate;
  int& word = emulated::current->block->word;
  emulated::meet(true);
  word = 0;
  emulated::meet(true);
  word |= predicate != 0;
  emulated::meet(true);
  return word;
}

template <class T>
T __ldg(const T* address) { return *address; }
template <class T>
T __ldcg(const T* address) { return *address; }

namespace emulated {
/// A relaxed atomic.
template <class T, class Change>
T change_atomically(T* address, Change change) {
  const order::Quiet quiet;
  order::touch(current->order, address, sizeof(T), order::ATOMIC | order::WRITE);
  order::hear_flag(current->order, address, false);
  order::tell_flag(current->order, address, false);
  return std::exchange(*address, static_cast<T>(change(*address)));
}
}  // namespace emulated

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) { return emulated::change_atomically(address, [&](T now) { return now + value; }); }
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) { return emulated::change_atomically(address, [&](T) { return value; }); }
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) { return emulated::change_atomically(address, [&](T now) { return std::max<T>(now, value); }); }
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emulated::change_atomically(address, [&](T now) { return now == expected ? value : now; });
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(unsigned bits) { return bits ? std::countr_zero(bits) + 1 : 0; }
inline int __clz(unsigned bits) { return std::countl_zero(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline uint64_t __cvta_generic_to_shared(const void* address) { return reinterpret_cast<uint64_t>(address); }
using std::max;
using std::min;

// Vectors and 16-bit numbers.

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using __nv_bfloat16 = c10::BFloat16;
using __half = c10::Half;
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct alignas(4) __half2 { __half x, y; };
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline float __half2float(__half value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {pair.x, pair.y}; }
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }

// What host code calls.

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace fastlora {

template <class... Parameters, class... Arguments>
void launch_as(bool early, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
  emulated::run(grid, block, shared, early, [&]() EMULATED_UNWATCHED {
    emulated::order::hear(true);
    kernel(arguments...);
    emulated::order::hear(false);
  });
}
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t, Arguments... arguments) {
  launch_as(false, kernel, grid, block, shared, arguments...);
}
template <class... Parameters, class... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t, Arguments... arguments) {
  launch_as(true, kernel, grid, block, shared, arguments...);
}
inline void let_next_launch_begin() {}
inline void wait_for_launch_before(emulated::order::Site at = emulated::order::Site::current()) {
  const emulated::order::Quiet quiet;
  emulated::current->block->waited = true;
  if (emulated::order::orders("wait_for_launch_before", at)) emulated::order::wait_for_launch_before(emulated::current->order);
}
inline int processors() { return 16; }

inline unsigned char* shared_memory() {
  const emulated::order::Quiet quiet;
  return emulated::current->block->memory.get();
}

}  // namespace fastlora

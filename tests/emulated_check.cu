// Small kernels for test_cuda_emulated.py: what the emulated card computes, and what it refuses. Never part of the product.
#include "cuda/launch.h"

using namespace fastlora;

namespace {

/// Every warp's sum by shuffles, the block's through shared memory; the block's number is its place.
__global__ void sum_kernel(const int* values, int* sums, int count) {
  int* const parts = reinterpret_cast<int*>(shared_memory());
  int sum = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += values[i];
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sums[blockIdx.x] = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) sums[blockIdx.x] += parts[i];
}

/// The first 40 threads leave: who is left meets, and votes.
__global__ void leave_early_kernel(int* votes) {
  if (threadIdx.x < 40) return;
  __syncthreads();
  votes[threadIdx.x] = static_cast<int>(__ballot_sync(~0u, 1));
}

/// Block 0 waits for what the other blocks write.
__global__ void wait_kernel(int* flags) {
  volatile int* const arrived = flags;
  if (blockIdx.x > 0) atomicAdd(flags, 1);
  else while (*arrived != static_cast<int>(gridDim.x - 1) * 32) __nanosleep(100);
  if (blockIdx.x == 0) flags[1 + threadIdx.x] = 7;
}

/// Lacks a barrier: what a thread reads depends on who runs first.
__global__ void race_kernel(int* out) {
  int* const shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = 1;
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

__global__ void diverge_kernel(int* out) { out[0] = threadIdx.x < 16 ? __shfl_sync(~0u, 1, 0) : static_cast<int>(__ballot_sync(~0u, 1)); }

__global__ void hang_kernel(int*) {
  if (threadIdx.x < 16) __syncwarp();
  else __syncthreads();
}

__global__ void wait_forever_kernel(int* flags) {
  volatile int* const never = flags;
  while (*never != -12345) __nanosleep(100);
}

__global__ void trap_kernel(int*) { __trap(); }

/// Block 0 tells the others of what it wrote by a flag that orders nothing.
__global__ void tell_kernel(int* memory) {
  volatile int* const told = memory;
  if (blockIdx.x == 0) {
    memory[1 + threadIdx.x] = 7;
    atomicAdd(memory, 1);
  } else {
    while (*told != static_cast<int>(blockDim.x)) __nanosleep(100);
    memory[1 + (blockIdx.x * blockDim.x) + threadIdx.x] = memory[1 + threadIdx.x];
  }
}

__global__ void one_kernel(int* memory) { memory[threadIdx.x] = 1; }
__global__ void early_kernel(int* memory, bool waits) {
  if (waits) wait_for_launch_before();
  memory[threadIdx.x] += 1;
}

std::string message;

}  // namespace

/// Null, or the message of the exception.
extern "C" __attribute__((visibility("default"))) const char* check(const char* name, int* memory, int blocks, int threads) {
  const std::string kernel = name;
  try {
    if (kernel == "sum") launch(sum_kernel, blocks, threads, 128, nullptr, memory + blocks, memory, 1000);
    else if (kernel == "leave_early") launch(leave_early_kernel, blocks, threads, 0, nullptr, memory);
    else if (kernel == "wait") launch(wait_kernel, blocks, threads, 0, nullptr, memory);
    else if (kernel == "race") launch(race_kernel, blocks, threads, 4 * threads, nullptr, memory);
    else if (kernel == "diverge") launch(diverge_kernel, blocks, threads, 0, nullptr, memory);
    else if (kernel == "hang") launch(hang_kernel, blocks, threads, 0, nullptr, memory);
    else if (kernel == "wait_forever") launch(wait_forever_kernel, blocks, threads, 0, nullptr, memory);
    else if (kernel == "tell") launch(tell_kernel, blocks, threads, 0, nullptr, memory);
    else if (kernel == "early" || kernel == "too_early") {
      launch(one_kernel, blocks, threads, 0, nullptr, memory);
      launch_early(early_kernel, blocks, threads, 0, nullptr, memory, kernel == "early");
    }
    else if (kernel == "trap") launch(trap_kernel, blocks, threads, 0, nullptr, memory);
    else return "no such kernel";
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

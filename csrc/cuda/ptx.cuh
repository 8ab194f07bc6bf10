// The instructions that C++ has no word for: asynchronous copies, tensor cores, barriers that count. tests/emulated_ptx.h has
// the same functions for the CPU, lane by lane.
//
// Lane 4 g + t holds of a warp's m16n8k16 product: of a, rows g and g + 8 at depths 2 t, 2 t + 1 (a[0], a[1]) and 2 t + 8, 2 t + 9 (a[2], a[3]);
// of b, column g at the same depths (b0, b1); of the sum, columns 2 t and 2 t + 1 of row g (d[0], d[1]) and of row g + 8 (d[2], d[3]).
#pragma once

#include <cstdint>
#include <string>

#include "launch.h"

namespace fastlora {

/// What a thread waits for, and where: Patience tells it when that does not come.
struct Awaited {
  enum What : int { FREE_STAGE, BOXES } what;
  int stage, tile;
};

inline std::string in_words(const Awaited& awaited) {
  static constexpr const char* WORDS[] = {"a stage's consumers", "the boxes of a stage"};
  return std::string("waited in vain for ") + WORDS[awaited.what] + ", stage " + std::to_string(awaited.stage) + ", tile " + std::to_string(awaited.tile);
}

}  // namespace fastlora

#ifdef FASTLORA_EMULATED
#include "emulated_ptx.h"
#else

#include <cuda.h>

#ifdef FASTLORA_CUDA_CHECKS
#include <cstdio>
#include <cstdlib>
#endif
#include <type_traits>

namespace fastlora {

/// Two numbers rounded to nearest even, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

/// Two bytes of `a` and two of `b`: the low halves, or the high ones.
__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

/// Each byte is all of the sign of the byte that its digit of WHICH names, less 8.
template <uint32_t WHICH>
__device__ __forceinline__ uint32_t from_signs(uint32_t bytes) {
  uint32_t all;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(all) : "r"(bytes), "n"(WHICH));
  return all;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

/// What was computed from the value before cannot be kept for after.
__device__ __forceinline__ void forget(uint32_t& value) { asm volatile("" : "+r"(value)); }
template <int SIZE>
__device__ __forceinline__ void forget(float (&values)[SIZE]) {
#pragma unroll
  for (int i = 0; i < SIZE; ++i) asm volatile("" : "+f"(values[i]));
}

/// Copies SIZE bytes to shared memory: the first `bytes` of them from global memory, zeros after; nothing is read where `bytes` is 0.
template <int SIZE>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  if constexpr (SIZE == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(SIZE), "r"(bytes) : "memory");
  }
}
/// Brings a line of global memory into the second-level cache.
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }
/// Ends a set of copies of this thread.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits for this thread's copies, all but the newest PENDING sets.
template <int PENDING>
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

/// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8, and gets a pair of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}
/// The same, each matrix transposed.
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}

/// d += a b.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Hopper's: the copy engine, which brings tiles; barriers in shared memory that count its bytes; products of four warps from shared memory.

/// A matrix as the copy engine knows it: CUtensorMap.
struct alignas(64) TensorMap { uint64_t opaque[16]; };

/// Describes [rows, columns] of 16-bit numbers in boxes of [box_rows, box_columns], whose rows are 128 bytes. Whether the driver takes it.
inline bool describe(
    TensorMap& map, bool bfloat16, const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows, int box_columns) {
  static const auto encode = [] {  // the driver's function, found through the runtime: nothing is linked against the driver
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(error == cudaSuccess ? found : nullptr);
  }();
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * 2};  // bytes
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  return encode && encode(
      reinterpret_cast<CUtensorMap*>(&map), bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

#ifdef FASTLORA_CUDA_CHECKS
/// A wait in vain, in the host's memory: a card that was stopped tells nothing. (printf would do, were it no call: products of four warps would no
/// longer run beside one another, and something else would be tested.)
struct InVain {
  int is, block, thread;
  Awaited awaited;
};
static __device__ InVain* in_vain;

/// Before a launch whose threads wait; it is told as the process ends. Of each file's kernels on the first card that they run on.
static void hear_of_waits() {
  static InVain* const heard = [] {
    void* memory = nullptr;
    if (cudaHostAlloc(&memory, sizeof(InVain), cudaHostAllocPortable) != cudaSuccess) std::abort();
    return new (memory) InVain{};
  }();
  static const int at_exit = std::atexit([] {
    if (heard->is) std::fprintf(stderr, "fastlora: block %d, thread %d %s\n", heard->block, heard->thread, in_words(heard->awaited).c_str());
  });
  static const cudaError_t error = cudaMemcpyToSymbol(in_vain, &heard, sizeof(heard));
  if (at_exit || error != cudaSuccess) std::abort();
}
#else
inline void hear_of_waits() {}
#endif

/// How long a thread has waited for others. In a test build (FASTLORA_CUDA_CHECKS) it stops the card after two seconds and says for what it waited,
/// instead of a hang that nothing ends; elsewhere it is no code at all.
class Patience {
#ifdef FASTLORA_CUDA_CHECKS
  static constexpr uint32_t MOST = 2000;  // about milliseconds
  static __device__ __forceinline__ uint32_t now() {
    uint64_t nanoseconds;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(nanoseconds));
    return static_cast<uint32_t>(nanoseconds >> 20);
  }
  uint32_t began = now();

 public:
  __device__ __forceinline__ void spend(const Awaited& awaited) const {
    if (now() - began < MOST) return;
    *in_vain = {1, static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x), awaited};
    __threadfence_system();
    __trap();
  }
#else
 public:
  __device__ __forceinline__ void spend(const Awaited&) const {}
#endif
};

/// A barrier of shared memory, whose phases end when `count` threads have arrived and all bytes that they announced are there.
__device__ __forceinline__ void init_barrier(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
/// Makes the barriers known to the copy engine; before a __syncthreads.
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
/// Until the phase of this parity has ended; the phase before the first has parity 1.
__device__ __forceinline__ void wait_barrier(uint64_t* barrier, uint32_t parity, const Awaited& awaited) {
  const Patience patience;
  for (;;) {
    uint32_t ended;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(ended) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    if (ended) return;
    patience.spend(awaited);
  }
}

/// Brings the box that begins at (row, column), zeros outside the matrix, with bytes 16 c of its row r at 16 (c ^ r % 8); `barrier` counts them.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap* map, uint64_t* barrier, int row, int column) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
               "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row) : "memory");
}
template <int COUNT>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }

/// An operand as copy_box leaves it. Where its rows lie across the depth, blocks of 64 columns are `apart` bytes from one another; else 0.
__device__ __forceinline__ uint64_t operand(const void* shared, int apart) {
  constexpr uint64_t EIGHT_ROWS = 1024, SWIZZLE_128 = uint64_t{1} << 62;
  return (shared_address(shared) & 0x3FFFF) >> 4 | static_cast<uint64_t>(apart >> 4) << 16 | (EIGHT_ROWS >> 4) << 32 | SWIZZLE_128;
}

/// Before the first product of a set: registers and shared memory are as the code says.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// Ends a set of products.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits for all but the newest PENDING sets.
template <int PENDING>
__device__ __forceinline__ void wait_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

#define FASTLORA_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FASTLORA_32(d, i) FASTLORA_8(d, i), FASTLORA_8(d, i + 8), FASTLORA_8(d, i + 16), FASTLORA_8(d, i + 24)
#define FASTLORA_WGMMA_64(type) \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
      "}, %32, %33, p, 1, 1, 0, %35; }" : FASTLORA_32(d, 0) : "l"(a), "l"(b), "r"(add), "n"(static_cast<int>(ACROSS)))
#define FASTLORA_WGMMA_256(type) \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %130, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
      "}, %128, %129, p, 1, 1, 0, %131; }" \
      : FASTLORA_32(d, 0), FASTLORA_32(d, 32), FASTLORA_32(d, 64), FASTLORA_32(d, 96) : "l"(a), "l"(b), "r"(add), "n"(static_cast<int>(ACROSS)))

/// d = a b, added to d where `add` is not 0: 64 rows, 2 SIZE columns, 16 depths. ACROSS: b's rows lie across the depth. Warp w of four has rows
/// 16 w to 16 w + 15, its sums as those of m16n8k16, one fragment of 8 columns after the other.
template <class T, bool ACROSS, int SIZE>
__device__ __forceinline__ void multiply_operands(float (&d)[SIZE], uint64_t a, uint64_t b, int add) {
  static_assert(SIZE == 32 || SIZE == 128);
  constexpr bool BFLOAT16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (SIZE == 32 && BFLOAT16) FASTLORA_WGMMA_64("bf16");
  if constexpr (SIZE == 32 && !BFLOAT16) FASTLORA_WGMMA_64("f16");
  if constexpr (SIZE == 128 && BFLOAT16) FASTLORA_WGMMA_256("bf16");
  if constexpr (SIZE == 128 && !BFLOAT16) FASTLORA_WGMMA_256("f16");
}

#undef FASTLORA_8
#undef FASTLORA_32
#undef FASTLORA_WGMMA_64
#undef FASTLORA_WGMMA_256

}  // namespace fastlora

#endif

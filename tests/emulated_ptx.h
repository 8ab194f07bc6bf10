// The functions of csrc/cuda/ptx.cuh for a CPU: the same operands and results, lane by lane. Copies arrive when they are waited for, no earlier, so
// that a wait that is missing shows.
#pragma once

#include <deque>
#include <unordered_map>

#include "emulated_cuda.h"

namespace fastlora {

template <class T>
T narrow(float value) { return static_cast<T>(value); }

template <class T>
uint32_t pack(float low, float high) {
  return std::bit_cast<uint16_t>(narrow<T>(low)) | static_cast<uint32_t>(std::bit_cast<uint16_t>(narrow<T>(high))) << 16;
}

template <class T>
float half_of(uint32_t pair, int high) { return std::bit_cast<T>(static_cast<uint16_t>(pair >> 16 * high)); }

inline uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xFFFF) | b << 16; }
inline uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000); }

inline void forget(uint32_t&) {}

struct Copy {
  void* to;
  const void* from;
  int size, bytes;
};
struct Copies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};
inline std::unordered_map<emulated::Fiber*, Copies> copies;  // of each thread that has any

template <int SIZE, bool near = false>
void copy_async(void* shared, const void* global, int bytes) {
  const auto address = reinterpret_cast<uintptr_t>(global);
  if (bytes < 0 || bytes > SIZE) emulated::fail("a copy of more or fewer bytes than there is room for");
  if (reinterpret_cast<uintptr_t>(shared) % SIZE || (bytes && address % SIZE)) emulated::fail("a copy that is not aligned to its size");
  copies[emulated::current].open.push_back({shared, global, SIZE, bytes});
}
inline void prefetch(const void* global) { static_cast<void>(*static_cast<const volatile unsigned char*>(global)); }
inline void commit_copies() {
  Copies& mine = copies[emulated::current];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
template <int PENDING>
void wait_copies() {
  Copies& mine = copies[emulated::current];
  for (; mine.groups.size() > PENDING; mine.groups.pop_front()) {
    for (const Copy& copy : mine.groups.front()) {
      if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.size - copy.bytes);
    }
  }
  if (mine.groups.empty() && mine.open.empty()) copies.erase(emulated::current);
}

struct Quad { uint32_t word[4]; };

template <bool TRANSPOSED>
void load_8x8(uint32_t (&to)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulated::fail("a row of a matrix that is not aligned to 16 bytes");
  const Quad got = emulated::collective<Quad>(~0u, row, [](const void* const* const* in, Quad* const* out, unsigned) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const auto number = [&](int r, int c) { return static_cast<uint32_t>(static_cast<const uint16_t*>(*in[8 * i + r])[c]); };
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

inline void group_sync(int id, int threads) { emulated::meet(id, threads); }

}  // namespace fastlora

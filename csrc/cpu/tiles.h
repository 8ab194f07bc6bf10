// The tile registers of a CPU with AMX, and the operations on them that adapter_tiles.cpp is made of; or, where FASTLORA_EMULATED_TILES is defined,
// the same by AVX-512, so that what is written with them can be tested without AMX. Compiled once per instruction set, as vector.h.
//
// A tile is 16 rows of 64 bytes. As the left operand of a product it holds 16 rows by 32 bfloat16 along what is summed (TILE_DEPTH); as the right
// operand 16 pairs along that by 16 columns (TILE_LANES), the two of a pair side by side; as a sum 16 rows by 16 float32.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace fastlora::FASTLORA_ISA {
namespace {

/// A tile in memory.
struct alignas(64) Tile {
  uint32_t row[16][16];
};

#if !defined(FASTLORA_EMULATED_TILES)

/// The registers of this thread, while it lives. Inline assembly, since a compiler's intrinsics take no template's number, and GCC's (12) do not say
/// that they read memory. The kernel must have granted the registers to the process: isa.cpp.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) Shapes {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static_assert(sizeof(Shapes) == 64);
    const Shapes shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { asm volatile("tilerelease"); }

  template <int NUMBER>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(NUMBER));
  }

  template <int NUMBER>
  void load(const Tile& from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(&from), "r"(int64_t{64}), "i"(NUMBER), "m"(from));
  }

  template <int NUMBER>
  void store(Tile& to) const {
    asm volatile("tilestored %%tmm%c3, (%1,%2,1)" : "=m"(to) : "r"(&to), "r"(int64_t{64}), "i"(NUMBER));
  }

  /// SUM [16, 16] += LEFT [16, 32] · RIGHT [32, 16]: 16,384 FLOPs.
  template <int SUM, int LEFT, int RIGHT>
  void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(LEFT), "i"(RIGHT));
  }
};

#else

class Tiles {
 public:
  template <int NUMBER>
  void zero() {
    tile_[NUMBER] = {};
  }

  template <int NUMBER>
  void load(const Tile& from) {
    tile_[NUMBER] = from;
  }

  template <int NUMBER>
  void store(Tile& to) const {
    to = tile_[NUMBER];
  }

  /// As TDPBF16PS (Intel's manual, volume 2) rounds: the first of all pairs and the second of all pairs are summed apart, from zero, then added, and
  /// their sum to what was there. Each addition rounds to nearest, ties to even, a product being exact; a subnormal number is zero, read or computed.
  template <int SUM, int LEFT, int RIGHT>
  void dot() {
    for (int m = 0; m < 16; ++m) {
      Floats first{}, second{};
      for (int k = 0; k < 16; ++k) {
        const Words left = Words{} + tile_[LEFT].row[m][k], right = read<Words>(tile_[RIGHT].row[k]);
        first = added(first, left << 16, right << 16);
        second = added(second, left & 0xffff0000, right & 0xffff0000);
      }
      const Floats before = flushed(read<Floats>(tile_[SUM].row[m]));
      write(tile_[SUM].row[m], flushed(before + flushed(first + second)));
    }
  }

 private:
  static Floats flushed(Floats value) {
    const Words sign = (Words)value & 0x80000000;
    return (Floats)choose(((Words)value & 0x7f800000) == 0, sign, (Words)value);
  }

  static Floats added(Floats sum, Words left, Words right) {
    return flushed((Floats)_mm512_fmadd_ps((__m512)flushed((Floats)left), (__m512)flushed((Floats)right), (__m512)sum));
  }

  Tile tile_[8] = {};
};

#endif

}  // namespace
}  // namespace fastlora::FASTLORA_ISA

// What kernels.cpp has, which is compiled once per instruction set: no torch here. Each works on a part of the problem, alone and in a fixed order; who
// calls it splits the work and sums the parts.
//
// First the passes over a big activation that the adapters' part of a layer is made of, each reading it once:
//
//     read    v [M, L] -> projected = d(v) Pᵀ [M, R]  and  gradient = cᵀ d(v) [R, L], either or both
//     add     v [M, L] += s d'(c P)
//
// with a panel P [R, L] (A, or Bᵀ), coefficients c [M, R], and dropout's mask as one bit an element, which `draw` draws. The rows of v may each
// have an adapter of their own, and v may be shared by several layers. A cell is a range of rows and a range of columns.
//
// Panels and coefficients are float32, and a panel lies in chunks of PANEL_LANES, zeros beyond: a read's [R / lanes, L, lanes], L rounded up to
// COLUMN_UNIT, an add's [L / lanes, R, lanes], R rounded up to lanes. Or, where v is bfloat16 and the instruction set has dot products of it (`dots`),
// both are bfloat16: a read's panel by row, an add's with two ranks side by side (pairs [ceil(R / 2), L] of 32 bits). COEFFICIENT_UNIT bfloat16
// coefficients are read at a time. The bfloat16 panels of a segment that is `tiled` are right operands of tiles instead (tiles.h), each TILE_DEPTH
// numbers along what is summed by TILE_LANES, two of the former side by side, zeros beyond: a read's [R / TILE_LANES, L / TILE_DEPTH], an add's
// [L / TILE_LANES, R / TILE_DEPTH].
#pragma once

#include <cstdint>

namespace fastlora {

enum class Kind { FLOAT32, BFLOAT16, FLOAT16 };

/// The rows of one adapter of one layer, in sorted order, and its places among what adapters and layers have one after the other.
struct Segment {
  int64_t begin, end;  // places in the order of rows
  int64_t rank;
  int64_t first_row;   // of its layer, in coefficients, projections and bits of several
  int64_t gradient_row;  // its first row in the gradients [sum R_i, L]
  int64_t panel_row;   // in the stacked panels [sum R_i, L], R_i being rounded up to PANEL_LANES
  int64_t pair_row;    // and where ranks lie in pairs [sum R_i / 2, L], R_i being rounded up to 2, or to TILE_DEPTH
  bool tiled;          // v is bfloat16, and multiplied in tiles
  uint64_t seed;
  uint32_t threshold;   // half-words below it are dropped; 0: no dropout
  float factor;         // of a kept element in a read with dropout; of everything that is added
};

struct Segments {
  const Segment* first;
  int64_t count;
};

/// What both passes share.
struct Rows {
  Kind kind;
  bool dots;
  int64_t stride;        // elements from one row of v to the next
  const int64_t* order;  // the row at each place; null: row i is at place i
  const uint8_t* keep;   // rows of keep_stride bytes, bit l of a row for column l; null: nothing is dropped
  int64_t keep_stride;
  const void* panel;     // a read's may be null: nothing is projected
  int64_t panel_stride;
  const void* coefficients;  // a read's may be null: there is no gradient
  int64_t coefficient_stride;
};

struct Read : Rows {
  const void* v;
  float* projected;  // [layers, M, projected_stride], by row
  int64_t projected_stride;
  float* gradient;  // [sum R_i, gradient_stride], added to
  int64_t gradient_stride;
};

struct Add : Rows {
  void* v;
};

/// A block of a bfloat16 panel: TILE_LANES lanes of TILE_DEPTH numbers, two of them side by side, zeros beyond those that are there.
struct Pairs {
  Kind kind;
  const void* from;  // number k of lane l is at l lane_stride + k depth_stride
  int64_t lane_stride, depth_stride;
  int64_t lanes, depth;  // that are there
  bool by_lane;          // a row of `to` is a lane, else a pair of every lane
  int64_t rows;          // of `to`
  uint32_t* to;
  int64_t row_stride;
};

/// The mask of reference.py::keep_mask for rows of `width` columns.
struct Draw {
  int64_t width;
  const int64_t* order;
  uint8_t* keep;
  int64_t keep_stride;
};

/// y [rows, width] = d(x), or y += d(x): dropout by the bits of keep, which are drawn first where they are to be.
struct Dropout {
  Kind kind;
  int64_t width;
  const void* x;  // a row every x_stride elements
  int64_t x_stride;
  uint8_t* keep;  // a row every keep_stride bytes
  int64_t keep_stride;
  bool draws;  // as a Draw of the seed and threshold
  uint64_t seed;
  uint32_t threshold;
  float factor;  // of a kept element
  bool adds;
  void* y;  // a row every y_stride elements
  int64_t y_stride;
};

constexpr int64_t PANEL_LANES = 16;      // of a float32 panel, side by side
constexpr int64_t COLUMN_UNIT = 64;      // cells begin at a multiple of this; panels and rows of bits are padded to one
constexpr int64_t COEFFICIENT_UNIT = 8;
constexpr int64_t TILE_LANES = 16, TILE_DEPTH = 32;
constexpr int64_t TILED_RANK = 512;  // at most

static_assert(PANEL_LANES % TILE_LANES == 0);

/// Rows of a panel in memory, whatever its form.
inline int64_t padded_rank(int64_t rank) { return (rank + PANEL_LANES - 1) / PANEL_LANES * PANEL_LANES; }

struct Cell {
  int64_t begin, end;  // places
  int64_t column_begin, column_end;
};

/// y [rows, N] = x Wᵀ + b, and + xa_i B_iᵀ where a row has an adapter; for 1 to FEW_ROWS rows, each read of W serving all of them.
struct FewRows {
  Kind kind;
  int64_t rows, in;       // K
  const void* x;          // [rows, K], a row every x_stride elements
  int64_t x_stride;
  const void* weight;     // [N, K], a row every weight_stride elements; or a column, where `by_column`
  int64_t weight_stride;
  bool by_column;
  const void* bias;       // [N] or null
  void* y;                // [rows, N] of `kind`; or, where `wide`, of float
  int64_t y_stride;
  bool wide;
  Kind adapter_kind;
  const float* xa;        // [rows, xa_stride], scaled; null: no adapters
  int64_t xa_stride;
  const void* const* lora_b;  // B_i [N, R_i] of each row, dense; null for a row without an adapter
  const int64_t* rank;        // R_i of each row
};

constexpr int64_t FEW_ROWS = 8;

/// y_i += s xa_i Bᵀ for 1 to FEW_ROWS rows of one adapter, rounded once.
struct FewRowsUpdate {
  Kind kind;
  int64_t rows;
  void* y[FEW_ROWS];         // each [N] of `kind`
  const float* xa[FEW_ROWS];  // each [R]
  float scale;
  Kind adapter_kind;
  const void* lora_b;  // [N, R], dense
  int64_t rank;        // R
};

/// y [M, N] = x Wᵀ + b for many rows, or y += x Wᵀ, in float32, whatever the kind of W.
struct Product {
  Kind kind;              // of weight
  int64_t rows, in, out;  // M, K, N
  const float* x;         // a row every x_stride elements
  int64_t x_stride;
  const void* weight;     // [N, K], a row every weight_stride elements; or a column, where `by_column`
  int64_t weight_stride;
  bool by_column;
  const float* bias;      // [N] or null
  bool adds;              // to y, without a bias
  float* y;               // dense
};

constexpr int64_t PRODUCT_DEPTH = 2048;  // of K that a panel of W has at most: it stays in the second-level cache
constexpr int64_t PANEL_COLUMNS = 64;    // of y, at most

/// A weight [N, K] in 4 bits or 8, element (n, k) at n K + k: W = code[q] f, or q f, where `block` elements share the factor f.
/// fastlora/reference.py::dequantise.
struct Quantised {
  int64_t in;             // K, even where there is a code
  const uint8_t* packed;  // with a code two elements a byte, the first in the higher bits; else int8
  const float* code;      // [16] or null
  int64_t block;          // even where there is a code
  const float* factor;    // [blocks]; or, where there are factor_codes, of factor_block blocks each
  const uint8_t* factor_codes;  // [blocks] or null: f = factor_code[c] factor + factor_offset, each operation rounded
  const float* factor_code;     // [256]
  int64_t factor_block;
  float factor_offset;
};

/// The columns column_begin to column_end of some rows, row `first_row` at `to`, each rounded once; the columns even where there is a code.
struct Dequantise {
  Quantised weight;
  Kind kind;
  int64_t first_row, column_begin, column_end;
  void* to;
  int64_t to_stride;  // elements
};

/// y [rows, width] = x rstd w with rstd = 1 / sqrt(mean(x²) + eps); or from dy the gradient dx, in y's place.
struct RmsNorm {
  Kind kind;
  int64_t width;
  const void* x;  // a row every x_stride elements
  int64_t x_stride;
  const void* weight;  // [width], dense
  float eps;
  const void* dy;  // a gradient's; a row every dy_stride elements
  int64_t dy_stride;
  float* rstd;  // [rows]: the forward's, which the gradient reads
  void* y;      // dense
};

/// y [rows, width] = silu(gate) up; or from dy the gradients dgate, in y's place, and dup.
struct Swiglu {
  Kind kind;
  int64_t width;
  const void* gate;  // rows every so many elements
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  const void* dy;  // a gradient's
  int64_t dy_stride;
  void* y;  // dense
  void* dup;
};

/// y [rows, width] = factor u + bias by column; or from dy the gradient du, in y's place, and the factor's.
struct ScaleColumns {
  Kind kind;
  int64_t width;
  const void* u;  // a row every u_stride elements
  int64_t u_stride;
  const float* factor;  // [width], dense
  const void* bias;     // [width], dense, or null
  const void* dy;       // a gradient's; a row every dy_stride elements
  int64_t dy_stride;
  void* y;  // dense
};

constexpr int64_t SUMMED_ROWS = 32;  // that are added up before their sum is

/// norm [rows]: of the rows of W + scale B A.
struct DoraNorm {
  Kind kind;
  int64_t width, rank;
  const void* weight;  // [rows, width], a row every weight_stride elements
  int64_t weight_stride;
  const float* lora_a;  // [rank, width], dense
  const float* lora_b;  // [rows, rank], dense
  float scale;
  float* norm;
};

/// y = x cos + turned(x) sin of every head's row [width], where turned(x) is (-x2, x1) of x's halves (x1, x2); or, inverse, the gradient's transpose.
struct Rotary {
  Kind kind;
  int64_t tokens, heads, width;
  const void* x;        // [batch, heads, tokens, width]
  int64_t x_stride[3];  // of batch, head, token
  const void* cosines;  // [batch, tokens, width]
  const void* sines;
  int64_t angle_stride[2];  // of batch, token; of both
  bool inverse;
  void* y;  // [batch, tokens, heads, width], dense
};

/// out = softmax(scale q kᵀ) v of the keys that a segment's queries see: its ancestors' and its own; or from dout the gradients.
struct Attention {
  Kind kind;
  int64_t heads, kv_heads, width;  // H, a multiple of kv_heads; D
  float scale;
  bool causal;
  const void* q;        // [T, heads, width]
  int64_t q_stride[2];  // of token, head
  const void* k;        // [N, kv_heads, width]
  int64_t k_stride[2];
  const void* v;
  int64_t v_stride[2];
  void* out;   // dense, as all below; the forward's
  float* lse;  // [T, heads], the forward's
  const void* dout;
  void* dq;
  void* dk;
  void* dv;
  float* sums;  // of dk and dv that several parts have a share of: for each head so many floats as sum_stride, in rows of sum_columns
  int64_t sum_stride, sum_columns;
};

/// Keys of one segment, from its first on.
struct AttentionKeys {
  int64_t begin, count;  // of k and v
  int64_t sum;  // where in the head's sums the part leaves its share of their dk, and behind that of their dv; -1: nobody else has one
};

/// Queries of one segment, and the keys of their own that they see.
struct AttentionQueries {
  int64_t begin, count;  // of q
  int64_t first;         // the first one's number among the segment's
  AttentionKeys keys;
};

/// What one thread computes alone, with one head of keys: queries that see the same ancestors, all of these in full, and before their own keys.
struct AttentionPart {
  const AttentionKeys* ancestors;
  int64_t ancestor_count;
  const AttentionQueries* queries;
  int64_t query_count;
};

struct Kernels {
  const char* isa;
  bool dots;
  bool tiles;  // takes segments that are tiled
  void (*draw)(const Draw&, const Segments&, const Cell&);
  void (*read)(const Read&, const Segments&, const Cell&);
  void (*add)(const Add&, const Segments&, const Cell&);
  // to [depth, PANEL_LANES] = from[lane · lane_stride + k · depth_stride]; zeros for lanes that are not there.
  void (*pack)(Kind, const void* from, int64_t lane_stride, int64_t depth_stride, int64_t lanes, int64_t depth, float* to);
  void (*pack_pairs)(const Pairs&);  // where there are dots
  // to [columns, rows] = factor · fromᵀ, of rows `stride` apart whose last vector may be read whole.
  void (*turn)(Kind, const float* from, int64_t stride, int64_t rows, int64_t columns, float factor, void* to);
  void (*widen)(Kind, const void* from, int64_t count, float* to);
  void (*narrow)(Kind, const float* from, int64_t count, void* to);
  void (*dropout)(const Dropout&, int64_t row_begin, int64_t row_end);
  void (*few_rows)(const FewRows&, int64_t column_begin, int64_t column_end);           // columns of y
  void (*few_rows_update)(const FewRowsUpdate&, int64_t column_begin, int64_t column_end);
  int64_t (*product_tiles)(const Product&);  // down the first columns of y, then the next
  void (*product)(const Product&, int64_t tile_begin, int64_t tile_end, float* panel);  // room for PANEL_COLUMNS · min(K, PRODUCT_DEPTH)
  void (*dequantise)(const Dequantise&, int64_t row_begin, int64_t row_end);                                      // rows of the weight
  void (*few_rows_quantised)(const FewRows&, const Quantised&, int64_t column_begin, int64_t column_end);  // its weight is the other; no adapters
  void (*rms_norm)(const RmsNorm&, int64_t row_begin, int64_t row_end);
  void (*rms_norm_backward)(const RmsNorm&, int64_t row_begin, int64_t row_end);
  void (*swiglu)(const Swiglu&, int64_t row_begin, int64_t row_end);
  void (*swiglu_backward)(const Swiglu&, int64_t row_begin, int64_t row_end);
  void (*scale_columns)(const ScaleColumns&, int64_t row_begin, int64_t row_end);
  void (*scale_columns_backward)(const ScaleColumns&, int64_t row_begin, int64_t row_end, float* total, float* room);  // [width] both
  void (*dora_norm)(const DoraNorm&, int64_t row_begin, int64_t row_end);
  int64_t attention_block;  // queries that are computed together: only there may a segment's be cut without a change to what is computed
  int64_t (*attention_room)(const AttentionPart&, int64_t width, bool backward);  // that a part needs, in floats
  void (*attention)(const Attention&, const AttentionPart&, int64_t kv_head, float* room);
  void (*attention_backward)(const Attention&, const AttentionPart&, int64_t kv_head, float* room);
  // dk and dv of some of a segment's keys: the sums of what the parts have left, in their order.
  void (*attention_sum)(const Attention&, const AttentionKeys* shares, int64_t count, int64_t kv_head, int64_t key, int64_t begin, int64_t end);
  void (*rotary)(const Rotary&, int64_t place_begin, int64_t place_end);  // tokens, row by row of the batch
};

/// The kernels for the instruction set that this machine has, or that FASTLORA_ISA (portable, avx2, avx512, avx512bf16, amx, amx_emulated) names.
const Kernels& kernels();

}  // namespace fastlora

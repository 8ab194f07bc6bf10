// prefix_concat on a card: what its kernels are given. Pointers are the card's; strides count elements; what is written is dense.
#pragma once

#include "interface.h"

namespace fastlora {

struct PrefixConcat {
  int64_t B, T, W, D, S;  // W = T + the longest prompt
  Dtype dtype;            // of tokens and out

  const void* prompts;  // [prompt_rows, D]
  Dtype prompts_dtype;
  int64_t prompt_rows, prompts_strides[2];
  const int64_t* starts;        // [S + 1], dense
  const int64_t* prompt_index;  // [B], dense

  const void* tokens;  // embeds [B, T, D]; or, where there are ids, the embedding table [table_rows, D], its first stride unused
  int64_t table_rows, tokens_strides[3];
  const int64_t* ids;  // [B, T] or null
  int64_t ids_strides[2];

  const void* mask;  // [B, T] of any numbers; one is a real token where (its bits & mask_nonzero) != 0
  int mask_bytes;    // a number: 1, 2, 4 or 8
  uint64_t mask_nonzero, mask_one;
  int64_t mask_steps[2];  // strides in bytes
  const int64_t* positions;  // [B, T] or null
  int64_t positions_strides[2];
  const int64_t* labels;  // [B, T] or null
  int64_t labels_strides[2];

  void* out;               // [B, W, D], at a multiple of 16 bytes
  void* new_mask;          // [B, W]
  int64_t* new_positions;  // [B, W]
  int64_t* new_labels;     // [B, W] or null
  int64_t* source;         // [B, W]
};

struct PrefixConcatBackward {
  int64_t B, T, W, D, prompt_rows;
  Dtype dtype;       // of dout and dembeds
  const void* dout;  // [B, W, D]
  int64_t dout_strides[3];
  const int64_t* source;  // [B, W], dense
  float* dprompts;        // [prompt_rows, D] or null
  void* dembeds;          // [B, T, D] of zeros, at a multiple of 16 bytes, or null
};

/// Launch on the stream of the current device. Null, or what CUDA says went wrong.
const char* prefix_concat(const PrefixConcat& given, cudaStream_t stream);
const char* prefix_concat_backward(const PrefixConcatBackward& given, cudaStream_t stream);

}  // namespace fastlora

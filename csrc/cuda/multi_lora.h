// multi_lora on a card: what its kernels are given. Pointers are the card's unless said otherwise; strides count elements; what is written is dense.
#pragma once

#include <string>

#include "interface.h"

namespace fastlora {

struct LoraAdapter {
  const void* a;  // [R, K]
  const void* b;  // [N, R]
  int64_t a_strides[2], b_strides[2];
  int64_t R;
  double scale, dropout_p;
};

/// One frozen layer, its input and S adapters, as fastlora/reference.py::multi_lora takes them.
struct MultiLora {
  int64_t M, K, N, S, R;  // R: the largest rank
  Dtype dtype;            // of x, weight, bias and y: BFLOAT16 or FLOAT16
  Dtype adapter_dtype;    // the same or FLOAT32
  const void* x;          // [M, K], columns side by side; this and the rows at multiples of 16 bytes
  int64_t x_stride;
  const void* weight;     // [N, K], as x
  int64_t weight_stride;
  const void* bias;       // [N] or null
  int64_t bias_stride;
  const LoraAdapter* adapters;  // S, in the caller's memory
  const int64_t* seed;          // one number, or null: nothing is dropped
  const int64_t* order;         // [M]
  const int64_t* offsets;       // [S + 3]
  void* y;                      // [M, N]
  float* xa;                    // [M, R]
  uint8_t* keep;                // [M, 8 ceil(K / 64)], or null where nothing is dropped
  void* workspace;              // multi_lora_workspace(given) bytes, at a multiple of 256
};

/// Bytes of the current device's memory that the call needs for itself; of `given` only sizes are looked at.
int64_t multi_lora_workspace(const MultiLora& given);

/// Launches on the stream of the current device. Empty, or what went wrong, naming the argument that the kernels cannot take.
std::string multi_lora(const MultiLora& given, cudaStream_t stream);

}  // namespace fastlora

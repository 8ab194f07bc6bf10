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

/// One frozen layer, its input and S adapters, as fastlora/reference.py::lora_linear takes them with an order.
struct MultiLora {
  int64_t M, K, N, S, R;  // R: the largest rank
  Dtype dtype;            // of x, weight, bias, y, dy and dx: BFLOAT16 or FLOAT16
  Dtype adapter_dtype;    // of the adapters and their gradients: the same or FLOAT32
  const void* x;          // [M, K], columns side by side; this and the rows at multiples of 16 bytes
  int64_t x_stride;
  const void* weight;     // [N, K], as x, or by column
  int64_t weight_stride;  // of its rows, or columns
  bool by_column;
  const LoraAdapter* adapters;  // S, in the caller's memory
  const int64_t* order;         // [M]
  const int64_t* offsets;       // [S + 3]
};

struct MultiLoraForward {
  MultiLora layer;
  const void* bias;  // [N] or null
  int64_t bias_stride;
  const int64_t* seed;  // one number, or null: nothing is dropped
  void* y;              // [M, N]
  float* xa;            // [M, R]
  uint8_t* keep;        // [M, 8 ceil(K / 64)], or null where nothing is dropped
  void* workspace;      // multi_lora_workspace(layer) bytes, at a multiple of 256
};

struct MultiLoraBackward {
  MultiLora layer;
  const void* dy;  // [M, N], as x
  int64_t dy_stride;
  const float* xa;      // [M, R], the forward's, dense
  const uint8_t* keep;  // the forward's, or null: nothing is dropped
  void* dx;             // [M, K], or null: not needed
  void* da;             // every dA_i [R_i, K], one after the other, or null
  void* db;             // every dB_i [N, R_i], one after the other, or null
  void* workspace;      // multi_lora_backward_workspace(layer) bytes, at a multiple of 256
};

/// Bytes of the current device's memory that a call needs for itself; no pointer is followed but that to the adapters' ranks.
int64_t multi_lora_workspace(const MultiLora& layer);
int64_t multi_lora_backward_workspace(const MultiLora& layer);

/// Launch on the stream of the current device. Empty, or what went wrong, naming the argument that the kernels cannot take.
std::string multi_lora(const MultiLoraForward& given, cudaStream_t stream);
std::string multi_lora_backward(const MultiLoraBackward& given, cudaStream_t stream);

}  // namespace fastlora

// lora_linear on a card: what its kernels are given. Pointers are the card's; strides count elements; what is written is dense.
#pragma once

#include <string>

#include "interface.h"

namespace fastlora {

/// One layer and its input, as fastlora/reference.py::lora_linear takes them.
struct LoraLinear {
  int64_t M, K, N, R;
  Dtype dtype;          // of x, weight, bias, y, dy and dx: BFLOAT16 or FLOAT16
  Dtype adapter_dtype;  // of lora_a, lora_b and their gradients: the same or FLOAT32
  Matrix x;             // [M, K]
  Matrix weight;        // [N, K], by row or by column
  Matrix lora_a;        // [R, K]
  Matrix lora_b;        // [N, R]
  const void* bias;     // [N] or null
  int64_t bias_stride;
  double scale, dropout_p;
};

struct LoraLinearForward {
  LoraLinear layer;
  const int64_t* seed;  // one number, or null: nothing is dropped
  void* y;              // [M, N]
  float* xa;            // [M, R], rows of xa_stride
  int64_t xa_stride;
  uint8_t* keep;        // [M, 8 ceil(K / 64)], or null where nothing is dropped
  void* workspace;      // lora_linear_workspace(layer) bytes, at a multiple of 256
};

struct LoraLinearBackward {
  LoraLinear layer;
  Matrix dy;            // [M, N]
  const float* xa;      // [M, R], the forward's, rows of xa_stride
  int64_t xa_stride;
  const uint8_t* keep;  // the forward's
  void* dx;             // [M, K], or null: not needed
  bool adds;            // to what dx holds: the gradient of other layers with the same x
  void* da;             // [R, K] or null
  void* db;             // [N, R] or null
  void* workspace;      // lora_linear_backward_workspace(layer) bytes, at a multiple of 256
};

/// What these kernels cannot take, naming the argument and what they expect of it; empty where they can. dy: null in the forward.
std::string lora_linear_unsupported(const LoraLinear& layer, const Matrix* dy);

/// Bytes of the card's memory that a call needs for itself.
int64_t lora_linear_workspace(const LoraLinear& layer);
int64_t lora_linear_backward_workspace(const LoraLinear& layer);

/// Launch on the stream of the current device. Empty, or what went wrong; nothing is launched for what lora_linear_unsupported tells of.
std::string lora_linear(const LoraLinearForward& given, cudaStream_t stream);
std::string lora_linear_backward(const LoraLinearBackward& given, cudaStream_t stream);

}  // namespace fastlora

// The operators on a card: what Python hands over is checked, the results are allocated, and the kernels of <stem>.cu are launched on the current
// stream of the tensors' device. torch's stable ABI and no CUDA header: one binary loads into CPU and CUDA builds of torch. Numbers in the card's
// memory are not looked at, which would wait for the card; the kernels check them where they use them.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>

#include "../check.h"
#include "interface.h"

#ifdef FASTLORA_EMULATED  // the tests' library: tensors on the CPU
#define FASTLORA_CARD CPU
#else
#define FASTLORA_CARD CUDA
// In libtorch_cuda; weak, so that a torch without it can load this file.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));
#endif

namespace fastlora {

inline void check_card(const Tensor& tensor, const char* name) {
#ifdef FASTLORA_EMULATED
  check_cpu(tensor, name);
#else
  STD_TORCH_CHECK(tensor.is_cuda(), name, ": got a tensor on another device, expected one on a CUDA card");
#endif
}

/// While it lives a tensor's device is the current one.
class OnDevice {
 public:
#ifdef FASTLORA_EMULATED
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& tensor) : index(tensor.get_device_index()), guard(index) {}
  cudaStream_t stream() const {
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index, &stream) == 0, "device ", index, " has no current stream");
    return static_cast<cudaStream_t>(stream);
  }

 private:
  torch::stable::accelerator::DeviceIndex index;
  torch::stable::accelerator::DeviceGuard guard;
#endif
};

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::BFLOAT16;
    case ScalarType::Half: return Dtype::FLOAT16;
    default: return Dtype::FLOAT32;
  }
}

template <size_t DIMS>
void copy_strides(const Tensor& tensor, int64_t (&strides)[DIMS]) {
  for (size_t i = 0; i < DIMS; ++i) strides[i] = tensor.stride(i);
}

inline Tensor without_elements(const Tensor& like) { return torch::stable::new_empty(like, std::array<int64_t, 1>{0}); }

}  // namespace fastlora

// csrc/cuda/lora_linear.cu as functions for ctypes. `message` takes what went wrong, at most 1023 bytes.
#include <cstdio>
#include <exception>

#include "cuda/lora_linear.h"

namespace {
template <class Given>
void call(std::string (*operation)(const Given&, cudaStream_t), const Given& given, char* message) {
  std::string found;
  try {
    found = operation(given, nullptr);
  } catch (const std::exception& error) {
    found = error.what();
  }
  std::snprintf(message, 1024, "%s", found.c_str());
}
}  // namespace

#pragma GCC visibility push(default)
extern "C" {
int64_t workspace(const fastlora::LoraLinear& layer) { return fastlora::lora_linear_workspace(layer); }
int64_t backward_workspace(const fastlora::LoraLinear& layer) { return fastlora::lora_linear_backward_workspace(layer); }
void forward(const fastlora::LoraLinearForward& given, char* message) { call(fastlora::lora_linear, given, message); }
void backward(const fastlora::LoraLinearBackward& given, char* message) { call(fastlora::lora_linear_backward, given, message); }
}
#pragma GCC visibility pop

// Memory for what lives within one call: without a tensor's way through the dispatcher, and beginning where a cache line does.
#pragma once

#include <cstddef>
#include <new>
#include <utility>

namespace fastlora {

class Memory {
 public:
  explicit Memory(std::size_t bytes = 0) : data_(bytes ? ::operator new(bytes, ALIGNMENT) : nullptr) {}
  Memory(Memory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Memory& operator=(Memory other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Memory() { ::operator delete(data_, ALIGNMENT); }

  explicit operator bool() const { return data_ != nullptr; }

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
  void* data_;
};

}  // namespace fastlora

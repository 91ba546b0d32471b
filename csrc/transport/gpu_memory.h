// Owners of device memory, pinned host memory, events and streams. Made when a Buffer is made;
// nothing here is allocated by a call.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstring>
#include <utility>

#include "kernels/cuda_error.h"

namespace epcomm {

/// Zero-filled device memory.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(size_t bytes) {
    EPCOMM_CUDA_TRY(cudaMalloc(&data_, bytes == 0 ? 1 : bytes));
    EPCOMM_CUDA_TRY(cudaMemset(data_, 0, bytes));
    // cudaMemset does not wait, and streams that are non-blocking do not wait for it.
    EPCOMM_CUDA_TRY(cudaStreamSynchronize(nullptr));
  }
  DeviceMemory(DeviceMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~DeviceMemory() { cudaFree(data_); }
  char* get() const { return static_cast<char*>(data_); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

/// Zero-filled host memory that device code can address by the same pointer.
class PinnedMemory {
 public:
  explicit PinnedMemory(size_t bytes) {
    EPCOMM_CUDA_TRY(cudaHostAlloc(&data_, bytes, cudaHostAllocMapped | cudaHostAllocPortable));
    std::memset(data_, 0, bytes);
  }
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  ~PinnedMemory() { cudaFreeHost(data_); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

/// An event without timing.
class Event {
 public:
  Event() { EPCOMM_CUDA_TRY(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { cudaEventDestroy(event_); }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

/// A stream of the lowest priority, for work beside the caller's; it does not wait for the default
/// stream.
class Stream {
 public:
  Stream() {
    int least = 0, greatest = 0;
    EPCOMM_CUDA_TRY(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    EPCOMM_CUDA_TRY(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, least));
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

/// Later work of waiting starts after what is in done so far. Also inside a graph capture.
inline void order_after(cudaStream_t waiting, cudaStream_t done, const Event& event) {
  EPCOMM_CUDA_TRY(cudaEventRecord(event.get(), done));
  EPCOMM_CUDA_TRY(cudaStreamWaitEvent(waiting, event.get(), 0));
}

}  // namespace epcomm

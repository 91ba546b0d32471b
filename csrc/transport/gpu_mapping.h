// Owners of what a window in device memory is made of. Each gives back in its destructor what it
// holds, from any thread.
#pragma once

#include <cstddef>
#include <utility>

#include "transport/gpu_driver.h"

namespace epcomm {

/// Bytes of physical memory on a device (cuMemCreate), or an imported handle to a peer's.
class PhysicalMemory {
 public:
  PhysicalMemory() = default;
  /// handle_type: how the memory can be exported.
  PhysicalMemory(CuDevice device, size_t bytes, int handle_type);
  /// Memory of another process: shared is what its export gave.
  PhysicalMemory(void* shared, int handle_type);
  PhysicalMemory(PhysicalMemory&& other) noexcept
      : handle_(other.handle_), held_(std::exchange(other.held_, false)) {}
  PhysicalMemory& operator=(PhysicalMemory&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(held_, other.held_);
    return *this;
  }
  ~PhysicalMemory();
  CuMemory get() const { return handle_; }

 private:
  CuMemory handle_ = 0;
  bool held_ = false;
};

/// A range of addresses with physical memory behind it, which this process's device may read and
/// write.
class Mapping {
 public:
  Mapping(PhysicalMemory memory, CuDevice device, size_t bytes);
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();
  CuAddress address() const { return address_; }

 private:
  void release();
  PhysicalMemory memory_;
  size_t bytes_;
  CuAddress address_ = 0;
  bool mapped_ = false;
};

/// cudaMalloc'ed memory, or (opened) a mapping of a peer's. Both belong to a context.
class IpcMemory {
 public:
  explicit IpcMemory(size_t bytes);
  explicit IpcMemory(const CuIpcHandle& handle);
  IpcMemory(const IpcMemory&) = delete;
  IpcMemory& operator=(const IpcMemory&) = delete;
  ~IpcMemory();
  CuAddress address() const { return address_; }

 private:
  CuContext context_ = nullptr;
  CuAddress address_ = 0;
  bool opened_;
};

}  // namespace epcomm

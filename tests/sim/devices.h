// The state of all simulated devices.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "tests/sim/runtime.h"

namespace epcomm::sim {

constexpr size_t kMaxShared = 227 << 10, kWithoutOptIn = 48 << 10, kMaxArgs = 4096;

struct Device {
  std::mutex mutex;
  std::vector<std::weak_ptr<Stream>> streams;
  std::shared_ptr<Stream> default_stream;
  std::string fault;
  uint64_t grids = 0;  // launched so far
  size_t used = 0;     // bytes
};

struct World {
  std::mutex mutex;
  std::vector<std::unique_ptr<Device>> devices;
  std::vector<std::string> faults;
  std::map<void*, std::pair<int, size_t>> memory;  // device, bytes
  std::map<Stream*, std::shared_ptr<Stream>> streams;
  std::map<std::pair<const void*, int>, size_t> shared_allowed;  // by kernel and device
  std::atomic<uint64_t> kernels_issued = 0, copies_issued = 0;

  World();
};
/// Never destroyed: streams of other threads may still run when the process ends.
World& world();
Device& device(int i);

inline thread_local int current_device = 0;
inline thread_local cudaError_t last_error = cudaSuccess;
/// For cudaGetLastError.
cudaError_t remember(cudaError_t error);

bool failed(int device);
void raise_fault(int device, const std::string& what);
/// Bounded: an event that is not reached is a fault.
void wait_for(int device, Recording& recording);
cudaError_t synchronize_device(int device);
std::shared_ptr<Stream> make_stream(int device);

}  // namespace epcomm::sim

// A CUDA driver without a GPU, for tests of what is logic around it. Device memory is an anonymous
// memory file, an exported file descriptor is a descriptor of that file, and a mapping is a
// mapping, so ranks that are processes really do see each other's writes.
#pragma once

#include <string>
#include <vector>

#include "transport/gpu_driver.h"

namespace epcomm::testing {

/// One GPU of the machine.
struct FakeGpu {
  int id;  ///< tells GPUs apart; the UUID is made from it
  std::string name = "NVIDIA H200";
  bool vmm = true, descriptor = true, fabric = false;
};

/// What one rank (a thread or a process) sees. Set with set_fake_machine before anything else.
struct FakeMachine {
  std::vector<FakeGpu> visible;  ///< by ordinal
  int current = 0;               ///< ordinal
  /// Directed pairs (id, id) without peer access.
  std::vector<std::pair<int, int>> no_access;
  bool nvml = true;  ///< libnvidia-ml is there
  /// The call of this name (a member of GpuDriver) fails with this code, after so many successes.
  std::string failing;
  CuResult code = kCuOutOfMemory;
  int successes = 0;
};

/// For this thread.
void set_fake_machine(FakeMachine machine);

/// What the calls of this process still hold: physical memory, address ranges, mappings,
/// cudaMalloc.
struct FakeHoldings {
  int memories = 0, ranges = 0, mappings = 0, allocations = 0;
  bool operator==(const FakeHoldings&) const = default;
};
FakeHoldings fake_holdings();
/// Mappings made accessible to a device that is not the current one; must stay 0.
int fake_foreign_access();

}  // namespace epcomm::testing

// The NVSHMEM job of a process, over a stand-in for NVSHMEM's host library: who initialises it, who
// may share it, and what its windows are made of. Ranks are processes, for a process has one job.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>
#include <host/nvshmem_api.h>
#include <host/nvshmemx_api.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "epcomm/error.h"
#include "tests/cpp/ranks.h"
#include "transport/gpu_nvshmem.h"

namespace epcomm {
namespace {

constexpr double kTimeout = 20;
constexpr size_t kBytes = 100'000;

// What the stand-in was asked for, and what it shall answer, in this process.
struct Fake {
  nvshmemx_init_attr_t attributes{};
  nvshmemx_uniqueid_t id{};
  int ids_made = 0, initialised = 0;
  std::vector<size_t> taken;
  int init_result = 0;
  bool full = false;
} fake;

}  // namespace
}  // namespace epcomm

using epcomm::fake;

int nvshmem_my_pe() { return fake.attributes.rank; }
int nvshmem_n_pes() { return fake.attributes.size; }
// As if every other process were on another machine.
void* nvshmem_ptr(const void* address, int pe) {
  return (pe + fake.attributes.rank) % 2 == 0 ? const_cast<void*>(address) : nullptr;
}
void* nvshmem_align(size_t, size_t bytes) {
  void* memory = nullptr;
  if (fake.full || cudaMalloc(&memory, bytes) != cudaSuccess) return nullptr;
  fake.taken.push_back(bytes);
  std::memset(memory, 0xee, bytes);
  return memory;
}
int nvshmemx_get_uniqueid(nvshmemx_uniqueid_t* id) {
  std::snprintf(id->internal, sizeof id->internal, "job %d of process %d", ++fake.ids_made,
                static_cast<int>(::getpid()));
  return 0;
}
int nvshmemx_set_attr_uniqueid_args(int rank, int size, const nvshmemx_uniqueid_t* id,
                                    nvshmemx_init_attr_t* attributes) {
  *attributes = {rank, size, id};
  return 0;
}
int nvshmemx_init_attr(unsigned flags, nvshmemx_init_attr_t* attributes) {
  if (flags != NVSHMEMX_INIT_WITH_UNIQUEID) return 77;
  ++fake.initialised;
  fake.attributes = *attributes;
  fake.id = *attributes->id;
  return fake.init_result;
}

namespace epcomm {
namespace {

using testing::ForkedBootstrap;

// A process says what is wrong; the test fails by its exit status.
bool holds(bool condition, const char* text, const Bootstrap& group) {
  if (!condition) std::fprintf(stderr, "rank %d: not so: %s\n", group.rank(), text);
  return condition;
}
#define HOLDS(condition) \
  if (!holds(condition, #condition, group)) return false

// The error on this rank, or "".
std::string error_of(Bootstrap& group, size_t bytes = kBytes) {
  try {
    make_nvshmem_window(group, bytes, 0);
  } catch (const std::exception& e) {
    return e.what();
  }
  return "";
}
bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void run(int size, const std::function<bool(ForkedBootstrap&)>& body) {
  for (int status : testing::run_processes(size, kTimeout, body)) EXPECT_EQ(status, 0);
}

TEST(NvshmemJob, IsMadeOnceAndShared) {
  run(3, [](ForkedBootstrap& group) {
    std::shared_ptr<NvshmemWindow> one = make_nvshmem_window(group, kBytes, 1 << 20);
    HOLDS(fake.initialised == 1 && fake.attributes.size == 3);
    HOLDS(fake.attributes.rank == group.rank());
    HOLDS(has(fake.id.internal, "job 1 of process"));
    HOLDS(fake.ids_made == (group.rank() == 0 ? 1 : 0));
    std::shared_ptr<NvshmemWindow> two = make_nvshmem_window(group, kBytes, 0);
    HOLDS(fake.initialised == 1);
    HOLDS(fake.taken == std::vector<size_t>{1 << 20});
    HOLDS(two->own() - one->own() == 2 * 65536);
    for (int r = 0; r < 3; ++r)
      HOLDS(one->pe(r) == r && one->mapped(r) == ((r + group.rank()) % 2 == 0));
    // All zeros, also where it was used before.
    for (size_t i = 0; i < kBytes; ++i) HOLDS(one->own()[i] == 0 && two->own()[i] == 0);
    char* first = one->own();
    std::memset(first, 0x55, kBytes);
    one.reset();
    group.barrier();
    one = make_nvshmem_window(group, kBytes, 0);
    HOLDS(one->own() == first);
    for (size_t i = 0; i < kBytes; ++i) HOLDS(one->own()[i] == 0);
    return true;
  });
}

TEST(NvshmemJob, PartsOfItHaveItsNumbers) {
  ForkedBootstrap pair(2, kTimeout);
  run(4, [&](ForkedBootstrap& group) {
    const auto all = make_nvshmem_window(group, kBytes, 1 << 20);
    if (group.rank() % 2 == 1) {  // ranks 3 and 1, in this order
      pair.set_rank(group.rank() == 3 ? 0 : 1);
      const auto part = make_nvshmem_window(pair, kBytes, 0);
      HOLDS(part->pe(0) == 3 && part->pe(1) == 1);
      HOLDS(part->mapped(0) && part->mapped(1));
      HOLDS(part->own() != all->own());
      HOLDS(has(error_of(pair, 4 << 20), "2 of the 4 ranks"));
    }
    HOLDS(fake.initialised == 1 && fake.taken.size() == 1);
    group.barrier();
    return true;
  });
}

TEST(NvshmemJob, DoesNotGrow) {
  ForkedBootstrap pair(2, kTimeout);
  run(3, [&](ForkedBootstrap& group) {
    if (group.rank() > 0) {
      pair.set_rank(group.rank() - 1);
      make_nvshmem_window(pair, kBytes, 0);
    }
    const std::string text = error_of(group);
    HOLDS(has(text, "does not hold all ranks of this one"));
    HOLDS(has(text, "make the first Buffer of transport rdma over all ranks"));
    HOLDS(fake.initialised == (group.rank() > 0 ? 1 : 0));
    if (group.rank() > 0) make_nvshmem_window(pair, kBytes, 0);  // goes on
    return true;
  });
}

// Else nothing is asked of NVSHMEM, which wants as many on each.
TEST(NvshmemJob, GpusHaveAsManyRanks) {
  run(5, [](ForkedBootstrap& group) {
    ::setenv("EPCOMM_SIM_GPU", group.rank() % 2 == 0 ? "0" : "1", 1);
    const std::string text = error_of(group);
    HOLDS(has(text, "one has ranks 0, 2, 4 and another ranks 1, 3;"));
    HOLDS(has(text, "give each rank a GPU of its own"));
    HOLDS(fake.initialised == 0);
    return true;
  });
  run(4, [](ForkedBootstrap& group) {
    ::setenv("EPCOMM_SIM_GPU", group.rank() % 2 == 0 ? "0" : "1", 1);
    HOLDS(error_of(group).empty());
    return true;
  });
}

TEST(NvshmemJob, AFailureReachesAllRanks) {
  run(3, [](ForkedBootstrap& group) {
    if (group.rank() == 1) fake.init_result = 7;
    HOLDS(has(error_of(group), "nvshmemx_init_attr gave 7"));
    return true;
  });
  run(2, [](ForkedBootstrap& group) {
    fake.full = group.rank() == 1;
    HOLDS(has(error_of(group), "no room in the symmetric heap"));
    fake.full = false;
    HOLDS(error_of(group).empty());
    cudaSetDevice(group.rank());
    HOLDS(has(error_of(group), "initialised on GPU 0, now GPU 1 is current"));
    return true;
  });
}

}  // namespace
}  // namespace epcomm

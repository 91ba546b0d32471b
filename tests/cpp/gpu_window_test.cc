// Windows in device memory, over a fake driver.
#include "transport/gpu_window.h"

#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <filesystem>
#include <optional>
#include <ostream>

#include "core/window_arena.h"
#include "epcomm/error.h"
#include "tests/cpp/fake_driver.h"
#include "tests/cpp/ranks.h"

namespace epcomm {
namespace {

using namespace testing;  // NOLINT: the helpers of these tests

constexpr size_t kBytes = 3 << 20;
constexpr size_t kRounded = 4 << 20;
constexpr double kTimeout = 20;

FakeMachine machine_of(int rank) {
  FakeMachine machine;
  machine.visible = {{50 + rank}, {rank}};
  machine.current = 1;
  return machine;
}

size_t open_files() {
  const std::filesystem::directory_iterator files("/proc/self/fd");
  return static_cast<size_t>(std::distance(begin(files), end(files)));
}

// Every rank writes its mark into every window, and finds all marks in its own.
bool exchange_marks(Bootstrap& bootstrap, WindowShare expected) {
  auto window = make_gpu_window(bootstrap, kBytes, kTimeout);
  const int rank = bootstrap.rank(), size = bootstrap.size();
  const char* mine = window->peer(rank);
  bool good = window->share() == expected && window->bytes() == kRounded &&
              std::all_of(mine, mine + kRounded, [](char c) { return c == 0; });
  bootstrap.barrier();
  for (int r = 0; r < size; ++r) {
    good = good && window->alive(r);
    std::fill_n(window->peer(r) + rank * 1024, 1024, static_cast<char>(1 + rank));
  }
  bootstrap.barrier();
  for (int r = 0; r < size; ++r)
    good = good &&
           std::all_of(mine + r * 1024, mine + (r + 1) * 1024, [r](char c) { return c == 1 + r; });
  bootstrap.barrier();
  return good && fake_foreign_access() == 0;
}

TEST(GpuWindow, ProcessesSeeEachOthersWrites) {
  for (int size : {1, 2, 4}) {
    const auto status = run_processes(size, kTimeout, [](ForkedBootstrap& b) {
      set_fake_machine(machine_of(b.rank()));
      const size_t files = open_files();
      const bool good = exchange_marks(b, WindowShare::kDescriptor);
      return good && fake_holdings() == FakeHoldings{} && open_files() == files;
    });
    EXPECT_EQ(status, std::vector<int>(static_cast<size_t>(size), 0));
  }
}

TEST(GpuWindow, ThreadsSeeEachOthersWrites) {
  run_threads(4, kTimeout, [](std::shared_ptr<Bootstrap> b) {
    set_fake_machine(machine_of(b->rank()));
    EXPECT_TRUE(exchange_marks(*b, WindowShare::kDescriptor));
  });
  EXPECT_EQ(fake_holdings(), FakeHoldings{});
}

// Runs on threads, each with the fake machine that alter makes of its rank's; what each threw.
std::vector<std::string> errors_of(int size,
                                   const std::function<void(int rank, FakeMachine&)>& alter) {
  std::vector<std::string> texts(static_cast<size_t>(size));
  run_threads(size, kTimeout, [&](std::shared_ptr<Bootstrap> b) {
    FakeMachine machine = machine_of(b->rank());
    alter(b->rank(), machine);
    set_fake_machine(machine);
    try {
      make_gpu_window(*b, kBytes, kTimeout);
    } catch (const Error& e) {
      texts[static_cast<size_t>(b->rank())] = e.what();
    }
    b->barrier();  // the bootstrap is still usable on all ranks
  });
  return texts;
}

struct Fault {
  const char* call;
  int successes;
  const char* step;
};

void PrintTo(const Fault& fault, std::ostream* out) {
  *out << "call " << fault.successes << " of " << fault.call;
}

class EveryStep : public ::testing::TestWithParam<Fault> {};

// Whatever fails on one rank: all throw the same text, which names it; nothing is left.
TEST_P(EveryStep, FailsOnAllRanksAlike) {
  const Fault fault = GetParam();
  const size_t files = open_files();
  const auto texts = errors_of(3, [&](int rank, FakeMachine& machine) {
    if (rank != 1) return;
    machine.failing = fault.call;
    machine.successes = fault.successes;
  });
  EXPECT_NE(texts[0].find(fault.step), std::string::npos) << texts[0];
  EXPECT_NE(texts[0].find("failed: on rank 1: "), std::string::npos) << texts[0];
  EXPECT_NE(texts[0].find(std::string("cu") + fault.call), std::string::npos) << texts[0];
  EXPECT_NE(texts[0].find("CUDA_ERROR_OUT_OF_MEMORY"), std::string::npos) << texts[0];
  EXPECT_NE(texts[0].find("transport='nccl'"), std::string::npos) << texts[0];
  for (const auto& text : texts) EXPECT_EQ(text, texts[0]);
  EXPECT_EQ(fake_holdings(), FakeHoldings{});
  EXPECT_EQ(open_files(), files);
}

INSTANTIATE_TEST_SUITE_P(
    Faults, EveryStep,
    ::testing::Values(Fault{"CurrentDevice", 0, "looking at the GPU"},
                      Fault{"MemCreate", 0, "making a window of 4194304 bytes"},
                      Fault{"MemExportToShareableHandle", 0, "making a window"},
                      Fault{"MemAddressReserve", 0, "making a window"},
                      Fault{"MemMap", 0, "making a window"},
                      Fault{"MemSetAccess", 0, "making a window"},
                      Fault{"MemsetD8", 0, "making a window"},
                      Fault{"MemImportFromShareableHandle", 0, "mapping the peers' windows"},
                      Fault{"MemImportFromShareableHandle", 1, "mapping the peers' windows"},
                      Fault{"MemAddressReserve", 1, "mapping the peers' windows"},
                      Fault{"MemMap", 2, "mapping the peers' windows"},
                      Fault{"MemSetAccess", 2, "mapping the peers' windows"}),
    [](const auto& one) {
      return std::string(one.param.call) + std::to_string(one.param.successes);
    });

TEST(GpuWindow, NamesThePeerThatCannotBeMapped) {
  const auto texts = errors_of(3, [](int rank, FakeMachine& machine) {
    if (rank == 0) machine.failing = "MemSetAccess", machine.successes = 2;
  });
  EXPECT_NE(texts[2].find("on rank 0: window of rank 2: cuMemSetAccess"), std::string::npos)
      << texts[2];
}

TEST(GpuWindow, RanksOfOneReasonAreListedTogether) {
  const auto texts = errors_of(3, [](int rank, FakeMachine& machine) {
    if (rank != 1) machine.failing = "MemCreate";
  });
  EXPECT_NE(texts[1].find("on rank 0, 2: cuMemCreate"), std::string::npos) << texts[1];
}

// One GPU without VMM memory, or one that claims to export it and refuses: all take CUDA IPC.
TEST(GpuWindow, FallsBackToIpcOnAllRanks) {
  for (const char* failing : {"", "MemCreate", "MemExportToShareableHandle"}) {
    run_threads(3, kTimeout, [&](std::shared_ptr<Bootstrap> b) {
      FakeMachine machine = machine_of(b->rank());
      if (b->rank() == 2) {
        machine.visible[1].descriptor = *failing != 0;
        machine.failing = failing;
        machine.code = kCuNotSupported;
      }
      set_fake_machine(machine);
      EXPECT_TRUE(exchange_marks(*b, WindowShare::kIpc));
    });
    EXPECT_EQ(fake_holdings(), FakeHoldings{}) << failing;
  }
}

// What was exported before the fallback keeps no memory: its descriptor is closed.
TEST(GpuWindow, FallbackKeepsNoDescriptor) {
  FakeMachine machine = machine_of(0);
  machine.failing = "MemMap";
  machine.code = kCuNotSupported;
  set_fake_machine(machine);
  const size_t files = open_files();
  const auto alone = make_in_process_bootstraps(1, kTimeout);
  const auto window = make_gpu_window(*alone[0], kBytes, kTimeout);
  EXPECT_EQ(window->share(), WindowShare::kIpc);
  EXPECT_EQ(open_files(), files);
}

// One rank refuses to export, another has no memory: no fallback, both are told.
TEST(GpuWindow, DoesNotFallBackWhenMemoryIsShort) {
  const auto texts = errors_of(3, [](int rank, FakeMachine& machine) {
    if (rank == 0) machine.failing = "MemCreate", machine.code = kCuNotSupported;
    if (rank == 1) machine.failing = "MemCreate";
  });
  EXPECT_NE(texts[2].find("on rank 0"), std::string::npos) << texts[2];
  EXPECT_NE(texts[2].find("on rank 1"), std::string::npos) << texts[2];
  EXPECT_EQ(fake_holdings(), FakeHoldings{});
}

TEST(GpuWindow, FailsOnAllRanksWhenIpcFailsToo) {
  const auto texts = errors_of(2, [](int rank, FakeMachine& machine) {
    machine.visible[1].vmm = false;
    if (rank == 0) machine.failing = "IpcOpenMemHandle";
  });
  EXPECT_NE(texts[1].find("window of rank 1: cuIpcOpenMemHandle"), std::string::npos) << texts[1];
  EXPECT_EQ(fake_holdings(), FakeHoldings{});
}

// Ranks that share no descriptors take fabric handles.
TEST(GpuWindow, TakesFabricHandlesWhereThereAreNoDescriptors) {
  const auto status = run_processes(2, kTimeout, [](ForkedBootstrap& b) {
    FakeMachine machine = machine_of(b.rank());
    machine.visible[1].fabric = true;
    machine.visible[1].descriptor = b.rank() == 0;
    set_fake_machine(machine);
    return exchange_marks(b, WindowShare::kFabric) && fake_holdings() == FakeHoldings{};
  });
  EXPECT_EQ(status, std::vector<int>({0, 0}));
}

// The device has the attribute, but the driver refuses such memory.
TEST(GpuWindow, IgnoresAFabricThatIsNotSetUp) {
  run_threads(2, kTimeout, [](std::shared_ptr<Bootstrap> b) {
    FakeMachine machine = machine_of(b->rank());
    machine.visible[1].fabric = true;
    machine.failing = "MemGetAllocationGranularity";
    machine.code = kCuNotPermitted;
    machine.successes = 1;  // of descriptors
    set_fake_machine(machine);
    EXPECT_TRUE(exchange_marks(*b, WindowShare::kDescriptor));
  });
}

TEST(GpuWindow, OwnMemoryAndAllocationsOutliveTheWindow) {
  run_threads(2, kTimeout, [](std::shared_ptr<Bootstrap> b) {
    set_fake_machine(machine_of(b->rank()));
    auto window = make_gpu_window(*b, kBytes, kTimeout);
    std::optional<WindowArena> arena(std::in_place, *window, 4096);
    Allocation piece = arena->allocate(1000);
    EXPECT_TRUE(arena->contains(piece.data, 1000));
    EXPECT_EQ(arena->allocate(kRounded).data, nullptr);
    arena.reset();
    b->barrier();
    window.reset();
    std::fill_n(piece.data, 1000, 'x');
    EXPECT_EQ(piece.data[999], 'x');
    piece = {};
    b->barrier();
  });
  EXPECT_EQ(fake_holdings(), FakeHoldings{});
}

TEST(GpuWindow, ManyWindowsAtOnceAndInTurnLeaveNothing) {
  run_threads(3, kTimeout, [](std::shared_ptr<Bootstrap> b) {
    set_fake_machine(machine_of(b->rank()));
    std::vector<std::unique_ptr<GpuWindow>> windows;
    for (int i = 0; i < 60; ++i) {
      windows.push_back(make_gpu_window(*b, kBytes, kTimeout));
      windows.back()->peer((b->rank() + 1) % 3)[0] = static_cast<char>(i);
      b->barrier();
      EXPECT_EQ(windows.back()->peer(b->rank())[0], static_cast<char>(i));
      b->barrier();
      if (windows.size() == 3) windows.erase(windows.begin());
    }
  });
  EXPECT_EQ(fake_holdings(), FakeHoldings{});
}

// A killed process is noticed at once, and its memory stays mapped.
TEST(GpuWindow, NoticesAKilledProcess) {
  const auto status = run_processes(3, kTimeout, [](ForkedBootstrap& b) {
    set_fake_machine(machine_of(b.rank()));
    auto window = make_gpu_window(b, kBytes, kTimeout);
    if (b.rank() == 2) ::kill(::getpid(), SIGKILL);
    const double end = now_s() + 5;
    while (window->alive(2) && now_s() < end) ::usleep(1000);
    return !window->alive(2) && window->peer(2)[0] == 0;
  });
  EXPECT_EQ(status[0], 0);
  EXPECT_EQ(status[1], 0);
  EXPECT_EQ(WTERMSIG(status[2]), SIGKILL);
}

}  // namespace
}  // namespace epcomm

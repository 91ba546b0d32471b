// Runs the tests of Buffer on the nccl transport, each rank with a simulated device.
#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>
#include <string>

#include "kernels/cuda_error.h"
#include "tests/cpp/tested_transport.h"
#include "tests/sim/runtime.h"

int main(int argc, char** argv) {
  auto& tested = epcomm::testing::tested_transport;
  const char* algorithm = std::getenv("EPCOMM_TEST_ALGORITHM");
  tested.options["algorithm"] = algorithm != nullptr ? algorithm : "auto";
  const std::string way = tested.options["algorithm"];
  // These are about checks and memory that this transport does without.
  std::string without =
      "-BufferFaults.ABadExpertIsNamedBeforeAnyPeerWaits:"
      "BufferFaults.AFullWindowIsReportedByAllRanks";
  // About ranks that send each other nothing, which nobody misses where NCCL moves the rows. Lost
  // peers have a test in nccl_sim_test.cc.
  if (way != "window")
    without +=
        ":BufferFaults.APeerThatNeverCallsIsLost:BufferFaults.APeerThatDoesNotCombineIsLost"
        ":NcclWindow.*";
  else
    without += ":Nccl.ABrokenConnectionIsNotItsFindersFault";
  // Where the host must know the counts nothing can be captured, and only there are chunks.
  without += way == "exact" ? ":Graphs.*" : ":Nccl.ChunksGiveTheSameBits";
  ::testing::GTEST_FLAG(filter) = without;
  ::testing::InitGoogleTest(&argc, argv);
  std::cout << "simulator's seed: " << epcomm::sim::options().seed << "\n";
  tested.name = "nccl";
  tested.begin_rank = [](int rank) { EPCOMM_CUDA_TRY(cudaSetDevice(rank)); };
  tested.finish_calls = [] { EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess); };
  return RUN_ALL_TESTS();
}

// Runs the tests of Buffer on the hierarchical transport between GPUs, each rank with a simulated
// device, in small chunks. Its argument: ranks per node.
#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>

#include "kernels/cuda_error.h"
#include "tests/cpp/tested_transport.h"
#include "tests/sim/runtime.h"

int main(int argc, char** argv) {
  // These are about checks and memory that a transport on GPUs does without.
  ::testing::GTEST_FLAG(filter) =
      "-BufferFaults.ABadExpertIsNamedBeforeAnyPeerWaits:"
      "BufferFaults.AFullWindowIsReportedByAllRanks";
  ::testing::InitGoogleTest(&argc, argv);
  std::cout << "simulator's seed: " << epcomm::sim::options().seed << "\n";
  auto& tested = epcomm::testing::tested_transport;
  tested.name = "hierarchical";
  tested.ranks_per_node = argc > 1 ? std::atoi(argv[1]) : 2;
  tested.options["chunk_tokens"] = "2";
  tested.begin_rank = [](int rank) { EPCOMM_CUDA_TRY(cudaSetDevice(rank)); };
  tested.finish_calls = [] { EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess); };
  return RUN_ALL_TESTS();
}

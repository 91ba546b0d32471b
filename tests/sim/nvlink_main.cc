// Runs the tests of Buffer on the nvlink transport, each rank with a simulated device.
#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>

#include "kernels/cuda_error.h"
#include "tests/cpp/tested_transport.h"
#include "tests/sim/runtime.h"

int main(int argc, char** argv) {
  auto& tested = epcomm::testing::tested_transport;
  const char* path = std::getenv("EPCOMM_TEST_PATH");
  tested.options["path"] = path != nullptr ? path : "auto";
  // These are about checks and memory that a transport on GPUs does without.
  ::testing::GTEST_FLAG(filter) =
      "-BufferFaults.ABadExpertIsNamedBeforeAnyPeerWaits:"
      "BufferFaults.AFullWindowIsReportedByAllRanks";
  ::testing::InitGoogleTest(&argc, argv);
  std::cout << "simulator's seed: " << epcomm::sim::options().seed << "\n";
  tested.name = "nvlink";
  tested.begin_rank = [](int rank) { EPCOMM_CUDA_TRY(cudaSetDevice(rank)); };
  tested.finish_calls = [] { EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess); };
  return RUN_ALL_TESTS();
}

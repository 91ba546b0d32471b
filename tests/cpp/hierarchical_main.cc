// Runs the tests of Buffer on the hierarchical transport, in small chunks. Its argument: ranks per
// node.
#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/cpp/tested_transport.h"

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  auto& tested = epcomm::testing::tested_transport;
  tested.name = "hierarchical";
  tested.ranks_per_node = argc > 1 ? std::atoi(argv[1]) : 2;
  tested.options["chunk_tokens"] = "2";
  return RUN_ALL_TESTS();
}

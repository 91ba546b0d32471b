// Which transport the tests of Buffer run on. A program may change it before its tests start, so
// that the same tests serve transports whose calls return before they are done.
#pragma once

#include <string>

namespace epcomm::testing {

struct TestedTransport {
  std::string name = "cpu";
  /// Called by each rank's thread before anything else.
  void (*begin_rank)(int rank) = [](int) {};
  /// Called by a rank's thread before it looks at what its calls have written.
  void (*finish_calls)() = [] {};
};
inline TestedTransport tested_transport;

}  // namespace epcomm::testing

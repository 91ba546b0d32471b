// Which transport the tests of Buffer run on. A program may change it before its tests start, so
// that the same tests serve transports whose calls return before they are done.
#pragma once

#include <map>
#include <string>

#include "epcomm/buffer.h"

namespace epcomm::testing {

struct TestedTransport {
  std::string name = "cpu";
  int ranks_per_node = 0;
  std::map<std::string, std::string> options;
  /// Called by each rank's thread before anything else.
  void (*begin_rank)(int rank) = [](int) {};
  /// Returns when the calls of this rank's thread are over; does not throw.
  void (*finish_calls)() = [] {};
};
inline TestedTransport tested_transport;

/// Makes a call, which is over when this returns or throws: what it writes to may go then.
template <class Call>
void finish(Buffer& buffer, Call call) {
  struct Finish {
    ~Finish() { tested_transport.finish_calls(); }
  };
  {
    const Finish at_the_end;
    call();
  }
  buffer.check_faults();
}

}  // namespace epcomm::testing

// Which GPUs of a group can address each other's memory: what the nvlink transport needs, and what
// transport="auto" decides by.
#pragma once

#include <string>
#include <vector>

#include "epcomm/bootstrap.h"

namespace epcomm {

/// The GPU of rank from cannot load and store memory of the GPU of rank to.
struct BadPair {
  int from;
  int to;
  std::string reason;
};

/// What check_peer_access found; the same on all ranks.
struct PeerAccess {
  std::vector<BadPair> bad_pairs;  ///< all of them, by from, then to
  std::string
      failure;  ///< why the check itself, or mapping a trial window, failed; empty = it did not

  bool good() const { return bad_pairs.empty() && failure.empty(); }
  /// Every bad pair with its reason, in one line; empty if good.
  std::string text() const;
};

/// Collective, on the GPU that is current on each rank. GPUs are told apart by UUID, never by
/// ordinal, which CUDA_VISIBLE_DEVICES renames. A rank asks CUDA about the peers' GPUs that it sees
/// itself and NVML about those that are hidden from it; where neither knows, and in any case at the
/// end, all ranks map a small trial window of each other, because a capability that is announced
/// may still be refused (by a container without a shared IPC namespace, say). PeerLost if a rank
/// does not answer within timeout_s.
/// share_gpu: ranks may use one GPU; for tests.
PeerAccess check_peer_access(Bootstrap& bootstrap, double timeout_s, bool share_gpu = false);

/// The same inside each node, [0, ranks_per_node) and so on (the last may be smaller), whatever is
/// between nodes. Collective, over all of them. What it finds differs from node to node, and counts
/// the ranks of a node from 0.
PeerAccess check_peer_access_in_nodes(Bootstrap& bootstrap, double timeout_s, int ranks_per_node);

}  // namespace epcomm

// How a rank reaches the windows of the others. Nothing else holds their addresses, so that what
// a link refuses cannot be done.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "epcomm/error.h"
#include "epcomm/window.h"
#include "kernels/node_layout.h"

namespace epcomm {

/// Load and store, to ranks of the own node.
class NodeLink {
 public:
  NodeLink(const Window& window, const NodeMap& map, int rank)
      : window_(window), map_(map), rank_(rank) {}
  /// Address of a place in peer's window.
  char* at(int peer, uint64_t offset) const {
    if (!map_.same_node(rank_, peer))
      throw Error("rank " + std::to_string(rank_) + " addressed the window of rank " +
                  std::to_string(peer) + ", which is on another node");
    return window_.peer(peer) + offset;
  }

 private:
  const Window& window_;
  NodeMap map_;
  int rank_;
};

/// Put, to ranks on other nodes that this rank forwards for or that forward for it.
class RailLink {
 public:
  RailLink(const Window& window, const NodeMap& map, int rank)
      : window_(window), map_(map), rank_(rank) {}
  /// Copies bytes to a place in peer's window; bytes may be 0. What a later signal to peer covers.
  void put(int peer, uint64_t offset, const void* from, size_t bytes) const {
    if (!map_.on_rail(rank_, peer))
      throw Error("rank " + std::to_string(rank_) + " sent to rank " + std::to_string(peer) +
                  ", which is not on its rail");
    if (bytes != 0) std::memcpy(window_.peer(peer) + offset, from, bytes);
  }

 private:
  const Window& window_;
  NodeMap map_;
  int rank_;
};

}  // namespace epcomm

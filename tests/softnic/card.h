// What the plugin, in a rank's process, and its card, in a process of its own, share: a ring of
// commands in shared memory. The plugin writes them, one thread at a time; the card reads them.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace softnic {

/// A place in memory that the card has mapped: the number of its kMap command, counted from 0.
struct CardPlace {
  uint32_t map;
  uint64_t offset;
};

struct Command {
  enum Kind : int32_t {
    kMap,    ///< ipc
    kCopy,   ///< bytes, from one place to another
    kStore,  ///< operand, of 1, 2, 4 or 8 bytes
    kAmo,    ///< nvshmemi_amo_t of 4 or 8 bytes; from: a g_elem_t for the old value, if it fetches
    kFence,
    kQuiet,  ///< Shared::quiets counts it when nothing told to the peer is left
  };
  Kind kind = kFence;
  int32_t peer = 0;
  CardPlace to = {}, from = {};
  uint64_t bytes = 0;
  int32_t amo = 0;
  bool fetches = false;
  uint64_t operand = 0, compare = 0, result_flag = 0;
  cudaIpcMemHandle_t ipc = {};
};

struct Shared {
  static constexpr uint64_t kCommands = 4096;
  enum State : int32_t { kStarting, kReady, kFailed };
  std::atomic<int32_t> state;     ///< written by the card
  std::atomic<uint64_t> written;  ///< commands, by the plugin
  std::atomic<uint64_t> taken;    ///< commands, by the card
  std::atomic<uint64_t> quiets;   ///< kQuiet commands that are over
  Command ring[kCommands];
};
static_assert(std::atomic<uint64_t>::is_always_lock_free);

/// Environment of the card, next to SOFTNIC_CHAOS_US: its arguments are the descriptor of the
/// shared memory, the device, the number of ranks, and the process that it serves.
constexpr int kCardArguments = 4;

}  // namespace softnic

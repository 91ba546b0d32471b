// Progress of a stream, seen from the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "epcomm/error.h"
#include "kernels/token_layout.h"

namespace epcomm {

/// A progress word counts marks in its upper 56 bits and names the operation of the last in the
/// lower 7.
constexpr uint64_t progress_count(uint64_t word) { return word >> 8; }
constexpr Operation progress_operation(uint64_t word) {
  return static_cast<Operation>(word & 0x7f);
}
/// Of calls begun, where the last is one that does not mark its end: to store that to the host
/// would make a short kernel end later. While it waits for long it says so in a wait word.
constexpr uint64_t kEndsSilently = 0x80;

/// A wait word names the call that waits, by its epoch, in its upper 40 bits; the others change
/// with the time that it has waited.
EPCOMM_HOST_DEVICE constexpr uint64_t wait_word(uint64_t epoch, uint64_t waited_ns) {
  return epoch << 24 | (waited_ns >> 20 & 0xffffff);
}
constexpr bool is_wait_of(uint64_t word, uint64_t epoch) { return word >> 24 == epoch << 24 >> 24; }

/// What a GPU tells the host, in pinned memory.
struct ProgressWords {
  uint64_t begun, ended;  ///< progress words
  uint64_t waits;         ///< a wait word, written from time to time, of a wait that lasts
  uint64_t gave_up;       ///< not 0: a wait was given up that the host had not ended
};

/// When the stream gets here, *word (pinned host memory) counts one more mark, as does *count
/// (device memory): the GPU never waits for what it reads from the host. A kernel that runs there
/// anyway makes the mark as it starts (kernels/mark.cuh), else launch_mark. Null word: no mark.
struct Mark {
  uint64_t* word = nullptr;
  uint64_t* count = nullptr;
  Operation operation = Operation::kInit;
};

/// A kernel that does nothing else; none for no mark. Can be captured into a graph.
void launch_mark(const Mark& mark, cudaStream_t stream);

}  // namespace epcomm

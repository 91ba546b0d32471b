// Bulk copies of a grid (TMA): asynchronous, in any order, as late as the rules allow.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "tests/sim/random.h"

namespace epcomm::sim {

struct Block;
struct Thread;

/// What a kernel's barrier word holds here.
struct Barrier {
  static constexpr uint16_t kMagic = 0xb417;
  uint16_t magic;
  uint8_t phase;    // parity of the phase that runs
  uint8_t arrived;  // the one arrival of the phase has happened
  int32_t bytes;    // expected and not loaded yet

  void init() { *this = {kMagic, 0, 0, 0}; }
  bool valid() const { return magic == kMagic && phase < 2 && arrived < 2; }
  /// Begins the next phase if this one is complete.
  void settle() {
    if (arrived == 0 || bytes != 0) return;
    phase ^= 1;
    arrived = 0;
  }
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

class BulkCopies {
 public:
  bool late_stores = false;  ///< stores take no step by themselves

  void load(Thread& thread, void* shared, const void* global, uint32_t bytes, Barrier* barrier);
  void store(Thread& thread, void* global, const void* shared, uint32_t bytes);
  void commit(Thread& thread);
  /// Until of the thread's committed groups all but the newest `pending` have read shared memory.
  void finish_reads(const Thread& thread, uint32_t pending);
  /// Until of the thread's committed groups all but the newest `pending` are written.
  void finish_writes(const Thread& thread, uint32_t pending);
  /// A step of any copy. False if there is none.
  bool advance(Random& random);
  void finish();
  bool empty() const { return copies_.empty(); }
  /// Why a block may not end yet, or "".
  std::string unfinished(const Block& block) const;

 private:
  struct Copy {
    const Thread* thread;
    const Block* block;
    char* to;
    const char* from;
    uint32_t bytes;
    Barrier* barrier;  // of a load
    uint32_t group;    // of a store
    bool has_read;
    std::vector<char> data;
  };
  static void read(Copy& copy);
  static void write(Copy& copy);
  void remove(size_t i);
  std::vector<Copy> copies_;
};

}  // namespace epcomm::sim

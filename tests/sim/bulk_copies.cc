#include "tests/sim/bulk_copies.h"

#include <utility>

#include "tests/sim/grid.h"

namespace epcomm::sim {
namespace {

constexpr int kInFlight = 0xdb;  // what a load leaves where it will land, until it lands

}  // namespace

void BulkCopies::load(Thread& thread, void* shared, const void* global, uint32_t bytes,
                      Barrier* barrier) {
  std::memset(shared, kInFlight, bytes);
  copies_.push_back({&thread,
                     thread.block,
                     static_cast<char*>(shared),
                     static_cast<const char*>(global),
                     bytes,
                     barrier,
                     0,
                     false,
                     {}});
}

void BulkCopies::store(Thread& thread, void* global, const void* shared, uint32_t bytes) {
  copies_.push_back({&thread,
                     thread.block,
                     static_cast<char*>(global),
                     static_cast<const char*>(shared),
                     bytes,
                     nullptr,
                     thread.bulk_groups,
                     false,
                     {}});
}

void BulkCopies::commit(Thread& thread) { ++thread.bulk_groups; }

void BulkCopies::read(Copy& copy) {
  if (copy.has_read) return;
  copy.data.assign(copy.from, copy.from + copy.bytes);
  copy.has_read = true;
}

void BulkCopies::write(Copy& copy) {
  read(copy);
  std::memcpy(copy.to, copy.data.data(), copy.bytes);
  if (copy.barrier == nullptr) return;
  copy.barrier->bytes -= static_cast<int32_t>(copy.bytes);
  copy.barrier->settle();
}

void BulkCopies::remove(size_t i) {
  std::swap(copies_[i], copies_.back());
  copies_.pop_back();
}

void BulkCopies::finish_reads(const Thread& thread, uint32_t pending) {
  for (Copy& copy : copies_)
    if (copy.thread == &thread && copy.barrier == nullptr &&
        copy.group + pending < thread.bulk_groups)
      read(copy);
}

void BulkCopies::finish_writes(const Thread& thread, uint32_t pending) {
  for (size_t i = copies_.size(); i-- > 0;)
    if (copies_[i].thread == &thread && copies_[i].barrier == nullptr &&
        copies_[i].group + pending < thread.bulk_groups) {
      write(copies_[i]);
      remove(i);
    }
}

bool BulkCopies::advance(Random& random) {
  if (copies_.empty()) return false;
  size_t i = random.below(static_cast<uint32_t>(copies_.size()));
  if (late_stores) {
    size_t tries = copies_.size();
    while (copies_[i].barrier == nullptr && --tries != 0) i = (i + 1) % copies_.size();
    if (copies_[i].barrier == nullptr) return false;
  }
  if (!copies_[i].has_read) {
    read(copies_[i]);
  } else {
    write(copies_[i]);
    remove(i);
  }
  return true;
}

void BulkCopies::finish() {
  for (Copy& copy : copies_) write(copy);
  copies_.clear();
}

std::string BulkCopies::unfinished(const Block& block) const {
  for (const Copy& copy : copies_) {
    if (copy.block != &block) continue;
    if (copy.barrier != nullptr) return "a bulk load has not landed when its block ends";
    if (copy.group >= copy.thread->bulk_groups)
      return "a bulk store was not committed when its block ends";
    if (!copy.has_read)
      return "a bulk store may still read shared memory when its block ends: bulk_wait_read is "
             "missing";
  }
  return "";
}

}  // namespace epcomm::sim

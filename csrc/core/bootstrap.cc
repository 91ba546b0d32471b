#include "epcomm/bootstrap.h"

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <string>

#include "epcomm/error.h"

namespace epcomm {

void Bootstrap::barrier() {
  char in = 0;
  std::vector<char> out(static_cast<size_t>(size()));
  all_gather(&in, out.data(), 1);
}

namespace {

// The meeting point of all ranks: one exchange at a time, numbered by generation.
struct Meeting {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<char> gathered, published;
  size_t bytes = 0;  // of the exchange that is gathering
  int arrived = 0;
  bool broken = false;  // some rank gave up; what is gathered has holes
  uint64_t generation = 0;
};

class InProcessBootstrap final : public Bootstrap {
 public:
  InProcessBootstrap(std::shared_ptr<Meeting> meeting, int rank, int size, double timeout_s)
      : meeting_(std::move(meeting)), rank_(rank), size_(size), timeout_(timeout_s) {}

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  bool in_process() const override { return true; }

  void all_gather(const void* in, void* out, size_t bytes) override {
    const size_t total = bytes * static_cast<size_t>(size_);
    std::unique_lock lock(meeting_->mutex);
    if (meeting_->broken) throw PeerLost(-1, Operation::kInit, 0, "an earlier exchange failed");
    if (meeting_->arrived == 0) {
      meeting_->bytes = bytes;
      meeting_->gathered.assign(total, 0);
    }
    EPCOMM_CHECK(bytes == meeting_->bytes, "bytes is " + std::to_string(bytes) +
                                               "; other ranks gather " +
                                               std::to_string(meeting_->bytes));
    std::memcpy(meeting_->gathered.data() + bytes * static_cast<size_t>(rank_), in, bytes);
    const uint64_t generation = meeting_->generation;
    if (++meeting_->arrived == size_) {
      meeting_->arrived = 0;
      meeting_->published.swap(meeting_->gathered);
      ++meeting_->generation;
      meeting_->changed.notify_all();
    } else if (!meeting_->changed.wait_for(lock, timeout_,
                                           [&] { return meeting_->generation != generation; })) {
      meeting_->broken = true;
      throw PeerLost(-1, Operation::kInit, 0,
                     "some rank did not join an exchange of the bootstrap");
    }
    std::memcpy(out, meeting_->published.data(), total);
  }

 private:
  std::shared_ptr<Meeting> meeting_;
  int rank_, size_;
  std::chrono::duration<double> timeout_;
};

}  // namespace

std::vector<std::shared_ptr<Bootstrap>> make_in_process_bootstraps(int size, double timeout_s) {
  auto meeting = std::make_shared<Meeting>();
  std::vector<std::shared_ptr<Bootstrap>> all;
  for (int rank = 0; rank < size; ++rank)
    all.push_back(std::make_shared<InProcessBootstrap>(meeting, rank, size, timeout_s));
  return all;
}

}  // namespace epcomm

// Host windows. Between processes: an anonymous memory file (memfd) per rank, passed as a file
// descriptor. It has no name in the file system, so any exit, SIGKILL included, leaves nothing
// behind.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include "core/clock.h"
#include "core/fd_exchange.h"
#include "epcomm/error.h"
#include "epcomm/window.h"

namespace epcomm {
namespace {

[[noreturn]] void fail(const std::string& what) { throw Error(what + ": " + std::strerror(errno)); }

std::shared_ptr<char> map(int fd, size_t bytes) {
  void* p = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (p == MAP_FAILED) fail("mmap of a window of " + std::to_string(bytes) + " bytes");
  // A core dump would otherwise try to write the whole, mostly untouched, range of every rank.
  ::madvise(p, bytes, MADV_DONTDUMP);
  return {static_cast<char*>(p), [bytes](char* q) { ::munmap(q, bytes); }};
}

// An anonymous file of zeros; errno is set and the descriptor is -1 if there is none to be had.
Fd make_memory(size_t bytes) {
  Fd memory(::memfd_create("epcomm-window", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (memory.get() < 0 || ::ftruncate(memory.get(), static_cast<off_t>(bytes)) != 0) return Fd();
  // Sealed: no peer can shrink the file under a mapping, which would turn loads into SIGBUS.
  ::fcntl(memory.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW);
  return memory;
}

class SharedWindow final : public Window {
 public:
  SharedWindow(Bootstrap& bootstrap, size_t bytes, double timeout_s)
      : SharedWindow(bootstrap, bytes, make_memory(bytes), Deadline(timeout_s)) {}

  size_t bytes() const override { return bytes_; }
  char* peer(int rank) const override { return piece(rank).get(); }
  std::shared_ptr<char> own() const override { return piece(rank_); }
  bool alive(int rank) const override { return links_.alive(rank); }

 private:
  SharedWindow(Bootstrap& bootstrap, size_t bytes, const Fd& memory, const Deadline& deadline)
      : bytes_(bytes),
        rank_(bootstrap.rank()),
        links_(bootstrap, deadline, "make its window of " + std::to_string(bytes) + " bytes",
               memory.get() < 0 ? errno : 0) {
    const std::vector<Fd> theirs = links_.exchange(memory.get(), deadline);
    for (int r = 0; r < bootstrap.size(); ++r)
      pieces_.push_back(
          map(r == rank_ ? memory.get() : theirs[static_cast<size_t>(r)].get(), bytes));
    // No rank may close its sockets (on an error elsewhere, say) before all have mapped.
    bootstrap.barrier();
  }
  const std::shared_ptr<char>& piece(int rank) const { return pieces_[static_cast<size_t>(rank)]; }

  size_t bytes_;
  int rank_;
  PeerLinks links_;
  std::vector<std::shared_ptr<char>> pieces_;
};

// Ranks as threads: one anonymous mapping each, addressed directly by the others. Because every
// rank uses the same addresses, ThreadSanitizer sees all accesses.
class ThreadWindow final : public Window {
 public:
  ThreadWindow(Bootstrap& bootstrap, size_t bytes)
      : bytes_(bytes), rank_(bootstrap.rank()), all_(static_cast<size_t>(bootstrap.size())) {
    void* p = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fail("mmap of a window of " + std::to_string(bytes) + " bytes");
    auto* mine =
        new std::shared_ptr<char>(static_cast<char*>(p), [bytes](char* q) { ::munmap(q, bytes); });
    std::vector<std::shared_ptr<char>*> pointers(all_.size());
    bootstrap.all_gather(&mine, pointers.data(), sizeof mine);
    for (size_t r = 0; r < all_.size(); ++r) all_[r] = *pointers[r];
    bootstrap.barrier();  // everyone has copied; the carrier may go
    delete mine;
  }
  size_t bytes() const override { return bytes_; }
  char* peer(int rank) const override { return all_[static_cast<size_t>(rank)].get(); }
  std::shared_ptr<char> own() const override { return all_[static_cast<size_t>(rank_)]; }
  bool alive(int) const override { return true; }

 private:
  size_t bytes_;
  int rank_;
  std::vector<std::shared_ptr<char>> all_;
};

}  // namespace

std::unique_ptr<Window> make_host_window(Bootstrap& bootstrap, size_t bytes, double timeout_s) {
  if (bootstrap.in_process()) return std::make_unique<ThreadWindow>(bootstrap, bytes);
  return std::make_unique<SharedWindow>(bootstrap, bytes, timeout_s);
}

}  // namespace epcomm

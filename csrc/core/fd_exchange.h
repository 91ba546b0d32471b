// Connections between the processes of one machine: they pass file descriptors while windows are
// made, and tell of a peer's death afterwards.
#pragma once

#include <cerrno>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/clock.h"
#include "epcomm/bootstrap.h"

namespace epcomm {

/// Owner of one file descriptor; -1 = none.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd();
  int get() const { return fd_; }

 private:
  int fd_ = -1;
};

/// Collective. Can the ranks pass each other file descriptors: one running kernel (named by its
/// boot id), one network namespace (of the unix sockets), one user? The same answer on all ranks.
bool on_one_machine(Bootstrap& bootstrap);

/// One connection to each other rank. Abstract unix sockets have no name in a file system, so any
/// exit, SIGKILL included, leaves nothing behind. They stay open, and a pidfd of each peer beside
/// them: that is how alive() learns of a death without waiting for a timeout.
class PeerLinks {
 public:
  /// Collective. error is the errno of what this rank had to do before, 0 if it did; where it is
  /// not 0 on some rank, all throw Error "rank r could not <task>". PeerLost if a rank does not
  /// connect before the deadline.
  PeerLinks(Bootstrap& bootstrap, const Deadline& deadline, const std::string& task, int error);
  ~PeerLinks();

  /// Collective. Passes fd to all other ranks and returns theirs, by rank (none for this rank).
  /// No rank may end its links before all ranks have returned.
  std::vector<Fd> exchange(int fd, const Deadline& deadline);
  /// False once the process behind rank is known to be gone. True does not prove that it is alive.
  bool alive(int rank) const;

 private:
  struct Link;
  struct Hello;
  void connect_to(int peer, const Hello& hello, const Deadline& deadline);
  void accept_one(int listener, const Hello& mine, const Deadline& deadline);

  int rank_, size_;
  std::vector<Link> links_;
};

}  // namespace epcomm

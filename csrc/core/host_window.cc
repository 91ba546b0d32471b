// Host windows. Between processes: an anonymous memory file (memfd) per rank, passed as a file
// descriptor over abstract unix sockets. Neither has a name in the file system, so any exit,
// SIGKILL included, leaves nothing behind. The sockets stay open: the kernel closes them with the
// process, which is how alive() learns of a death without waiting for a timeout.
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/clock.h"
#include "epcomm/error.h"
#include "epcomm/window.h"

namespace epcomm {
namespace {

[[noreturn]] void fail(const std::string& what) { throw Error(what + ": " + std::strerror(errno)); }

// Owner of one file descriptor.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_ = -1;
};

// What a rank tells the others before they connect. The token keeps strangers on the same machine
// out of the (unnamed, but guessable) socket address; the user id is checked as well.
struct Hello {
  char token[16];
  int64_t pid;
  uint32_t uid;
  uint32_t nonce;
};

// First message on a connection, from the higher to the lower rank.
struct Greeting {
  char token[16];
  int32_t rank;
};

sockaddr_un socket_address(const Hello& hello, socklen_t* length) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  // A leading zero byte makes the name abstract: it is no file and goes with the socket.
  const int n = std::snprintf(address.sun_path + 1, sizeof(address.sun_path) - 1,
                              "epcomm-%lld-%08x", static_cast<long long>(hello.pid), hello.nonce);
  *length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + static_cast<size_t>(n));
  return address;
}

void check_same_user(int fd, int peer) {
  ucred credentials{};
  socklen_t length = sizeof credentials;
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) fail("SO_PEERCRED");
  if (credentials.uid != ::geteuid())
    throw Error("rank " + std::to_string(peer) + " runs as user " +
                std::to_string(credentials.uid) + ", this rank as " + std::to_string(::geteuid()) +
                "; run all ranks as one user");
}

void wait_readable(int fd, const Deadline& deadline, int peer, const char* what) {
  for (;;) {
    pollfd p{fd, POLLIN, 0};
    const int n = ::poll(&p, 1, deadline.left_ms(1000));
    if (n > 0) return;
    if (n < 0 && errno != EINTR) fail("poll");
    if (deadline.passed()) throw PeerLost(peer, Operation::kInit, 0, what);
  }
}

void send_bytes(int fd, const void* data, size_t bytes, int peer) {
  if (::send(fd, data, bytes, MSG_NOSIGNAL) != static_cast<ssize_t>(bytes))
    throw PeerLost(peer, Operation::kInit, 0, "its socket closed while windows were exchanged");
}

void send_descriptor(int socket, int fd, int peer) {
  char byte = 0;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  iovec iov{&byte, 1};
  msghdr message{};
  message.msg_iov = &iov;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
  if (::sendmsg(socket, &message, MSG_NOSIGNAL) != 1)
    throw PeerLost(peer, Operation::kInit, 0, "its socket closed while windows were exchanged");
}

Fd receive_descriptor(int socket, const Deadline& deadline, int peer) {
  wait_readable(socket, deadline, peer, "it did not pass its window in time");
  char byte = 0;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  iovec iov{&byte, 1};
  msghdr message{};
  message.msg_iov = &iov;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t n = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
  cmsghdr* header = n == 1 ? CMSG_FIRSTHDR(&message) : nullptr;
  if (header == nullptr || header->cmsg_type != SCM_RIGHTS)
    throw PeerLost(peer, Operation::kInit, 0, "its socket closed while windows were exchanged");
  int fd = -1;
  std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
  return Fd(fd);
}

char* map(int fd, size_t bytes) {
  void* p = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (p == MAP_FAILED) fail("mmap of a window of " + std::to_string(bytes) + " bytes");
  // A core dump would otherwise try to write the whole, mostly untouched, range of every rank.
  ::madvise(p, bytes, MADV_DONTDUMP);
  return static_cast<char*>(p);
}

class SharedWindow final : public Window {
 public:
  SharedWindow(Bootstrap& bootstrap, size_t bytes, double timeout_s)
      : bytes_(bytes),
        rank_(bootstrap.rank()),
        sockets_(static_cast<size_t>(bootstrap.size())),
        base_(static_cast<size_t>(bootstrap.size()), nullptr) {
    Fd memory(::memfd_create("epcomm-window", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (memory.get() < 0) fail("memfd_create");
    if (::ftruncate(memory.get(), static_cast<off_t>(bytes)) != 0) fail("ftruncate of a window");
    // Sealed: no peer can shrink the file under a mapping, which would turn loads into SIGBUS.
    ::fcntl(memory.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW);
    base_[static_cast<size_t>(rank_)] = map(memory.get(), bytes);
    try {
      connect_all(bootstrap, memory.get(), timeout_s);
    } catch (...) {
      unmap();
      throw;
    }
  }
  ~SharedWindow() override { unmap(); }

  size_t bytes() const override { return bytes_; }
  char* peer(int rank) const override { return base_[static_cast<size_t>(rank)]; }

  bool alive(int rank) const override {
    if (rank == rank_) return true;
    pollfd p{sockets_[static_cast<size_t>(rank)].get(), POLLIN | POLLRDHUP, 0};
    // Nothing is ever sent after the exchange, so readable can only mean closed.
    return ::poll(&p, 1, 0) == 0;
  }

 private:
  void unmap() {
    for (char* base : base_)
      if (base != nullptr) ::munmap(base, bytes_);
  }

  // Each rank listens, all learn the addresses, then the higher rank of a pair connects to the
  // lower.
  void connect_all(Bootstrap& bootstrap, int memory, double timeout_s) {
    const int size = bootstrap.size();
    Hello mine{};
    if (::getrandom(&mine, sizeof mine, 0) != static_cast<ssize_t>(sizeof mine)) fail("getrandom");
    mine.pid = ::getpid();
    mine.uid = ::geteuid();
    Fd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    socklen_t length = 0;
    const sockaddr_un address = socket_address(mine, &length);
    if (listener.get() < 0 ||
        ::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0 ||
        ::listen(listener.get(), size) != 0)
      fail("cannot listen on a unix socket");

    std::vector<Hello> hello(static_cast<size_t>(size));
    bootstrap.all_gather(&mine, hello.data(), sizeof mine);
    const Deadline deadline(timeout_s);
    for (int peer = 0; peer < rank_; ++peer) connect_to(peer, hello);
    for (int i = rank_ + 1; i < size; ++i) accept_one(listener.get(), mine, deadline, size);
    for (int peer = 0; peer < size; ++peer)
      if (peer != rank_) send_descriptor(sockets_[static_cast<size_t>(peer)].get(), memory, peer);
    for (int peer = 0; peer < size; ++peer) {
      if (peer == rank_) continue;
      const Fd theirs =
          receive_descriptor(sockets_[static_cast<size_t>(peer)].get(), deadline, peer);
      base_[static_cast<size_t>(peer)] = map(theirs.get(), bytes_);
    }
    // No rank may close its sockets (on an error elsewhere, say) before all have mapped.
    bootstrap.barrier();
  }

  void connect_to(int peer, const std::vector<Hello>& hello) {
    const Hello& theirs = hello[static_cast<size_t>(peer)];
    Fd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    socklen_t length = 0;
    const sockaddr_un address = socket_address(theirs, &length);
    if (fd.get() < 0 ||
        ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0)
      throw Error("cannot reach rank " + std::to_string(peer) + " over a unix socket (" +
                  std::strerror(errno) +
                  "); the cpu transport needs all ranks on one machine, in one network namespace");
    check_same_user(fd.get(), peer);
    Greeting greeting{};
    std::memcpy(greeting.token, theirs.token, sizeof greeting.token);
    greeting.rank = rank_;
    send_bytes(fd.get(), &greeting, sizeof greeting, peer);
    sockets_[static_cast<size_t>(peer)] = std::move(fd);
  }

  void accept_one(int listener, const Hello& mine, const Deadline& deadline, int size) {
    for (;;) {
      wait_readable(listener, deadline, -1, "some rank did not connect in time");
      Fd fd(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
      if (fd.get() < 0) fail("accept");
      Greeting greeting{};
      const timeval patience{1, 0};  // a stranger that sends half a greeting must not hold us up
      ::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
      const ssize_t n = ::recv(fd.get(), &greeting, sizeof greeting, MSG_WAITALL);
      const bool known = n == static_cast<ssize_t>(sizeof greeting) &&
                         std::memcmp(greeting.token, mine.token, sizeof mine.token) == 0 &&
                         greeting.rank > rank_ && greeting.rank < size;
      if (!known) continue;  // a stranger: closed, and the next connection is taken
      check_same_user(fd.get(), greeting.rank);
      sockets_[static_cast<size_t>(greeting.rank)] = std::move(fd);
      return;
    }
  }

  size_t bytes_;
  int rank_;
  std::vector<Fd> sockets_;
  std::vector<char*> base_;
};

// Ranks as threads: one anonymous mapping each, addressed directly by the others. Because every
// rank uses the same addresses, ThreadSanitizer sees all accesses.
class ThreadWindow final : public Window {
 public:
  ThreadWindow(Bootstrap& bootstrap, size_t bytes)
      : bytes_(bytes), all_(static_cast<size_t>(bootstrap.size())) {
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
  bool alive(int) const override { return true; }

 private:
  size_t bytes_;
  std::vector<std::shared_ptr<char>> all_;
};

}  // namespace

std::unique_ptr<Window> make_host_window(Bootstrap& bootstrap, size_t bytes, double timeout_s) {
  if (bootstrap.in_process()) return std::make_unique<ThreadWindow>(bootstrap, bytes);
  return std::make_unique<SharedWindow>(bootstrap, bytes, timeout_s);
}

}  // namespace epcomm

// Host windows. Between processes: an anonymous memory file (memfd) per rank, passed as a file
// descriptor over abstract unix sockets. Neither has a name in the file system, so any exit,
// SIGKILL included, leaves nothing behind. The sockets stay open, and a pidfd of each peer beside
// them: that is how alive() learns of a death without waiting for a timeout.
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
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
  explicit Fd(int fd) : fd_(fd) {}  // -1 = none
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

// Calls again while a signal handler interrupts. Linux does not restart these by itself.
template <class Call>
auto uninterrupted(Call call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

// What a rank tells the others before they connect. The token keeps strangers on the same machine
// out of the (unnamed, but guessable) socket address; the user id is checked as well.
struct Hello {
  char token[16];
  int64_t pid;
  uint32_t nonce;
  int32_t error;  // errno of making this rank's own memory; 0 = made
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

ucred credentials_of(int socket) {
  ucred credentials{};
  socklen_t length = sizeof credentials;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0)
    fail("SO_PEERCRED");
  return credentials;
}

// No call on the socket blocks for longer than is left.
void bound(int socket, const Deadline& deadline) {
  const int ms = std::max(deadline.left_ms(1'000'000), 1);
  const timeval left{ms / 1000, ms % 1000 * 1000};
  ::setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &left, sizeof left);
  ::setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &left, sizeof left);
}

[[noreturn]] void lost(int peer) {
  throw PeerLost(peer, Operation::kInit, 0,
                 "it did not pass its window in time, or ended meanwhile");
}

// One byte of data, with a descriptor beside it.
struct DescriptorMessage {
  char byte = 0;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  iovec iov{&byte, 1};
  msghdr header{};
  DescriptorMessage() {
    header.msg_iov = &iov;
    header.msg_iovlen = 1;
    header.msg_control = control;
    header.msg_controllen = sizeof control;
  }
};

void send_descriptor(int socket, int fd, int peer) {
  DescriptorMessage message;
  cmsghdr* header = CMSG_FIRSTHDR(&message.header);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
  if (uninterrupted([&] { return ::sendmsg(socket, &message.header, MSG_NOSIGNAL); }) != 1)
    lost(peer);
}

Fd receive_descriptor(int socket, const Deadline& deadline, int peer) {
  bound(socket, deadline);
  DescriptorMessage message;
  const ssize_t n =
      uninterrupted([&] { return ::recvmsg(socket, &message.header, MSG_CMSG_CLOEXEC); });
  cmsghdr* header = n == 1 ? CMSG_FIRSTHDR(&message.header) : nullptr;
  if (header == nullptr || header->cmsg_type != SCM_RIGHTS) lost(peer);
  int fd = -1;
  std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
  return Fd(fd);
}

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

// A connection to a peer, and its process: children that a rank forks inherit its sockets, so a
// closed socket is a sign of a death, but an open one no proof of life.
struct Link {
  Fd socket;
  Fd process;  // pidfd; none where the peer's process id is not visible here
};

class SharedWindow final : public Window {
 public:
  SharedWindow(Bootstrap& bootstrap, size_t bytes, double timeout_s)
      : bytes_(bytes),
        rank_(bootstrap.rank()),
        size_(bootstrap.size()),
        links_(static_cast<size_t>(size_)),
        pieces_(static_cast<size_t>(size_)) {
    const Fd memory = make_memory(bytes);
    exchange(bootstrap, memory.get(), memory.get() < 0 ? errno : 0, Deadline(timeout_s));
  }

  size_t bytes() const override { return bytes_; }
  char* peer(int rank) const override { return piece(rank).get(); }
  std::shared_ptr<char> own() const override { return piece(rank_); }

  bool alive(int rank) const override {
    if (rank == rank_) return true;
    const Link& link = links_[static_cast<size_t>(rank)];
    // Nothing is ever sent after the exchange, so a readable socket can only be a closed one. An
    // interrupted poll says nothing.
    pollfd both[] = {{link.socket.get(), POLLIN | POLLRDHUP, 0}, {link.process.get(), POLLIN, 0}};
    return ::poll(both, 2, 0) <= 0;
  }

 private:
  const std::shared_ptr<char>& piece(int rank) const { return pieces_[static_cast<size_t>(rank)]; }
  Link& link(int rank) { return links_[static_cast<size_t>(rank)]; }

  // Each rank listens, all learn the addresses, then the higher rank of a pair connects to the
  // lower.
  void exchange(Bootstrap& bootstrap, int memory, int error, const Deadline& deadline) {
    Hello mine{};
    if (::getrandom(&mine, sizeof mine, 0) != static_cast<ssize_t>(sizeof mine)) fail("getrandom");
    mine.pid = ::getpid();
    Fd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    socklen_t length = 0;
    const sockaddr_un address = socket_address(mine, &length);
    if (listener.get() < 0 ||
        ::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0 ||
        ::listen(listener.get(), size_) != 0)
      error = errno;
    mine.error = error;

    std::vector<Hello> hello(static_cast<size_t>(size_));
    bootstrap.all_gather(&mine, hello.data(), sizeof mine);
    for (int r = 0; r < size_; ++r)
      if (const int theirs = hello[static_cast<size_t>(r)].error; theirs != 0)
        throw Error("rank " + std::to_string(r) + " could not make its window of " +
                    std::to_string(bytes_) + " bytes: " + std::strerror(theirs));
    for (int r = 0; r < rank_; ++r) connect_to(r, hello[static_cast<size_t>(r)], deadline);
    for (int i = rank_ + 1; i < size_; ++i) accept_one(listener.get(), mine, deadline);
    for (int r = 0; r < size_; ++r)
      if (r != rank_) send_descriptor(link(r).socket.get(), memory, r);
    for (int r = 0; r < size_; ++r)
      pieces_[static_cast<size_t>(r)] =
          map(r == rank_ ? memory : receive_descriptor(link(r).socket.get(), deadline, r).get(),
              bytes_);
    // No rank may close its sockets (on an error elsewhere, say) before all have mapped.
    bootstrap.barrier();
  }

  void connect_to(int peer, const Hello& hello, const Deadline& deadline) {
    Fd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (fd.get() < 0) fail("socket");
    bound(fd.get(), deadline);
    socklen_t length = 0;
    const sockaddr_un address = socket_address(hello, &length);
    if (uninterrupted([&] {
          return ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), length);
        }) != 0)
      throw PeerLost(peer, Operation::kInit, 0,
                     std::string("no unix socket reaches it (") + std::strerror(errno) +
                         "): it has ended, or it is not on this machine and in this network "
                         "namespace, which this window needs");
    const ucred credentials = credentials_of(fd.get());
    if (credentials.uid != ::geteuid())
      throw Error("rank " + std::to_string(peer) + " runs as user " +
                  std::to_string(credentials.uid) + ", this rank as " +
                  std::to_string(::geteuid()) + "; run all ranks as one user");
    Greeting greeting{};
    std::memcpy(greeting.token, hello.token, sizeof greeting.token);
    greeting.rank = rank_;
    if (uninterrupted([&] { return ::send(fd.get(), &greeting, sizeof greeting, MSG_NOSIGNAL); }) !=
        static_cast<ssize_t>(sizeof greeting))
      lost(peer);
    keep(peer, std::move(fd), credentials);
  }

  // Takes connections until one is a peer's. Strangers are closed unread if they are of another
  // user, and after their first bytes if they do not know the token.
  void accept_one(int listener, const Hello& mine, const Deadline& deadline) {
    for (;;) {
      pollfd p{listener, POLLIN, 0};
      const int ready = ::poll(&p, 1, deadline.left_ms(1000));
      if (deadline.passed()) lost(-1);
      if (ready <= 0) continue;
      Fd fd(uninterrupted([&] { return ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC); }));
      if (fd.get() < 0) fail("accept");
      const ucred credentials = credentials_of(fd.get());
      if (credentials.uid != ::geteuid()) continue;
      bound(fd.get(), deadline);
      Greeting greeting{};
      const ssize_t n =
          uninterrupted([&] { return ::recv(fd.get(), &greeting, sizeof greeting, MSG_WAITALL); });
      if (n == static_cast<ssize_t>(sizeof greeting) &&
          std::memcmp(greeting.token, mine.token, sizeof mine.token) == 0 &&
          greeting.rank > rank_ && greeting.rank < size_)
        return keep(greeting.rank, std::move(fd), credentials);
    }
  }

  void keep(int peer, Fd socket, const ucred& credentials) {
    Fd process(credentials.pid > 0 ? static_cast<int>(::syscall(SYS_pidfd_open, credentials.pid, 0))
                                   : -1);
    links_[static_cast<size_t>(peer)] = {std::move(socket), std::move(process)};
  }

  size_t bytes_;
  int rank_, size_;
  std::vector<Link> links_;
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

#include "core/fd_exchange.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>

#include "epcomm/error.h"

namespace epcomm {

// What a rank tells the others before they connect. The token keeps strangers on the same machine
// out of the (unnamed, but guessable) socket address; the user id is checked as well.
struct PeerLinks::Hello {
  char token[16];
  int64_t pid;
  uint32_t nonce;
  int32_t error;  // errno of what this rank had to do before; 0 = done
};

// A connection to a peer, and its process: children that a rank forks inherit its sockets, so a
// closed socket is a sign of a death, but an open one no proof of life.
struct PeerLinks::Link {
  Fd socket;
  Fd process;  // pidfd; none where the peer's process id is not visible here
};

namespace {

[[noreturn]] void fail(const std::string& what) { throw Error(what + ": " + std::strerror(errno)); }

// Calls again while a signal handler interrupts. Linux does not restart these by itself.
template <class Call>
auto uninterrupted(Call call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

// First message on a connection, from the higher to the lower rank.
struct Greeting {
  char token[16];
  int32_t rank;
};

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

Fd process_of(const ucred& credentials) {
  return Fd(credentials.pid > 0 ? static_cast<int>(::syscall(SYS_pidfd_open, credentials.pid, 0))
                                : -1);
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

sockaddr_un socket_address(int64_t pid, uint32_t nonce, socklen_t* length) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  // A leading zero byte makes the name abstract: it is no file and goes with the socket.
  const int n = std::snprintf(address.sun_path + 1, sizeof(address.sun_path) - 1,
                              "epcomm-%lld-%08x", static_cast<long long>(pid), nonce);
  *length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + static_cast<size_t>(n));
  return address;
}

}  // namespace

Fd::~Fd() {
  if (fd_ >= 0) ::close(fd_);
}

bool on_one_machine(Bootstrap& bootstrap) {
  char mine[128] = {};
  std::ifstream("/proc/sys/kernel/random/boot_id").read(mine, 36);
  if (::readlink("/proc/self/ns/net", mine + 40, 40) < 0) mine[0] = 0;
  std::snprintf(mine + 80, 40, "%u", static_cast<unsigned>(::geteuid()));
  std::vector<char> all(sizeof mine * static_cast<size_t>(bootstrap.size()));
  bootstrap.all_gather(mine, all.data(), sizeof mine);
  for (int r = 0; r < bootstrap.size(); ++r)
    if (all[0] == 0 || std::memcmp(all.data(), all.data() + sizeof mine * static_cast<size_t>(r),
                                   sizeof mine) != 0)
      return false;
  return true;
}

// Each rank listens, all learn the addresses, then the higher rank of a pair connects to the lower.
PeerLinks::PeerLinks(Bootstrap& bootstrap, const Deadline& deadline, const std::string& task,
                     int error)
    : rank_(bootstrap.rank()), size_(bootstrap.size()), links_(static_cast<size_t>(size_)) {
  Hello mine{};
  if (::getrandom(&mine, sizeof mine, 0) != static_cast<ssize_t>(sizeof mine)) fail("getrandom");
  mine.pid = ::getpid();
  Fd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  socklen_t length = 0;
  const sockaddr_un address = socket_address(mine.pid, mine.nonce, &length);
  if (listener.get() < 0 ||
      ::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0 ||
      ::listen(listener.get(), size_) != 0)
    error = errno;
  mine.error = error;

  std::vector<Hello> hello(static_cast<size_t>(size_));
  bootstrap.all_gather(&mine, hello.data(), sizeof mine);
  for (int r = 0; r < size_; ++r)
    if (const int theirs = hello[static_cast<size_t>(r)].error; theirs != 0)
      throw Error("rank " + std::to_string(r) + " could not " + task + ": " +
                  std::strerror(theirs));
  for (int r = 0; r < rank_; ++r) connect_to(r, hello[static_cast<size_t>(r)], deadline);
  for (int i = rank_ + 1; i < size_; ++i) accept_one(listener.get(), mine, deadline);
}

PeerLinks::~PeerLinks() = default;

std::vector<Fd> PeerLinks::exchange(int fd, const Deadline& deadline) {
  std::vector<Fd> theirs(static_cast<size_t>(size_));
  for (int r = 0; r < size_; ++r)
    if (r != rank_) send_descriptor(links_[static_cast<size_t>(r)].socket.get(), fd, r);
  for (int r = 0; r < size_; ++r)
    if (r != rank_)
      theirs[static_cast<size_t>(r)] =
          receive_descriptor(links_[static_cast<size_t>(r)].socket.get(), deadline, r);
  return theirs;
}

bool PeerLinks::alive(int rank) const {
  if (rank == rank_) return true;
  const Link& link = links_[static_cast<size_t>(rank)];
  // Nothing is ever sent after the exchange, so a readable socket can only be a closed one. An
  // interrupted poll says nothing.
  pollfd both[] = {{link.socket.get(), POLLIN | POLLRDHUP, 0}, {link.process.get(), POLLIN, 0}};
  return ::poll(both, 2, 0) <= 0;
}

void PeerLinks::connect_to(int peer, const Hello& hello, const Deadline& deadline) {
  Fd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (fd.get() < 0) fail("socket");
  bound(fd.get(), deadline);
  socklen_t length = 0;
  const sockaddr_un address = socket_address(hello.pid, hello.nonce, &length);
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
                std::to_string(credentials.uid) + ", this rank as " + std::to_string(::geteuid()) +
                "; run all ranks as one user");
  Greeting greeting{};
  std::memcpy(greeting.token, hello.token, sizeof greeting.token);
  greeting.rank = rank_;
  if (uninterrupted([&] { return ::send(fd.get(), &greeting, sizeof greeting, MSG_NOSIGNAL); }) !=
      static_cast<ssize_t>(sizeof greeting))
    lost(peer);
  Fd process = process_of(credentials);
  links_[static_cast<size_t>(peer)] = {std::move(fd), std::move(process)};
}

// Takes connections until one is a peer's. Strangers are closed unread if they are of another
// user, and after their first bytes if they do not know the token.
void PeerLinks::accept_one(int listener, const Hello& mine, const Deadline& deadline) {
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
        std::memcmp(greeting.token, mine.token, sizeof mine.token) == 0 && greeting.rank > rank_ &&
        greeting.rank < size_) {
      Fd process = process_of(credentials);
      links_[static_cast<size_t>(greeting.rank)] = {std::move(fd), std::move(process)};
      return;
    }
  }
}

}  // namespace epcomm

// What can go wrong, one exception type per kind of fault. Python sees the same tree in
// epcomm.errors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace epcomm {

/// The collective that a fault happened in.
enum class Operation : int32_t { kInit = 0, kRoute = 1, kDispatch = 2, kCombine = 3 };

/// Lower-case name as users read it: "init", "route", "dispatch", "combine".
const char* operation_name(Operation operation);

/// Base of all faults that are not the caller's argument.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An argument is outside what the call takes. Raised before anything is sent; the same call may be
/// repeated with a correct argument. Python: ValueError.
class InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// A peer did not answer within the timeout, or its process is gone. The Buffer cannot be used
/// again.
class PeerLost : public Error {
 public:
  PeerLost(int rank, Operation operation, uint64_t epoch, const std::string& detail);
  int rank;             ///< the lost peer
  Operation operation;  ///< what this rank was doing
  uint64_t epoch;       ///< number of that operation on this Buffer, from 1; 0 during init
};

/// This rank was declared lost by a peer (it was stopped for longer than the timeout) and must not
/// take part any more.
class Evicted : public Error {
 public:
  Evicted(int by_rank, Operation operation, uint64_t epoch);
  int by_rank;  ///< the peer that gave up waiting
  Operation operation;
  uint64_t epoch;
};

/// Ranks disagree on something that must be equal. Every rank raises it with the same text.
class ConfigMismatch : public Error {
 public:
  ConfigMismatch(std::string field, const std::vector<std::string>& value_per_rank);
  std::string field;                        ///< name of the first field that differs
  std::vector<std::string> value_per_rank;  ///< its value on each rank
};

/// The window of some rank has no room for what this call returns. Every rank raises it.
class WindowFull : public Error {
 public:
  WindowFull(int rank, size_t needed_bytes, size_t free_bytes);
  int rank;  ///< the rank whose window is full
  size_t needed_bytes;
  size_t free_bytes;  ///< largest contiguous piece left
};

/// The Buffer was destroyed, or belongs to the parent process (after fork).
class BufferUnusable : public Error {
 public:
  using Error::Error;
};

}  // namespace epcomm

/// Throws InvalidArgument(message) unless cond holds. The message says which argument, what it was,
/// what was expected and what to do.
#define EPCOMM_CHECK(cond, message)                        \
  do {                                                     \
    if (!(cond)) throw ::epcomm::InvalidArgument(message); \
  } while (false)

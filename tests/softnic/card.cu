// The card: carries out what the plugin of one rank tells it, in a process of its own, so that it
// needs nothing of the rank's CUDA context, as a real card would not. README.md.
//
// Memory of all ranks, that of its own included, is mapped by CUDA IPC. Copies are async copies,
// stores and atomics one-thread kernels. What may be done in any order is done together, on several
// streams; what was told after a fence begins when all of it has ended.
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "card.h"
#include "card_queue.h"
#include "device_host_transport/nvshmem_common_transport.h"

#define CARD_TRY(call)                                                           \
  do {                                                                           \
    if (const cudaError_t error_ = (call); error_ != cudaSuccess) {              \
      std::fprintf(stderr, "softnic's card, line %d: %s: %s\n", __LINE__, #call, \
                   cudaGetErrorString(error_));                                  \
      shared->state = Shared::kFailed;                                           \
      std::exit(1);                                                              \
    }                                                                            \
  } while (false)

namespace softnic {
namespace {

constexpr int kStreams = 4;

Shared* shared = nullptr;
pid_t served = 0;

// ---------------------------------------------------------------------------------------- kernels

template <typename T>
__device__ T apply(nvshmemi_amo_t op, T old, T operand, T compare) {
  switch (op) {
    case NVSHMEMI_AMO_INC:
    case NVSHMEMI_AMO_FETCH_INC:
      return old + 1;
    case NVSHMEMI_AMO_ADD:
    case NVSHMEMI_AMO_SIGNAL_ADD:
    case NVSHMEMI_AMO_FETCH_ADD:
      return old + operand;
    case NVSHMEMI_AMO_AND:
    case NVSHMEMI_AMO_FETCH_AND:
      return old & operand;
    case NVSHMEMI_AMO_OR:
    case NVSHMEMI_AMO_FETCH_OR:
      return old | operand;
    case NVSHMEMI_AMO_XOR:
    case NVSHMEMI_AMO_FETCH_XOR:
      return old ^ operand;
    case NVSHMEMI_AMO_FETCH:
      return old;
    case NVSHMEMI_AMO_COMPARE_SWAP:
      return old == compare ? operand : old;
    default:  // all kinds of set, and swap
      return operand;
  }
}

/// Returns the value before the update.
template <typename T>
__device__ T update(T* target, nvshmemi_amo_t op, T operand, T compare) {
  T seen = *static_cast<volatile T*>(target);
  T old;
  do {
    old = seen;
    seen = atomicCAS_system(target, old, apply<T>(op, old, operand, compare));
  } while (seen != old);
  return old;
}

/// A fetched value is visible to the system before its flag.
__global__ void amo_kernel(void* target, int bytes, nvshmemi_amo_t op, uint64_t operand,
                           uint64_t compare, g_elem_t* result, uint64_t result_flag) {
  uint64_t old;
  if (bytes == 8)
    old =
        update(static_cast<unsigned long long*>(target), op,
               static_cast<unsigned long long>(operand), static_cast<unsigned long long>(compare));
  else
    old = update(static_cast<unsigned*>(target), op, static_cast<unsigned>(operand),
                 static_cast<unsigned>(compare));
  if (result == nullptr) return;
  result->data = old;
  __threadfence_system();
  result->flag = result_flag;
}

__global__ void store_kernel(void* target, int bytes, uint64_t value) {
  switch (bytes) {
    case 1:
      *static_cast<volatile uint8_t*>(target) = static_cast<uint8_t>(value);
      break;
    case 2:
      *static_cast<volatile uint16_t*>(target) = static_cast<uint16_t>(value);
      break;
    case 4:
      *static_cast<volatile uint32_t*>(target) = static_cast<uint32_t>(value);
      break;
    default:
      *static_cast<volatile uint64_t*>(target) = value;
  }
}

// ------------------------------------------------------------------------------------------- card

uint64_t now_us() {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(
                                   std::chrono::steady_clock::now().time_since_epoch())
                                   .count());
}

class Card {
 public:
  Card(int num_ranks, uint64_t chaos_us)
      : chaos_(chaos_us != 0),
        random_(static_cast<uint64_t>(served)),
        queue_(num_ranks, chaos_us, random_()) {
    for (cudaStream_t& stream : streams_)
      CARD_TRY(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    cudaFuncAttributes attributes;  // loads the kernels now
    CARD_TRY(cudaFuncGetAttributes(&attributes, amo_kernel));
    CARD_TRY(cudaFuncGetAttributes(&attributes, store_kernel));
  }

  [[noreturn]] void run() {
    for (int idle = 0;; ++idle) {
      while (shared->taken < shared->written) {
        obey(shared->ring[shared->taken % Shared::kCommands]);
        ++shared->taken;
        idle = 0;
      }
      work();
      if (!queue_.empty()) idle = 0;
      if (idle < 1000) continue;
      if (getppid() != served) std::exit(0);
      usleep(20);
    }
  }

 private:
  void obey(const Command& command) {
    switch (command.kind) {
      case Command::kMap: {
        void* base = nullptr;
        CARD_TRY(cudaIpcOpenMemHandle(&base, command.ipc, cudaIpcMemLazyEnablePeerAccess));
        maps_.push_back(static_cast<char*>(base));
        break;
      }
      case Command::kFence:
        queue_.fence(command.peer);
        break;
      case Command::kQuiet:
        while (!queue_.idle(command.peer)) work();
        ++shared->quiets;
        break;
      default:
        queue_.add(command.peer, command, now_us());
    }
  }

  // Does what may be done now, to its end.
  void work() {
    if (queue_.empty()) return;
    const std::vector<Command> commands = queue_.take(now_us());
    if (commands.empty()) return;
    for (const Command& command : commands) begin(command);
    for (cudaStream_t stream : streams_) CARD_TRY(cudaStreamSynchronize(stream));
  }

  cudaStream_t any_stream() { return streams_[chaos_ ? random_() % kStreams : 0]; }
  char* address(const CardPlace& place) const { return maps_.at(place.map) + place.offset; }

  void copy(char* to, const char* from, size_t bytes) {
    CARD_TRY(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, any_stream()));
  }

  void begin(const Command& command) {
    char* to = address(command.to);
    switch (command.kind) {
      case Command::kCopy: {
        const char* from = address(command.from);
        size_t head = command.bytes;
        if (chaos_ && head >= 32 && random_() % 2 == 0) {  // in two pieces, the end first
          head = head / 32 * 16;
          copy(to + head, from + head, command.bytes - head);
        }
        copy(to, from, head);
        break;
      }
      case Command::kStore:
        store_kernel<<<1, 1, 0, any_stream()>>>(to, static_cast<int>(command.bytes),
                                                command.operand);
        CARD_TRY(cudaGetLastError());
        break;
      default:
        amo_kernel<<<1, 1, 0, any_stream()>>>(
            to, static_cast<int>(command.bytes), static_cast<nvshmemi_amo_t>(command.amo),
            command.operand, command.compare,
            command.fetches ? reinterpret_cast<g_elem_t*>(address(command.from)) : nullptr,
            command.result_flag);
        CARD_TRY(cudaGetLastError());
    }
  }

  const bool chaos_;
  std::mt19937_64 random_;
  CardQueue<Command> queue_;
  std::vector<char*> maps_;
  cudaStream_t streams_[kStreams];
};

int serve(char** arguments) {
  const int memory = std::atoi(arguments[0]), device = std::atoi(arguments[1]);
  served = std::atoi(arguments[3]);
  void* mapped = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
  if (mapped == MAP_FAILED) {
    std::perror("softnic's card: mmap");
    return 1;
  }
  shared = static_cast<Shared*>(mapped);
  CARD_TRY(cudaSetDevice(device));
  const char* us = std::getenv("SOFTNIC_CHAOS_US");
  Card card(std::atoi(arguments[2]), us != nullptr ? std::strtoull(us, nullptr, 10) : 0);
  shared->state = Shared::kReady;
  card.run();
}

}  // namespace
}  // namespace softnic

int main(int count, char** arguments) {
  if (count != softnic::kCardArguments + 1) {
    std::fprintf(stderr, "the card of softnic is started by its plugin\n");
    return 1;
  }
  return softnic::serve(arguments + 1);
}

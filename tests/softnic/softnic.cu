// softnic: a remote transport that lets NVSHMEM 3.4.5 run its proxy path between the GPUs of one
// host without a NIC. A test tool; README.md says how to use it.
//
// Puts, gets and atomics arrive from NVSHMEM's proxy as they would for a real network. This plugin
// writes them as commands into shared memory, and calls CUDA only while memory is registered: a
// card, in a process of its own (card.cu), carries them out on the heaps of all ranks.
#include <cuda.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "card.h"
#include "softnic_abi.h"

#define SOFTNIC_CUDA_TRY(call)                                                                   \
  do {                                                                                           \
    if (const cudaError_t error_ = (call); error_ != cudaSuccess) {                              \
      std::fprintf(stderr, "softnic:%d: %s: %s\n", __LINE__, #call, cudaGetErrorString(error_)); \
      return NVSHMEMX_ERROR_INTERNAL;                                                            \
    }                                                                                            \
  } while (false)

namespace softnic {
namespace {

constexpr uint64_t kMagic = 0x50f7;
constexpr auto kCardStarts = std::chrono::seconds(60);
constexpr auto kForEver = std::chrono::hours(24 * 365);

/// Content of a MemHandle.
struct Export {
  uint64_t magic;
  uint64_t base;  // of the allocation, in its owner's address space; 0: not for peers
  uint64_t bytes;
  cudaIpcMemHandle_t ipc;
  int pid;
};
static_assert(sizeof(Export) <= sizeof(MemHandle));

struct State {
  std::mutex mutex;  // the proxy thread and the application's threads may call at once
  int device = -1;   // that the heap is on, when it is known
  pid_t card = 0;
  Shared* shared = nullptr;
  std::map<std::pair<int, uint64_t>, uint32_t> maps;  // (pid, base) to the card's number
  std::map<uint64_t, Export> own;                     // by base
};

/// Operations of all transports of this process: proof that calls went this way.
struct Counts {
  std::atomic<uint64_t> rma{0}, amo{0}, fence{0}, quiet{0};
};
Counts counts;

State& state_of(Transport* self) { return *static_cast<State*>(self->state); }

int complain(const char* what) {
  std::fprintf(stderr, "softnic: %s\n", what);
  return NVSHMEMX_ERROR_INTERNAL;
}

// ------------------------------------------------------------------------------------------- card

/// Until done() holds; not 0 if the card is gone, or has not done it in time.
template <typename Done>
int await(const State& state, Done done, std::chrono::seconds limit = kForEver) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  for (int spin = 1; !done(); ++spin) {
    if (spin % 1024 != 0) continue;
    std::this_thread::yield();
    int status = 0;
    if (waitpid(state.card, &status, WNOHANG) != 0) return complain("the card has ended");
    if (std::chrono::steady_clock::now() > deadline) return complain("the card does not answer");
  }
  return 0;
}

/// Starts the card, if it does not run yet: the program beside this library.
int start_card(State& state, int num_ranks) {
  if (state.card > 0) return 0;
  Dl_info library{};
  if (dladdr(reinterpret_cast<void*>(&start_card), &library) == 0) return complain("dladdr failed");
  const std::string path = library.dli_fname;
  const std::string program = path.substr(0, path.rfind('/') + 1) + "softnic_card";
  if (state.device < 0) SOFTNIC_CUDA_TRY(cudaGetDevice(&state.device));
  const int memory = memfd_create("softnic", 0);
  if (memory < 0 || ftruncate(memory, sizeof(Shared)) != 0) return complain("no shared memory");
  void* mapped = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
  if (mapped == MAP_FAILED) return complain("mmap failed");
  state.shared = new (mapped) Shared{};

  std::string words[] = {program, std::to_string(memory), std::to_string(state.device),
                         std::to_string(num_ranks), std::to_string(getpid())};
  static_assert(std::size(words) == kCardArguments + 1);
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  const int failed =
      posix_spawn(&state.card, program.c_str(), nullptr, nullptr, arguments.data(), environ);
  close(memory);
  if (failed != 0) return complain((program + ": " + std::strerror(failed)).c_str());
  const Shared& shared = *state.shared;
  if (await(
          state, [&] { return shared.state != Shared::kStarting; }, kCardStarts) != 0 ||
      shared.state != Shared::kReady)
    return complain("the card did not start");
  return 0;
}

/// Tells the card, which obeys in this order. With the mutex held.
int tell(State& state, const Command& command) {
  Shared& shared = *state.shared;
  const uint64_t number = shared.written;
  const auto room = [&] { return number - shared.taken < Shared::kCommands; };
  if (const int status = await(state, room)) return status;
  shared.ring[number % Shared::kCommands] = command;
  shared.written = number + 1;
  return 0;
}

/// Until all that was told of a peer is done. With the mutex held.
int tell_quiet(State& state, int peer) {
  const uint64_t before = state.shared->quiets;
  if (const int status = tell(state, {.kind = Command::kQuiet, .peer = peer})) return status;
  return await(state, [&] { return state.shared->quiets > before; });
}

// ----------------------------------------------------------------------------------------- memory

int allocation_of(void* ptr, uint64_t* base, uint64_t* bytes) {
  void* symbol = nullptr;
  cudaDriverEntryPointQueryResult found;
  SOFTNIC_CUDA_TRY(cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &symbol, 12000,
                                                    cudaEnableDefault, &found));
  if (symbol == nullptr) return NVSHMEMX_ERROR_INTERNAL;
  const auto get_range = reinterpret_cast<decltype(&cuMemGetAddressRange)>(symbol);
  CUdeviceptr start = 0;
  size_t size = 0;
  if (get_range(&start, &size, reinterpret_cast<CUdeviceptr>(ptr)) != CUDA_SUCCESS)
    return NVSHMEMX_ERROR_INTERNAL;
  *base = start;
  *bytes = size;
  return 0;
}

/// The card's number of an allocation, which it maps on first use. With the mutex held.
int map_export(State& state, const Export& exported, uint32_t* map) {
  const auto next = static_cast<uint32_t>(state.maps.size());
  const auto [found, added] = state.maps.try_emplace({exported.pid, exported.base}, next);
  *map = found->second;
  if (!added) return 0;
  return tell(state, {.kind = Command::kMap, .ipc = exported.ipc});
}

int export_memory(MemHandle* out, void* ptr, size_t, Transport* self, bool local_only) {
  State& state = state_of(self);
  Export exported{};
  exported.magic = kMagic;
  exported.pid = getpid();
  cudaPointerAttributes attributes{};
  SOFTNIC_CUDA_TRY(cudaPointerGetAttributes(&attributes, ptr));
  if (attributes.type == cudaMemoryTypeDevice && !local_only) {
    SOFTNIC_CUDA_TRY(cudaIpcGetMemHandle(&exported.ipc, ptr));  // a cudaMalloc heap, no VMM
    if (const int status = allocation_of(ptr, &exported.base, &exported.bytes)) return status;
    const std::lock_guard lock(state.mutex);
    state.own[exported.base] = exported;
    state.device = attributes.device;
  }
  *out = {};
  std::memcpy(out, &exported, sizeof exported);
  return 0;
}

/// A place at a peer, for the card. With the mutex held.
int place_of(State& state, const Place& remote, CardPlace* place) {
  Export exported;
  std::memcpy(&exported, remote.handle, sizeof exported);
  if (exported.magic != kMagic || exported.base == 0) return complain("memory is not shared");
  if (const int status = map_export(state, exported, &place->map)) return status;
  place->offset = reinterpret_cast<uint64_t>(remote.ptr) - exported.base;
  return 0;
}

/// A place in this rank's heap, for the card. With the mutex held.
int place_of(State& state, const void* local, CardPlace* place) {
  const auto address = reinterpret_cast<uint64_t>(local);
  auto after = state.own.upper_bound(address);
  if (after == state.own.begin()) return complain("local memory is not in the heap");
  const Export& exported = (--after)->second;
  if (address - exported.base >= exported.bytes) return complain("local memory is not in the heap");
  place->offset = address - exported.base;
  return map_export(state, exported, &place->map);
}

/// The card maps all memory as soon as its handles are known.
int import_memory(Transport* self, int stride, MemHandle* handles, uint64_t, size_t) {
  State& state = state_of(self);
  const std::lock_guard lock(state.mutex);
  if (const int status = start_card(state, self->num_ranks)) return status;
  uint32_t map = 0;
  for (const auto& [base, exported] : state.own)
    if (const int status = map_export(state, exported, &map)) return status;
  for (int peer = 0; peer < self->num_ranks; ++peer) {
    if (peer == self->my_rank) continue;
    Export exported;
    std::memcpy(&exported, &handles[peer * stride + self->index], sizeof exported);
    if (exported.magic != kMagic || exported.base == 0) continue;
    if (const int status = map_export(state, exported, &map)) return status;
  }
  return tell_quiet(state, self->my_rank);
}

int release_memory(MemHandle*, Transport*) { return 0; }

// ------------------------------------------------------------------------------------- operations

int rma(Transport* self, int peer, RmaVerb verb, Place* remote, Place* local, RmaSize size, int) {
  State& state = state_of(self);
  const std::lock_guard lock(state.mutex);
  ++counts.rma;
  Command command{.kind = Command::kCopy, .peer = peer};
  command.bytes = size.count * size.elem_bytes;
  if (const int status = place_of(state, *remote, &command.to)) return status;
  switch (verb.op) {
    case NVSHMEMI_OP_P:  // the value dies when the caller returns
      command.kind = Command::kStore;
      if (command.bytes > sizeof command.operand) return NVSHMEMX_ERROR_INVALID_VALUE;
      std::memcpy(&command.operand, local->ptr, command.bytes);
      break;
    case NVSHMEMI_OP_PUT:
      if (const int status = place_of(state, local->ptr, &command.from)) return status;
      break;
    case NVSHMEMI_OP_G:
    case NVSHMEMI_OP_GET:
      command.from = command.to;
      if (const int status = place_of(state, local->ptr, &command.to)) return status;
      break;
    default:
      return NVSHMEMX_ERROR_INVALID_VALUE;
  }
  return tell(state, command);
}

int amo(Transport* self, int peer, void*, AmoVerb verb, AmoArgs* args, AmoSize size, int) {
  if (size.bytes != 4 && size.bytes != 8) return NVSHMEMX_ERROR_INVALID_VALUE;
  State& state = state_of(self);
  const std::lock_guard lock(state.mutex);
  ++counts.amo;
  Command command{.kind = Command::kAmo, .peer = peer};
  if (const int status = place_of(state, args->remote, &command.to)) return status;
  command.bytes = static_cast<uint64_t>(size.bytes);
  command.amo = verb.op;
  command.operand = args->operand;
  command.compare = args->compare;
  command.fetches = verb.op > NVSHMEMI_AMO_END_OF_NONFETCH;
  command.result_flag = args->result_flag;
  if (command.fetches)
    if (const int status = place_of(state, args->result, &command.from)) return status;
  return tell(state, command);
}

/// Makes later operations to `peer` wait for earlier ones, at the card; does not block.
int fence(Transport* self, int peer, int) {
  State& state = state_of(self);
  const std::lock_guard lock(state.mutex);
  ++counts.fence;
  return tell(state, {.kind = Command::kFence, .peer = peer});
}

/// Blocks until all operations to `peer` are complete.
int quiet(Transport* self, int peer, int) {
  State& state = state_of(self);
  const std::lock_guard lock(state.mutex);
  ++counts.quiet;
  return tell_quiet(state, peer);
}

int progress(Transport*) { return 0; }

// -------------------------------------------------------------------------------------- life cycle

int can_reach(int* caps, void*, Transport*) {
  *caps = kCpuWrite | kCpuRead | kCpuAtomics;
  return 0;
}

int connect(Transport* self, int*, int) {
  State& state = state_of(self);
  const std::lock_guard lock(state.mutex);
  return start_card(state, self->num_ranks);
}

int show_info(Transport*, int) { return 0; }

int finalize(Transport* self) {
  State* state = &state_of(self);
  if (state->card > 0) {
    kill(state->card, SIGKILL);
    waitpid(state->card, nullptr, 0);
    munmap(state->shared, sizeof(Shared));
  }
  delete state;
  std::free(self->caps);
  delete self;
  return 0;
}

int init(Transport** out, int version) {
  if (version != kInterfaceVersion) {
    std::fprintf(stderr, "softnic: plugin interface %d needed, not %d\n", kInterfaceVersion,
                 version);
    return NVSHMEMX_ERROR_INVALID_VALUE;
  }
  State* state = new State;
  auto* self = new Transport{};
  self->interface_version = kInterfaceVersion;
  self->state = state;
  self->attributes = kConnected;
  self->amos_complete_on_quiet = true;
  self->initialized = true;
  self->ops.can_reach = can_reach;
  self->ops.connect = connect;
  self->ops.export_memory = export_memory;
  self->ops.release_memory = release_memory;
  self->ops.finalize = finalize;
  self->ops.show_info = show_info;
  self->ops.progress = progress;
  self->ops.rma = rma;
  self->ops.amo = amo;
  self->ops.fence = fence;
  self->ops.quiet = quiet;
  self->ops.import_memory = import_memory;
  *out = self;
  return 0;
}

}  // namespace
}  // namespace softnic

/// What NVSHMEM looks up in the library. The second argument is its table of CUDA driver calls.
extern "C" __attribute__((visibility("default"))) int nvshmemt_init(softnic::Transport** out, void*,
                                                                    int version) {
  return softnic::init(out, version);
}

/// For tests: puts and gets, atomics, fences and quiets so far.
extern "C" __attribute__((visibility("default"))) void softnic_counts(uint64_t out[4]) {
  const auto& counts = softnic::counts;
  const uint64_t all[] = {counts.rma, counts.amo, counts.fence, counts.quiet};
  std::copy(std::begin(all), std::end(all), out);
}

// softnic: a remote transport that lets NVSHMEM 3.4.5 run its proxy path between the GPUs of one
// host without a NIC. A test tool; README.md says how to use it.
//
// Puts, gets and atomics arrive from NVSHMEM's proxy as they would for a real network. Here they
// become async copies and one-thread kernels on CUDA IPC mappings of the peers' heaps, queued on
// one stream ("lane") per peer. With SOFTNIC_CHAOS_US=n each peer has several lanes, and every
// operation goes to a random one after a random delay below n us: then only fence and quiet order.
#include <cuda.h>
#include <cuda_runtime.h>
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
#include <thread>
#include <utility>
#include <vector>

#include "softnic_abi.h"

#define SOFTNIC_CUDA_TRY(call)                                                                   \
  do {                                                                                           \
    const softnic::InCall in_call_(#call);                                                       \
    if (const cudaError_t error_ = (call); error_ != cudaSuccess) {                              \
      std::fprintf(stderr, "softnic:%d: %s: %s\n", __LINE__, #call, cudaGetErrorString(error_)); \
      return NVSHMEMX_ERROR_INTERNAL;                                                            \
    }                                                                                            \
  } while (false)

namespace softnic {
namespace {

constexpr uint64_t kMagic = 0x50f7;
constexpr int kChaosLanes = 4;
constexpr size_t kStageBytes = 1 << 20;
constexpr size_t kStageSlot = 16;
constexpr int kStuckS = 5;

// ---------------------------------------------------------------------------------- stuck in CUDA

std::atomic<const char*> current_call{nullptr};  // the newest that has not returned
std::atomic<uint64_t> num_calls{0};

/// A call of CUDA, by its text, from here to the end of the scope.
struct InCall {
  explicit InCall(const char* call) {
    ++num_calls;
    current_call = call;
  }
  ~InCall() { current_call = nullptr; }
};

/// Tells of a call that does not return, once; a handler of SIGUSR1 may tell more.
void watch() {
  for (uint64_t told = 0;;) {
    const uint64_t number = num_calls;
    std::this_thread::sleep_for(std::chrono::seconds(kStuckS));
    const char* call = current_call;
    if (call == nullptr || number != num_calls || number == told) continue;
    told = number;
    std::fprintf(stderr,
                 "softnic, process %d: %s has not returned for %d s. Is another thread inside of a "
                 "CUDA call that waits for a kernel, and the kernel for this card? README.md\n",
                 getpid(), call, kStuckS);
    struct sigaction handler {};
    if (sigaction(SIGUSR1, nullptr, &handler) == 0 && handler.sa_handler != SIG_DFL)
      kill(getpid(), SIGUSR1);
  }
}

/// Content of a MemHandle.
struct Export {
  uint64_t magic;
  uint64_t base;  // of the allocation, in its owner's address space; 0: not for peers
  cudaIpcMemHandle_t ipc;
  int pid;
};
static_assert(sizeof(Export) <= sizeof(MemHandle));

struct Lane {
  cudaStream_t stream;
  cudaEvent_t event;  // recorded by fence
};

struct State {
  std::mutex mutex;  // the proxy thread and the application's threads may call at once
  int chaos_us = 0;
  unsigned seed = 1;
  std::vector<std::vector<Lane>> lanes;              // [peer][lane]
  std::map<std::pair<int, uint64_t>, char*> mapped;  // (pid, base) to our mapping of it
  char* stage = nullptr;                             // pinned; holds inline values in flight
  size_t stage_used = 0;
};

/// Operations of all transports of this process: proof that calls went this way.
struct Counts {
  std::atomic<uint64_t> rma{0}, amo{0}, fence{0}, quiet{0};
};
Counts counts;

State& state_of(Transport* self) { return *static_cast<State*>(self->state); }

// ---------------------------------------------------------------------------------------- atomics

struct AmoJob {
  void* target;
  int bytes;  // 4 or 8
  nvshmemi_amo_t op;
  uint64_t operand;
  uint64_t compare;
  g_elem_t* result;  // null unless the operation fetches
  uint64_t result_flag;
};

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
__device__ T update(const AmoJob& job) {
  T* target = static_cast<T*>(job.target);
  T seen = *static_cast<volatile T*>(target);
  T old;
  do {
    old = seen;
    const T next = apply<T>(job.op, old, job.operand, job.compare);
    seen = atomicCAS_system(target, old, next);
  } while (seen != old);
  return old;
}

/// One atomic at a peer, <<<1, 1>>>. A fetched value is visible to the system before its flag.
__global__ void amo_kernel(const __grid_constant__ AmoJob job) {
  const uint64_t old = job.bytes == 8 ? update<unsigned long long>(job) : update<unsigned>(job);
  if (job.result == nullptr) return;
  job.result->data = old;
  __threadfence_system();
  job.result->flag = job.result_flag;
}

// ----------------------------------------------------------------------------------------- memory

int allocation_base(void* ptr, uint64_t* base) {
  void* symbol = nullptr;
  cudaDriverEntryPointQueryResult found;
  SOFTNIC_CUDA_TRY(cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &symbol, 12000,
                                                    cudaEnableDefault, &found));
  if (symbol == nullptr) return NVSHMEMX_ERROR_INTERNAL;
  const auto get_range = reinterpret_cast<decltype(&cuMemGetAddressRange)>(symbol);
  CUdeviceptr start = 0;
  size_t bytes = 0;
  if (get_range(&start, &bytes, reinterpret_cast<CUdeviceptr>(ptr)) != CUDA_SUCCESS) {
    return NVSHMEMX_ERROR_INTERNAL;
  }
  *base = start;
  return 0;
}

int export_memory(MemHandle* out, void* ptr, size_t, Transport*, bool local_only) {
  Export exported{};
  exported.magic = kMagic;
  exported.pid = getpid();
  cudaPointerAttributes attributes{};
  SOFTNIC_CUDA_TRY(cudaPointerGetAttributes(&attributes, ptr));
  if (attributes.type == cudaMemoryTypeDevice && !local_only) {
    SOFTNIC_CUDA_TRY(cudaIpcGetMemHandle(&exported.ipc, ptr));  // a cudaMalloc heap, no VMM
    if (const int status = allocation_base(ptr, &exported.base)) return status;
  }
  *out = {};
  std::memcpy(out, &exported, sizeof exported);
  return 0;
}

/// Finds `exported` in our address space; opens it on first use.
int map_export(State& state, const Export& exported, char** base) {
  if (exported.pid == getpid()) {
    *base = reinterpret_cast<char*>(exported.base);
    return 0;
  }
  char*& mapping = state.mapped[{exported.pid, exported.base}];
  if (mapping == nullptr) {
    void* opened = nullptr;
    SOFTNIC_CUDA_TRY(cudaIpcOpenMemHandle(&opened, exported.ipc, cudaIpcMemLazyEnablePeerAccess));
    mapping = static_cast<char*>(opened);
  }
  *base = mapping;
  return 0;
}

/// Translates a place at a peer to an address of ours.
int translate(State& state, const Place& remote, char** address) {
  Export exported;
  std::memcpy(&exported, remote.handle, sizeof exported);
  char* base = nullptr;
  if (const int status = map_export(state, exported, &base)) return status;
  *address = base + (reinterpret_cast<uint64_t>(remote.ptr) - exported.base);
  return 0;
}

/// Opens the peers' memory as soon as all handles are known, before any kernel can spin.
int import_memory(Transport* self, int stride, MemHandle* handles, uint64_t, size_t) {
  State& state = state_of(self);
  const std::lock_guard lock(state.mutex);
  for (int peer = 0; peer < self->num_ranks; ++peer) {
    if (peer == self->my_rank) continue;
    Export exported;
    std::memcpy(&exported, &handles[peer * stride + self->index], sizeof exported);
    if (exported.magic != kMagic || exported.base == 0) continue;
    char* base = nullptr;
    if (const int status = map_export(state, exported, &base)) return status;
  }
  return 0;
}

int release_memory(MemHandle*, Transport*) { return 0; }

// ------------------------------------------------------------------------------------- operations

void CUDART_CB delay(void* us) { usleep(static_cast<useconds_t>(reinterpret_cast<uintptr_t>(us))); }

/// Picks the stream for the next operation to `peer`; with chaos, delays it.
int next_stream(State& state, int peer, cudaStream_t* stream) {
  const std::vector<Lane>& lanes = state.lanes[peer];
  *stream = lanes[0].stream;
  if (state.chaos_us == 0) return 0;
  *stream = lanes[rand_r(&state.seed) % lanes.size()].stream;
  const auto us = static_cast<uintptr_t>(rand_r(&state.seed) % state.chaos_us);
  SOFTNIC_CUDA_TRY(cudaLaunchHostFunc(*stream, delay, reinterpret_cast<void*>(us)));
  return 0;
}

/// Copies an inline value, which dies when the caller returns, to pinned memory.
int stage_value(State& state, const void* value, size_t bytes, const void** staged) {
  if (bytes > kStageSlot) return NVSHMEMX_ERROR_INVALID_VALUE;
  if (state.stage_used + kStageSlot > kStageBytes) {  // full: nothing in flight may still use it
    for (const auto& lanes : state.lanes) {
      for (const Lane& lane : lanes) SOFTNIC_CUDA_TRY(cudaStreamSynchronize(lane.stream));
    }
    state.stage_used = 0;
  }
  char* slot = state.stage + state.stage_used;
  state.stage_used += kStageSlot;
  std::memcpy(slot, value, bytes);
  *staged = slot;
  return 0;
}

int rma(Transport* self, int peer, RmaVerb verb, Place* remote, Place* local, RmaSize size, int) {
  State& state = state_of(self);
  const std::lock_guard lock(state.mutex);
  ++counts.rma;
  char* address = nullptr;
  if (const int status = translate(state, *remote, &address)) return status;
  cudaStream_t stream = nullptr;
  if (const int status = next_stream(state, peer, &stream)) return status;

  const size_t bytes = size.count * size.elem_bytes;
  void* to = address;
  const void* from = local->ptr;
  switch (verb.op) {
    case NVSHMEMI_OP_P:
      if (const int status = stage_value(state, local->ptr, bytes, &from)) return status;
      break;
    case NVSHMEMI_OP_PUT:
      break;
    case NVSHMEMI_OP_G:
    case NVSHMEMI_OP_GET:
      to = local->ptr;
      from = address;
      break;
    default:
      return NVSHMEMX_ERROR_INVALID_VALUE;
  }
  SOFTNIC_CUDA_TRY(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream));
  return 0;
}

int amo(Transport* self, int peer, void*, AmoVerb verb, AmoArgs* args, AmoSize size, int) {
  if (size.bytes != 4 && size.bytes != 8) return NVSHMEMX_ERROR_INVALID_VALUE;
  State& state = state_of(self);
  const std::lock_guard lock(state.mutex);
  ++counts.amo;
  char* address = nullptr;
  if (const int status = translate(state, args->remote, &address)) return status;
  cudaStream_t stream = nullptr;
  if (const int status = next_stream(state, peer, &stream)) return status;

  const bool fetches = verb.op > NVSHMEMI_AMO_END_OF_NONFETCH;
  const AmoJob job{.target = address,
                   .bytes = size.bytes,
                   .op = verb.op,
                   .operand = args->operand,
                   .compare = args->compare,
                   .result = fetches ? static_cast<g_elem_t*>(args->result) : nullptr,
                   .result_flag = args->result_flag};
  {
    const InCall in_call("the launch of amo_kernel");
    amo_kernel<<<1, 1, 0, stream>>>(job);
  }
  SOFTNIC_CUDA_TRY(cudaGetLastError());
  return 0;
}

/// Makes later operations to `peer` wait for earlier ones, on the GPU; does not block.
int fence(Transport* self, int peer, int) {
  State& state = state_of(self);
  const std::lock_guard lock(state.mutex);
  ++counts.fence;
  const std::vector<Lane>& lanes = state.lanes[peer];
  if (lanes.size() < 2) return 0;
  for (const Lane& lane : lanes) SOFTNIC_CUDA_TRY(cudaEventRecord(lane.event, lane.stream));
  for (const Lane& lane : lanes) {
    for (const Lane& other : lanes) {
      if (&lane == &other) continue;
      SOFTNIC_CUDA_TRY(cudaStreamWaitEvent(lane.stream, other.event, 0));
    }
  }
  return 0;
}

/// Blocks until all operations to `peer` are complete.
int quiet(Transport* self, int peer, int) {
  State& state = state_of(self);
  const std::lock_guard lock(state.mutex);
  ++counts.quiet;
  for (const Lane& lane : state.lanes[peer]) {
    SOFTNIC_CUDA_TRY(cudaStreamSynchronize(lane.stream));
  }
  return 0;
}

int progress(Transport*) { return 0; }

// -------------------------------------------------------------------------------------- life cycle

int can_reach(int* caps, void*, Transport*) {
  *caps = kCpuWrite | kCpuRead | kCpuAtomics;
  return 0;
}

int connect(Transport* self, int*, int) {
  State& state = state_of(self);
  if (!state.lanes.empty()) return 0;
  state.lanes.resize(self->num_ranks);
  for (int peer = 0; peer < self->num_ranks; ++peer) {
    auto& lanes = state.lanes[peer];
    lanes.resize(state.chaos_us > 0 && peer != self->my_rank ? kChaosLanes : 1);
    for (Lane& lane : lanes) {
      SOFTNIC_CUDA_TRY(cudaStreamCreateWithFlags(&lane.stream, cudaStreamNonBlocking));
      SOFTNIC_CUDA_TRY(cudaEventCreateWithFlags(&lane.event, cudaEventDisableTiming));
    }
  }
  cudaFuncAttributes attributes;  // loads the kernel now: loading it under a spinning one may hang
  SOFTNIC_CUDA_TRY(cudaFuncGetAttributes(&attributes, amo_kernel));
  return 0;
}

int show_info(Transport*, int) { return 0; }

int finalize(Transport* self) {
  State* state = &state_of(self);
  for (const auto& lanes : state->lanes) {
    for (const Lane& lane : lanes) {
      cudaStreamDestroy(lane.stream);
      cudaEventDestroy(lane.event);
    }
  }
  for (const auto& mapping : state->mapped) cudaIpcCloseMemHandle(mapping.second);
  cudaFreeHost(state->stage);
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
  void* stage = nullptr;
  SOFTNIC_CUDA_TRY(cudaHostAlloc(&stage, kStageBytes, cudaHostAllocDefault));
  std::thread(watch).detach();
  State* state = new State;
  state->stage = static_cast<char*>(stage);
  if (const char* us = std::getenv("SOFTNIC_CHAOS_US")) {
    state->chaos_us = std::max(0, std::atoi(us));
    state->seed = static_cast<unsigned>(getpid());
  }
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

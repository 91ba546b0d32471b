// The simulator itself: kernels that are right must be right under every seed, and kernels with one
// mistake must be found out under most.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cuda_error.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "tests/sim/runtime.h"

namespace epcomm::sim {
namespace {

constexpr int kWords = 256;  // of a row, 1 KiB
constexpr int kSeeds = 30;

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    EPCOMM_CUDA_TRY(cudaMalloc(&data_, count * sizeof(T)));
    EPCOMM_CUDA_TRY(cudaMemset(data_, 0, count * sizeof(T)));
    EPCOMM_CUDA_TRY(cudaDeviceSynchronize());
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* get() const { return data_; }
  T* begin() const { return data_; }
  T* end() const { return data_ + count_; }

 private:
  T* data_ = nullptr;
  size_t count_;
};

// Seeds of which trial() is false or meets a fault.
int seeds_found(const std::function<bool()>& trial) {
  options().print_faults = false;
  const uint64_t before = options().seed;
  int found = 0;
  for (int i = 0; i < kSeeds; ++i) {
    ++options().seed;
    const bool right = trial();
    if (!take_faults().empty() || !right) ++found;
  }
  options().seed = before;
  return found;
}
void expect_clean(const std::function<bool()>& trial) { EXPECT_EQ(seeds_found(trial), 0); }
void expect_caught(const std::function<bool()>& trial) {
  EXPECT_GT(seeds_found(trial), kSeeds / 4);
}

// ---- one block ----

// Each thread takes what its neighbour in the next warp has put into shared memory.
template <bool kBarrier>
__global__ void pass_on_kernel(int* out) {
  EPCOMM_SHARED(int[128], words);
  words[thread_index()] = 100 + thread_index();
  if (kBarrier) __syncthreads();
  out[thread_index()] = words[(thread_index() + 32) % 128];
}
// The same between lanes.
template <bool kBarrier>
__global__ void pass_on_in_warp_kernel(int* out) {
  EPCOMM_SHARED(int[32], words);
  words[lane_index()] = 100 + lane_index();
  if (kBarrier) __syncwarp();
  out[thread_index()] = words[(lane_index() + 1) % 32];
}

bool pass_on(void (*kernel)(int*), int threads, int distance) {
  DeviceArray<int> out(static_cast<size_t>(threads));
  launch("pass_on", kernel, {1, threads}, nullptr, out.get());
  cudaDeviceSynchronize();
  for (int i = 0; i < threads; ++i)
    if (out.get()[i] != 100 + (i + distance) % threads) return false;
  return true;
}

TEST(Simulator, MissingBlockBarrier) {
  expect_clean([] { return pass_on(pass_on_kernel<true>, 128, 32); });
  expect_caught([] { return pass_on(pass_on_kernel<false>, 128, 32); });
}
TEST(Simulator, MissingWarpBarrier) {
  expect_clean([] { return pass_on(pass_on_in_warp_kernel<true>, 32, 1); });
  expect_caught([] { return pass_on(pass_on_in_warp_kernel<false>, 32, 1); });
}

__global__ void collectives_kernel(int* out) {
  const int lane = lane_index();
  int wrong = 0;
  wrong += __shfl_sync(kFullWarp, lane, 5) != 5;
  wrong += __shfl_up_sync(kFullWarp, lane, 3) != (lane < 3 ? lane : lane - 3);
  wrong += __shfl_xor_sync(kFullWarp, lane, 16) != (lane ^ 16);
  wrong += __ballot_sync(kFullWarp, lane % 2) != 0xaaaaaaaau;
  wrong += __match_any_sync(kFullWarp, lane / 16) != (lane < 16 ? 0xffffu : 0xffff0000u);
  wrong += __reduce_add_sync(kFullWarp, lane) != 496;
  wrong += __reduce_min_sync(kFullWarp, lane - 7) != -7;
  wrong += __reduce_max_sync(kFullWarp, static_cast<uint32_t>(lane)) != 31u;
  wrong += __any_sync(kFullWarp, lane == 40) != 0;
  // Half a warp by itself; the other half is elsewhere.
  if (lane < 16) wrong += __reduce_or_sync(0xffffu, 1u << lane) != 0xffffu;
  wrong += __syncthreads_or(thread_index() == 64) != 1;
  wrong += __syncthreads_count(lane == 0) != 3;
  out[thread_index()] = wrong;
}

TEST(Simulator, Collectives) {
  expect_clean([] {
    DeviceArray<int> out(96);
    launch("collectives", collectives_kernel, {1, 96}, nullptr, out.get());
    cudaDeviceSynchronize();
    for (int wrong : out)
      if (wrong != 0) return false;
    return true;
  });
}

// ---- bulk copies ----

enum Mistake { kNone, kNoLoadWait, kNoReadWait, kNoWrittenWait, kNoStoreBarrier };

struct Stage {
  alignas(16) uint32_t row[kWords];
  BulkBarrier barrier;
};

// Copies rows through one stage of shared memory; thread 0 issues all copies. Then it signals.
template <Mistake kMistake>
__global__ void through_shared_kernel(const uint32_t* from, uint32_t* to, int rows,
                                      uint64_t* signal) {
  EPCOMM_SHARED(Stage, stage);
  if (thread_index() != 0) return;
  barrier_init(&stage.barrier);
  fence_barrier_init();
  for (int i = 0; i < rows; ++i) {
    barrier_expect(&stage.barrier, sizeof stage.row);
    bulk_load(stage.row, from + i * kWords, sizeof stage.row, &stage.barrier);
    if (kMistake != kNoLoadWait) barrier_wait(&stage.barrier, static_cast<uint32_t>(i % 2));
    bulk_store(to + i * kWords, stage.row, sizeof stage.row);
    bulk_commit();
    if (kMistake != kNoReadWait) bulk_wait_read<0>();
    if (kMistake == kNoLoadWait) barrier_wait(&stage.barrier, static_cast<uint32_t>(i % 2));
  }
  if (kMistake != kNoWrittenWait) bulk_wait_written();
  store_release_system(signal, 1);
}

__global__ void take_kernel(uint64_t* waits, const uint64_t* signal, const uint32_t* from,
                            uint32_t* to, int count) {
  if (thread_index() == 0) {
    store_release_system(waits, 1);
    while (load_acquire_system(signal) == 0) {
    }
  }
  __syncthreads();
  for (int i = thread_index(); i < count; i += static_cast<int>(blockDim.x)) to[i] = from[i];
}

// Device 0 sends rows to device 1, which takes them when it sees the signal, for which it waits.
bool send_to_peer(const std::function<void(const uint32_t*, uint32_t*, uint64_t*)>& launch_send,
                  int rows) {
  const size_t words = static_cast<size_t>(rows) * kWords;
  DeviceArray<uint32_t> from(words), window(words), out(words);
  DeviceArray<uint64_t> waits(1), signal(1);
  for (size_t i = 0; i < words; ++i) from.get()[i] = static_cast<uint32_t>(i + 1);
  cudaSetDevice(1);
  launch("take", take_kernel, {1, 64}, nullptr, waits.get(), signal.get(), window.get(), out.get(),
         static_cast<int>(words));
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (std::atomic_ref(*waits.get()) == 0 && std::chrono::steady_clock::now() < deadline)
    std::this_thread::yield();
  cudaSetDevice(0);
  launch_send(from.get(), window.get(), signal.get());
  cudaDeviceSynchronize();
  cudaSetDevice(1);
  cudaDeviceSynchronize();
  cudaSetDevice(0);
  return std::equal(from.begin(), from.end(), out.begin());
}

constexpr int kRows = 6;
template <Mistake kMistake>
bool send_through_shared() {
  return send_to_peer(
      [](const uint32_t* from, uint32_t* to, uint64_t* signal) {
        launch("through_shared", through_shared_kernel<kMistake>, {1, 32}, nullptr, from, to, kRows,
               signal);
      },
      kRows);
}

TEST(Simulator, BulkCopies) { expect_clean(send_through_shared<kNone>); }
TEST(Simulator, MissingLoadWait) { expect_caught(send_through_shared<kNoLoadWait>); }
TEST(Simulator, MissingReadWait) { expect_caught(send_through_shared<kNoReadWait>); }
TEST(Simulator, MissingWrittenWait) { expect_caught(send_through_shared<kNoWrittenWait>); }

// ---- plain stores to a peer ----

template <bool kRelease>
__global__ void store_kernel(const uint32_t* from, uint32_t* to, uint64_t* signal) {
  store_streaming(to + 4 * thread_index(), load_streaming(from + 4 * thread_index()));
  __syncwarp();
  if (thread_index() != 0) return;
  for (int i = 32; i < kWords / 4; ++i) store_streaming(to + 4 * i, load_streaming(from + 4 * i));
  if (kRelease)
    store_release_system(signal, 1);
  else
    *static_cast<volatile uint64_t*>(signal) = 1;
}

template <bool kRelease>
bool send_by_stores() {
  return send_to_peer(
      [](const uint32_t* from, uint32_t* to, uint64_t* signal) {
        launch("store", store_kernel<kRelease>, {1, 32}, nullptr, from, to, signal);
      },
      1);
}

TEST(Simulator, Release) { expect_clean(send_by_stores<true>); }
TEST(Simulator, MissingRelease) { expect_caught(send_by_stores<false>); }

// ---- several blocks ----

// The last block to arrive adds up what all have written.
template <bool kFence>
__global__ void last_block_kernel(uint32_t* part, uint32_t* arrived, uint32_t* sum) {
  alignas(16) const uint4 mine = make_uint4(1, 2, 3, blockIdx.x);
  store_streaming(part + 4 * blockIdx.x, mine);
  if (kFence) __threadfence();
  if (atomicAdd(arrived, 1u) + 1 != gridDim.x) return;
  for (unsigned i = 0; i < 4 * gridDim.x; ++i) *sum += part[i];
}

bool last_block(void (*kernel)(uint32_t*, uint32_t*, uint32_t*)) {
  constexpr unsigned kBlocks = 6;
  DeviceArray<uint32_t> part(4 * kBlocks), arrived(1), sum(1);
  launch("last_block", kernel, {kBlocks, 1}, nullptr, part.get(), arrived.get(), sum.get());
  cudaDeviceSynchronize();
  return *sum.get() == kBlocks * 6 + kBlocks * (kBlocks - 1) / 2;
}

TEST(Simulator, LastBlock) {
  expect_clean([] { return last_block(last_block_kernel<true>); });
}

// Blocks that wait for each other must all be resident.
__global__ void meet_kernel(uint32_t* arrived) {
  atomicAdd(arrived, 1u);
  while (atomicAdd(arrived, 0u) < gridDim.x * blockDim.x) __nanosleep(100);
}

std::string fault_of(const std::function<void()>& launch) {
  options().print_faults = false;
  const double before = options().limit_s;
  options().limit_s = 0.5;
  launch();
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorLaunchFailure);
  const std::vector<std::string> faults = take_faults();
  options().limit_s = before;
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  return faults.empty() ? "" : faults.front();
}
#define EXPECT_FAULT(text, launch)                                 \
  if (const std::string fault = fault_of([&] { launch; }); true) { \
    EXPECT_NE(fault.find(text), std::string::npos) << fault;       \
  }

TEST(Simulator, MoreBlocksThanFit) {
  DeviceArray<uint32_t> arrived(1);
  const int fit = 2 * options().num_sms;  // of 1024 threads
  launch("meet", meet_kernel, {fit, 1024}, nullptr, arrived.get());
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  *arrived.get() = 0;
  EXPECT_FAULT("wait in __nanosleep at",
               launch("meet", meet_kernel, {fit + 1, 1024}, nullptr, arrived.get()));
}

// ---- what is reported ----

__global__ void divergent_kernel() {
  if (thread_index() != 40)
    __syncthreads();
  else
    __syncwarp();
}
__global__ void different_collectives_kernel() {
  if (lane_index() == 0)
    __syncwarp();
  else
    __ballot_sync(kFullWarp, 1);
}
template <int kOffset, uint32_t kBytes>
__global__ void bad_copy_kernel(const char* from) {
  EPCOMM_SHARED(Stage, stage);
  if (thread_index() != 0) return;
  if (kBytes != 1) barrier_init(&stage.barrier);
  barrier_expect(&stage.barrier, kBytes);
  bulk_load(stage.row, from + kOffset, kBytes, &stage.barrier);
  barrier_wait(&stage.barrier, 0);
}
__global__ void unread_store_kernel(uint32_t* to) {
  EPCOMM_SHARED(Stage, stage);
  for (int i = 0; i < 20; ++i) {
    bulk_store(to, stage.row, sizeof stage.row);
    bulk_commit();
  }
}
__global__ void deep_kernel(int* out) {
  volatile char stack[Fiber::kStackBytes];
  for (volatile char& c : stack) c = 1;
  out[0] = stack[17];
}

TEST(Simulator, Reports) {
  DeviceArray<uint32_t> words(2 * kWords);
  const char* bytes = reinterpret_cast<const char*>(words.get());
  EXPECT_FAULT("deadlock", launch("divergent", divergent_kernel, {1, 64}, nullptr));
  EXPECT_FAULT("different collectives",
               launch("different", different_collectives_kernel, {1, 32}, nullptr));
  EXPECT_FAULT("multiple of 16", launch("bad", bad_copy_kernel<4, 16>, {1, 1}, nullptr, bytes));
  EXPECT_FAULT("multiple of 16", launch("bad", bad_copy_kernel<0, 24>, {1, 1}, nullptr, bytes));
  EXPECT_FAULT("outside of the block's shared memory",
               launch("bad", bad_copy_kernel<0, sizeof(Stage) + 1024>, {1, 1}, nullptr, bytes));
  EXPECT_FAULT("not initialised", launch("bad", bad_copy_kernel<0, 1>, {1, 1}, nullptr, bytes));
  EXPECT_FAULT("bulk_wait_read is missing",
               launch("unread", unread_store_kernel, {1, 1}, nullptr, words.get()));
  EXPECT_FAULT("stack",
               launch("deep", deep_kernel, {1, 1}, nullptr, reinterpret_cast<int*>(words.get())));
}

TEST(Simulator, SignalThatNeverComes) {
  DeviceArray<uint64_t> waits(1), signal(1);
  DeviceArray<uint32_t> row(kWords);
  const std::string fault = fault_of([&] {
    launch("take", take_kernel, {1, 64}, nullptr, waits.get(), signal.get(), row.get(), row.get(),
           kWords);
  });
  EXPECT_NE(fault.find("block 0: 1 threads from 0 on wait in load_acquire_system at " __FILE__),
            std::string::npos)
      << fault;
  EXPECT_NE(fault.find("block 0: 63 threads from 1 on wait in __syncthreads"), std::string::npos)
      << fault;
}

// ---- streams ----

__global__ void wait_kernel(const uint64_t* signal) {
  while (load_acquire_system(signal) == 0) {
  }
}
__global__ void add_kernel(uint32_t* word, uint32_t value) { *word = 3 * *word + value; }

TEST(Simulator, StreamsAreAsynchronous) {
  DeviceArray<uint64_t> signal(1);
  DeviceArray<uint32_t> word(1);
  cudaStream_t first, second;
  cudaEvent_t event, end;
  ASSERT_EQ(cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaEventCreate(&event), cudaSuccess);
  ASSERT_EQ(cudaEventCreate(&end), cudaSuccess);
  launch("wait", wait_kernel, {1, 1}, first, signal.get());
  launch("add", add_kernel, {1, 1}, first, word.get(), 1);
  cudaEventRecord(event, first);
  cudaStreamWaitEvent(second, event);
  launch("add", add_kernel, {1, 1}, second, word.get(), 2);
  cudaEventRecord(end, second);
  EXPECT_EQ(cudaEventQuery(end), cudaErrorNotReady);
  EXPECT_EQ(cudaStreamQuery(first), cudaErrorNotReady);
  EXPECT_EQ(*word.get(), 0u);
  __atomic_store_n(signal.get(), 1, __ATOMIC_RELEASE);
  EXPECT_EQ(cudaEventSynchronize(end), cudaSuccess);
  EXPECT_EQ(*word.get(), 5u);
  cudaEventDestroy(event);
  cudaEventDestroy(end);
  cudaStreamDestroy(first);
  cudaStreamDestroy(second);
}

TEST(Simulator, GraphsReplay) {
  DeviceArray<uint32_t> word(1);
  cudaStream_t stream, side;
  cudaEvent_t event;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaEventCreate(&event), cudaSuccess);
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  launch("add", add_kernel, {1, 1}, stream, word.get(), 1);
  cudaEventRecord(event, stream);
  cudaStreamWaitEvent(side, event);
  launch("add", add_kernel, {1, 1}, side, word.get(), 2);
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  cudaDeviceSynchronize();
  EXPECT_EQ(*word.get(), 0u);
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
  cudaGraphLaunch(exec, stream);
  cudaGraphLaunch(exec, stream);
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(*word.get(), (5u * 3 + 1) * 3 + 2);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaEventDestroy(event);
  cudaStreamDestroy(stream);
  cudaStreamDestroy(side);
}

}  // namespace
}  // namespace epcomm::sim

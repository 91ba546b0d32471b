// The functions of cuda_runtime_api.h on simulated devices.
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "tests/sim/devices.h"
#include "tests/sim/runtime.h"

using namespace epcomm::sim;

// ---- errors and devices ----

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorStreamCaptureInvalidated:
      return "cudaErrorStreamCaptureInvalidated";
  }
  return "unknown error";
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error != cudaErrorLaunchFailure) return cudaGetErrorName(error);
  thread_local std::string text;
  std::lock_guard lock(device(current_device).mutex);
  text = device(current_device).fault;
  return text.c_str();
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = options().num_devices;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* i) {
  *i = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int i) {
  if (i < 0 || i >= options().num_devices) return remember(cudaErrorInvalidDevice);
  current_device = i;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = options().num_sms;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(kMaxShared);
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

// Processes have devices of their own, but where EPCOMM_SIM_GPU, a number, names them: then it is
// one device.
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int i) {
  const char* named = std::getenv("EPCOMM_SIM_GPU");
  const int id[] = {named == nullptr ? static_cast<int>(::getpid()) : std::atoi(named), i};
  static_assert(sizeof id <= sizeof properties->uuid);
  *properties = {};
  std::memcpy(&properties->uuid, id, sizeof id);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return remember(synchronize_device(current_device)); }

// ---- memory ----

cudaError_t cudaMalloc(void** p, size_t bytes) {
  constexpr size_t kAlignment = 512, kPoisoned = 16 << 20;
  constexpr int kPoison = 0xcd;
  const size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  Device& d = device(current_device);
  {
    std::lock_guard lock(d.mutex);
    if (d.used + size > options().memory_bytes) return remember(cudaErrorMemoryAllocation);
    d.used += size;
  }
  *p = std::aligned_alloc(kAlignment, size);
  // Filling large memory would take longer than most tests.
  std::memset(*p, kPoison, std::min(size, kPoisoned));
  std::lock_guard lock(world().mutex);
  world().memory[*p] = {current_device, size};
  return cudaSuccess;
}

cudaError_t cudaFree(void* p) {
  if (p == nullptr) return cudaSuccess;
  std::pair<int, size_t> what;
  {
    std::lock_guard lock(world().mutex);
    const auto found = world().memory.find(p);
    if (found == world().memory.end()) return remember(cudaErrorInvalidValue);
    what = found->second;
    world().memory.erase(found);
  }
  const cudaError_t error = synchronize_device(what.first);
  std::lock_guard lock(device(what.first).mutex);
  device(what.first).used -= what.second;
  std::free(p);
  return remember(error);
}

cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  *p = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* p) {
  const cudaError_t error = synchronize_device(current_device);
  std::free(p);
  return remember(error);
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  std::lock_guard lock(device(current_device).mutex);
  *total = options().memory_bytes;
  *free = *total - device(current_device).used;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  ++world().copies_issued;
  resolve(stream).enqueue([=](FiberPool&) { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  return cudaStreamSynchronize(nullptr);
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  ++world().copies_issued;
  resolve(stream).enqueue([=](FiberPool&) { std::memset(p, value, bytes); });
  return cudaSuccess;
}

// Of device memory it does not wait, as the reference says.
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  return cudaMemsetAsync(p, value, bytes, nullptr);
}

// ---- streams ----

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  auto made = make_stream(current_device);
  *stream = made.get();
  std::lock_guard lock(world().mutex);
  world().streams[*stream] = std::move(made);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreate(stream);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return cudaStreamCreate(stream);
}

// What is in the stream is still done.
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  std::lock_guard lock(world().mutex);
  const auto found = world().streams.find(stream);
  if (found == world().streams.end()) return remember(cudaErrorInvalidValue);
  found->second->close();
  world().streams.erase(found);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Stream& s = resolve(stream);
  s.synchronize();
  return remember(failed(s.device()) ? cudaErrorLaunchFailure : cudaSuccess);
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  Stream& s = resolve(stream);
  if (failed(s.device())) return remember(cudaErrorLaunchFailure);
  return s.idle() ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  std::shared_ptr<Recording> recording = event->recording();
  if (!recording) return cudaSuccess;
  Stream& s = resolve(stream);
  if (recording->graph != nullptr) {  // the stream joins the capture
    s.graph = recording->graph;
    return cudaSuccess;
  }
  s.enqueue([recording, i = s.device()](FiberPool&) { wait_for(i, *recording); });
  return cudaSuccess;
}

// ---- events ----

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new Event;
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return cudaEventCreate(event);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  Stream& s = resolve(stream);
  auto recording = std::make_shared<Recording>();
  recording->device = s.device();
  recording->graph = s.graph;
  event->set(recording);
  if (s.graph != nullptr) return cudaSuccess;  // the order of the graph holds anyway
  s.enqueue([recording](FiberPool&) {
    std::lock_guard lock(recording->mutex);
    recording->complete = true;
    recording->time = std::chrono::steady_clock::now();
    recording->changed.notify_all();
  });
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  const auto recording = event->recording();
  if (!recording) return cudaSuccess;
  if (failed(recording->device)) return remember(cudaErrorLaunchFailure);
  std::lock_guard lock(recording->mutex);
  return recording->complete ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const auto recording = event->recording();
  if (!recording) return cudaSuccess;
  wait_for(recording->device, *recording);
  return remember(failed(recording->device) ? cudaErrorLaunchFailure : cudaSuccess);
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  const auto first = start->recording(), last = end->recording();
  if (!first || !last) return remember(cudaErrorInvalidValue);
  if (cudaEventQuery(start) != cudaSuccess || cudaEventQuery(end) != cudaSuccess)
    return cudaErrorNotReady;
  *ms = std::chrono::duration<float, std::milli>(last->time - first->time).count();
  return cudaSuccess;
}

// ---- graphs ----

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream == nullptr || stream->graph != nullptr) return remember(cudaErrorInvalidValue);
  stream->graph = new Graph;
  return cudaSuccess;
}

// What a thread calls never ends a capture here.
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  *mode = cudaStreamCaptureModeGlobal;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = resolve(stream).graph == nullptr ? cudaStreamCaptureStatusNone
                                             : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = stream->graph;
  if (*graph == nullptr) return remember(cudaErrorStreamCaptureInvalidated);
  std::lock_guard lock(world().mutex);
  for (auto& [other, owner] : world().streams)
    if (other->graph == *graph) other->graph = nullptr;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new Graph(*graph);
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  for (const Work& work : exec->work) resolve(stream).enqueue(work);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

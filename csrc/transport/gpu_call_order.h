// Order between the calls of one Buffer on different streams.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <thread>

#include "core/clock.h"
#include "transport/gpu_memory.h"

namespace epcomm {

/// Calls share the transport's memory, so a call on another stream than the last starts after it.
/// Inside a graph capture the order is the graph's, and events from outside do not count.
class GpuCallOrder {
 public:
  void begin(cudaStream_t stream) {
    EPCOMM_CUDA_TRY(cudaStreamIsCapturing(stream, &capturing_));
    if (capturing_ == cudaStreamCaptureStatusNone && last_stream_ != stream)
      EPCOMM_CUDA_TRY(cudaStreamWaitEvent(stream, last_call_.get(), 0));
  }
  void end(cudaStream_t stream) {
    if (capturing_ != cudaStreamCaptureStatusNone) return;
    EPCOMM_CUDA_TRY(cudaEventRecord(last_call_.get(), stream));
    last_stream_ = stream;
  }
  /// Blocks until the last call is over, at most timeout_s.
  void drain(double timeout_s) const {
    const Deadline deadline(timeout_s);
    while (cudaEventQuery(last_call_.get()) == cudaErrorNotReady && !deadline.passed())
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }

 private:
  cudaStreamCaptureStatus capturing_ = cudaStreamCaptureStatusNone;
  cudaStream_t last_stream_ = nullptr;  // that last_call_ was recorded on
  Event last_call_;
};

}  // namespace epcomm

// Device memory for tests of kernels: poisoned, guarded against writes past an end, and compared
// with what is expected.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "epcomm/error.h"
#include "kernels/cuda_error.h"
#include "kernels/token_layout.h"
#include "tests/cpp/kernels_reference.h"

namespace epcomm::test {

inline int num_passed = 0, num_failed = 0;

inline std::string describe(const Case& c) {
  char text[256];
  std::snprintf(text, sizeof text,
                "ranks %d experts %d topk %d tokens %d layout %d index %d dtype %d chunks %d "
                "alignment %d row %d scale %d combine %d sms %d flags %d%d%d%d%d%d%d seed %u",
                c.num_ranks, c.num_experts, c.topk, c.tokens, static_cast<int>(c.layout),
                static_cast<int>(c.index_type), static_cast<int>(c.dtype), c.chunks, c.alignment,
                c.row_bytes, c.scale_bytes, c.combine_bytes, c.num_sms, c.table, c.weighted, c.bias,
                c.exact, c.bad_ids, c.in_place, c.graph, c.seed);
  return text;
}

inline void expect(bool ok, const std::string& what, const Case& c) {
  ++(ok ? num_passed : num_failed);
  if (!ok && num_failed <= 20) std::printf("FAILED %s: %s\n", what.c_str(), describe(c).c_str());
}

// Device memory of one case, handed out front to back, every array followed by a guard.
class Device {
 public:
  static constexpr size_t kGuardBytes = 256;
  static constexpr int kGuard = 0xc3;

  Device() {
    size_t free = 0, total = 0;
    EPCOMM_CUDA_TRY(cudaMemGetInfo(&free, &total));
    bytes_ = std::min(free / 5 * 4, size_t{14} << 30);
    EPCOMM_CUDA_TRY(cudaMalloc(&base_, bytes_));
    EPCOMM_CUDA_TRY(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
  ~Device() {
    cudaStreamDestroy(stream);
    cudaFree(base_);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  size_t bytes() const { return bytes_; }
  void reset() { used_ = 0; }
  char* take(size_t bytes, int poison) {
    const size_t need = align_up(bytes, 256) + kGuardBytes;
    if (used_ + need > bytes_) throw Error("the test needs more memory than this GPU has");
    char* p = static_cast<char*>(base_) + used_;
    used_ += need;
    EPCOMM_CUDA_TRY(cudaMemsetAsync(p, poison, bytes, stream));
    EPCOMM_CUDA_TRY(cudaMemsetAsync(p + bytes, kGuard, kGuardBytes, stream));
    return p;
  }

  cudaStream_t stream = nullptr;

 private:
  void* base_ = nullptr;
  size_t bytes_ = 0, used_ = 0;
};

template <class T>
struct Array {
  T* data = nullptr;
  size_t count = 0;
  bool guarded = false;
};

template <class T>
Array<T> make_array(Device& device, size_t count, int poison) {
  return {reinterpret_cast<T*>(device.take(count * sizeof(T), poison)), count, true};
}

template <class T>
Array<T> upload(Device& device, const std::vector<T>& host) {
  Array<T> a = make_array<T>(device, host.size(), kPoisonWord);
  EPCOMM_CUDA_TRY(cudaMemcpyAsync(a.data, host.data(), host.size() * sizeof(T),
                                  cudaMemcpyHostToDevice, device.stream));
  EPCOMM_CUDA_TRY(cudaStreamSynchronize(device.stream));
  return a;
}

template <class T>
void expect_equal(Device& device, const std::vector<T>& want, const Array<T>& got,
                  const std::string& what, const Case& c) {
  const size_t bytes = got.count * sizeof(T);
  std::vector<unsigned char> have(bytes + (got.guarded ? Device::kGuardBytes : 0));
  EPCOMM_CUDA_TRY(
      cudaMemcpyAsync(have.data(), got.data, have.size(), cudaMemcpyDeviceToHost, device.stream));
  EPCOMM_CUDA_TRY(cudaStreamSynchronize(device.stream));
  bool ok = want.size() == got.count;
  std::string where = ok ? "" : " (size)";
  for (size_t i = 0; ok && i < want.size(); ++i)
    if (std::memcmp(&want[i], have.data() + i * sizeof(T), sizeof(T)) != 0) {
      T value;
      std::memcpy(&value, have.data() + i * sizeof(T), sizeof(T));
      where = " at " + std::to_string(i) + " of " + std::to_string(got.count) + ": expected " +
              std::to_string(want[i]) + ", got " + std::to_string(value);
      ok = false;
    }
  for (size_t i = bytes; ok && i < have.size(); ++i)
    if (have[i] != Device::kGuard) {
      where = " wrote past its end";
      ok = false;
    }
  expect(ok, what + where, c);
}

}  // namespace epcomm::test

// Runs the routing and row kernels for all ranks of a group on one GPU and compares every byte with
// kernels_reference.h; then times them. Prints `N passed, N failed` last; exit status 1 if any
// failed. An argument is the largest batch to try; with one, nothing is timed.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include "epcomm/error.h"
#include "kernels/cuda_error.h"
#include "kernels/kernels.h"
#include "tests/cpp/gpu_arrays.h"
#include "tests/cpp/kernels_cases.h"
#include "tests/cpp/kernels_reference.h"
#include "tests/cpp/kernels_trial.h"

namespace epcomm::test {
namespace {

// A launcher must refuse what its kernel cannot do.
template <class Launch>
void expect_refusal(const char* what, Launch launch) {
  bool refused = false;
  try {
    launch();
  } catch (const Error&) {
    refused = true;
  } catch (const InvalidArgument&) {
    refused = true;
  }
  expect(refused, what, Case{});
}

void check_refusals(Device& device) {
  RouteKernelArgs route = {};
  route.dims = {2, 1000000, 500000, 8};
  route.chunks = 1;
  expect_refusal("too many experts", [&] { launch_count(route, device.stream); });
  route.dims = {kMaxPackRanks + 1, 100, 2, 8};
  expect_refusal("too many ranks", [&] { launch_assign(route, device.stream); });
  device.reset();
  SumArgs sum = {};
  sum.dims = {1, 1, 1, 1};
  sum.dtype = Dtype::kUint8;
  sum.chunks = 1;
  expect_refusal("sum of bytes", [&] { launch_sum(sum, 0, device.stream); });
  PackArgs pack = {};
  pack.chunks = 1;
  pack.x = device.take(64, 0) + 2;
  expect_refusal("rows at an odd address", [&] { launch_pack(pack, 0, device.stream); });
}

// Microseconds of one launch among several back to back, in a graph so that the host is not what is
// measured; the median.
template <class Launch>
double microseconds(Device& device, Launch launch) {
  constexpr int kLaunches = 10, kSamples = 7;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  EPCOMM_CUDA_TRY(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < kLaunches; ++i) launch();
  EPCOMM_CUDA_TRY(cudaStreamEndCapture(device.stream, &graph));
  EPCOMM_CUDA_TRY(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t start, stop;
  EPCOMM_CUDA_TRY(cudaEventCreate(&start));
  EPCOMM_CUDA_TRY(cudaEventCreate(&stop));
  std::vector<float> samples;
  for (int i = 0; i < kSamples; ++i) {
    EPCOMM_CUDA_TRY(cudaEventRecord(start, device.stream));
    EPCOMM_CUDA_TRY(cudaGraphLaunch(exec, device.stream));
    EPCOMM_CUDA_TRY(cudaEventRecord(stop, device.stream));
    EPCOMM_CUDA_TRY(cudaEventSynchronize(stop));
    float ms = 0;
    EPCOMM_CUDA_TRY(cudaEventElapsedTime(&ms, start, stop));
    samples.push_back(ms / kLaunches);
  }
  EPCOMM_CUDA_TRY(cudaEventDestroy(start));
  EPCOMM_CUDA_TRY(cudaEventDestroy(stop));
  EPCOMM_CUDA_TRY(cudaGraphExecDestroy(exec));
  EPCOMM_CUDA_TRY(cudaGraphDestroy(graph));
  std::sort(samples.begin(), samples.end());
  return 1e3 * samples[samples.size() / 2];
}

// Times the kernels of rank 0 in a group of 4: top-8 of 256 experts, hidden 7168, bf16.
class Timing {
 public:
  Timing(Device& device_, int tokens, Layout layout)
      : device(device_), world(make(tokens, layout)) {
    // The world knows tiny rows, only its routing matters; the memory is for the real ones.
    world.c.row_bytes = world.c.combine_bytes = kRowBytes;
    device.reset();
    copy_bytes = size_t(tokens) * 10 * kRowBytes;
    copy_from = device.take(copy_bytes, 0);
    copy_to = device.take(copy_bytes, 0);
  }

  void run() {
    Trial trial(device, world, false);
    trial.route();
    trial.make_outputs();
    trial.pack();
    trial.place();
    trial.combine();
    EPCOMM_CUDA_TRY(cudaStreamSynchronize(device.stream));
    const Case& c = world.c;
    std::printf("%d tokens, layout %s\n", c.tokens,
                c.layout == Layout::kToken ? "token" : "expert");
    const RouteKernelArgs route = trial.route_args(0);
    line("count", 0, [&] { launch_count(route, device.stream); });
    line("assign", 0, [&] { launch_assign(route, device.stream); });

    int64_t sent = 0, received = static_cast<int64_t>(world.recv[0].size()), rows = 0;
    for (int r = 0; r < c.num_ranks; ++r) sent += world.count(0, r);
    for (const Token& t : world.recv[0])
      rows += static_cast<int64_t>(world.distinct_rows(0, t).size());
    const int64_t record = static_cast<int64_t>(MetaLayout(c.topk).record_bytes);
    for (int num_sms : {0, 24, 16}) {
      const std::string at = num_sms == 0 ? "" : ", " + std::to_string(num_sms) + " SMs";
      line("pack" + at, (c.tokens + sent) * kRowBytes + sent * record,
           [&] { launch_pack(trial.pack_args(0, 0), num_sms, device.stream); });
      line("place" + at, (received + rows) * kRowBytes + 2 * received * record,
           [&] { launch_place(trial.place_args(0), num_sms, device.stream); });
      line("partials" + at, (rows + received) * kRowBytes,
           [&] { launch_partials(trial.partial_args(0, 0), num_sms, device.stream); });
      line("sum" + at, (sent + c.tokens) * kRowBytes,
           [&] { launch_sum(trial.sum_args(0, 0), num_sms, device.stream); });
    }
  }

 private:
  static constexpr int64_t kRowBytes = 14336;

  static World make(int tokens, Layout layout) {
    Case c{4, 256, 8, tokens};
    c.layout = layout;
    c.weighted = false;
    c.exact = c.plain = true;
    World w(c);
    return w;
  }
  // moved: bytes read + written, compared with a copy that reads and writes as many; 0 = time only.
  template <class Launch>
  void line(const std::string& what, int64_t moved, Launch launch) {
    const double own = microseconds(device, launch);
    std::printf("  %-18s %8.1f us", what.c_str(), own);
    if (moved != 0) {
      const size_t bytes = std::min(static_cast<size_t>(moved) / 2, copy_bytes);
      const double copy = microseconds(device, [&] {
        EPCOMM_CUDA_TRY(
            cudaMemcpyAsync(copy_to, copy_from, bytes, cudaMemcpyDeviceToDevice, device.stream));
      });
      std::printf("  %6.0f GB/s  %3.0f %% of a copy (%.1f us)",
                  static_cast<double>(moved) / own * 1e-3, 100 * copy / own, copy);
    }
    std::printf("\n");
  }

  Device& device;
  World world;
  size_t copy_bytes;
  char *copy_from, *copy_to;
};

int run_all(int largest, bool timed) {
  Device device;
  for (const Case& c : make_cases(largest)) run_case(device, c);
  check_refusals(device);
  if (timed && device.bytes() < size_t{10} << 30) {
    std::printf("not timed: that takes 10 GiB of free GPU memory\n");
  } else if (timed) {
    for (int tokens : {4096, 128})
      for (Layout layout : {Layout::kToken, Layout::kExpert}) Timing(device, tokens, layout).run();
  }
  std::printf("%d passed, %d failed\n", num_passed, num_failed);
  return num_failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace epcomm::test

int main(int argc, char** argv) {
  try {
    return epcomm::test::run_all(argc > 1 ? std::atoi(argv[1]) : 4096, argc == 1);
  } catch (const std::exception& e) {
    std::printf("FAILED: %s\n%d passed, %d failed\n", e.what(), epcomm::test::num_passed,
                epcomm::test::num_failed + 1);
    return 1;
  }
}

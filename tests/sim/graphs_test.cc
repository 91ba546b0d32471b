// Calls without host waits in CUDA graphs, on the transport that the program tests.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "epcomm/buffer.h"
#include "epcomm/error.h"
#include "kernels/cuda_error.h"
#include "tests/cpp/rank_calls.h"
#include "tests/cpp/ranks.h"

namespace epcomm {
namespace {

using testing::Batch;
using testing::run_threads;

constexpr double kTimeout = 60;
constexpr int kHidden = 4;

// Calls without host waits, captured once: every replay follows the ids that are there then. All
// rows come back once from each rank that a token goes to.
class GraphedCalls {
 public:
  GraphedCalls(Buffer& buffer, Layout layout, Batch& batch)
      : y(batch.x.size()), batch_(batch), route_(make_route(buffer, layout)) {
    EPCOMM_CUDA_TRY(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    EPCOMM_CUDA_TRY(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    call(buffer);
    cudaGraph_t graph;
    EPCOMM_CUDA_TRY(cudaStreamEndCapture(stream_, &graph));
    EPCOMM_CUDA_TRY(cudaGraphInstantiate(&exec_, graph, 0));
    EPCOMM_CUDA_TRY(cudaGraphDestroy(graph));
  }
  ~GraphedCalls() {
    cudaStreamSynchronize(stream_);
    cudaGraphExecDestroy(exec_);
    cudaStreamDestroy(stream_);
  }
  void replay() {
    EPCOMM_CUDA_TRY(cudaGraphLaunch(exec_, stream_));
    EPCOMM_CUDA_TRY(cudaStreamSynchronize(stream_));
  }

  std::vector<float> y;  // [tokens, hidden]

 private:
  RouteArgs make_route(Buffer& buffer, Layout layout) {
    RouteArgs args;
    args.topk_idx = batch_.topk_idx.data();
    args.index_type = IndexType::kInt32;
    args.num_tokens = batch_.tokens;
    args.topk = batch_.topk;
    args.layout = layout;
    args.host_sync = false;
    send_block_.resize(buffer.send_block(batch_.tokens, batch_.topk).bytes / sizeof(int32_t));
    args.plan = buffer.view_send_block(send_block_.data(), batch_.tokens, batch_.topk);
    return args;
  }
  void call(Buffer& buffer) {
    const int tokens = static_cast<int>(buffer.max_recv_tokens());
    const int rows = static_cast<int>(buffer.max_recv_rows(route_.layout, batch_.topk, 1));
    const int row_bytes = batch_.hidden * static_cast<int>(sizeof(float));
    route_.stream = stream_;
    Plan plan = buffer.route(route_);
    meta_ = testing::memory_for(buffer, buffer.recv_block_bytes(plan, tokens));
    rows_ = testing::memory_for(buffer, static_cast<size_t>(rows) * static_cast<size_t>(row_bytes));
    if (meta_.data == nullptr || rows_.data == nullptr) throw Error("the test's window is full");
    plan = plan.with_recv_block(meta_.data);
    DispatchArgs dispatch;
    dispatch.x = batch_.x.data();
    dispatch.dtype = Dtype::kFloat32;
    dispatch.row_bytes = row_bytes;
    dispatch.recv_x = rows_.data;
    dispatch.recv_capacity = tokens;
    dispatch.row_capacity = rows;
    dispatch.stream = stream_;
    buffer.dispatch(plan, dispatch);
    CombineArgs combine;
    combine.x = rows_.data;
    combine.out = y.data();
    combine.dtype = Dtype::kFloat32;
    combine.hidden = batch_.hidden;
    combine.stream = stream_;
    buffer.combine(plan, combine);
  }

  Batch& batch_;
  std::vector<int32_t> send_block_;
  Allocation meta_, rows_;
  RouteArgs route_;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

TEST(Graphs, FollowNewIds) {
  constexpr int kRanks = 3, kIds = 2 * kRanks, kRows = 20;
  for (const Layout layout : {Layout::kToken, Layout::kExpert, Layout::kPadded})
    run_threads(kRanks, kTimeout, [&](std::shared_ptr<Bootstrap> bootstrap) {
      std::mt19937 random(static_cast<unsigned>(bootstrap->rank()));
      Buffer buffer(bootstrap, testing::options_for(kIds, kHidden, 3, kRows, kTimeout));
      Batch batch{kRows,   3,
                  kHidden, std::vector<int32_t>(3 * kRows, -1),
                  {},      std::vector<float>(kRows * kHidden)};
      GraphedCalls calls(buffer, layout, batch);
      for (int replay = 0; replay < 10; ++replay) {
        for (float& x : batch.x) x = static_cast<float>(random() % 1000);
        for (int32_t& id : batch.topk_idx) id = static_cast<int32_t>(random() % (kIds + 1)) - 1;
        std::fill(calls.y.begin(), calls.y.end(), std::numeric_limits<float>::quiet_NaN());
        calls.replay();
        buffer.check_faults();
        for (int t = 0; t < kRows; ++t) {
          std::set<int32_t> from;
          for (int k = 0; k < 3; ++k) {
            const int32_t id = batch.topk_idx[static_cast<size_t>(3 * t + k)];
            if (id >= 0) from.insert(layout == Layout::kToken ? id / 2 : id);
          }
          for (int h = 0; h < kHidden; ++h) {
            const size_t i = static_cast<size_t>(t * kHidden + h);
            ASSERT_EQ(calls.y[i], static_cast<float>(from.size()) * batch.x[i])
                << "token " << t << ", replay " << replay;
          }
        }
      }
    });
}

}  // namespace
}  // namespace epcomm

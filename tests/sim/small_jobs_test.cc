// How small batches cut rows into jobs: whatever the sizes, every vector of every row has one job.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/cuda_error.h"
#include "kernels/launch.cuh"
#include "kernels/small.cuh"
#include "tests/sim/runtime.h"

namespace epcomm {
namespace {

struct Cut {
  int rows, row_bytes, unroll, least_parts;
};

// Counts the jobs that each vector has, [rows, vectors], and the leading ones of each row, [rows].
__global__ void count_jobs(const Cut cut, bool by_team, int* of_vector, int* leading) {
  if (lane_index() != 0) return;
  const SmallJobs jobs =
      by_team ? SmallJobs::of_team(SmallBlocks(Phase::kReceive, kDispatchSenders).receivers,
                                   cut.rows, cut.row_bytes, cut.unroll)
              : SmallJobs::of_block(cut.rows, cut.row_bytes, cut.unroll, cut.least_parts);
  for (int j = jobs.first; j < jobs.count; j += jobs.step) {
    const RowJob job = jobs.at(j);
    for (int v = job.begin; v < job.end; ++v) atomicAdd(&of_vector[job.row * jobs.vectors + v], 1);
    if (job.leads) atomicAdd(&leading[job.row], 1);
  }
}

TEST(SmallJobs, CoverEveryRowOnce) {
  EPCOMM_CUDA_TRY(cudaSetDevice(0));
  constexpr int kBlocks = 2;
  for (const Cut& cut :
       {Cut{0, 1024, 4, 1}, Cut{1, 16, 8, 1}, Cut{1, 14336, 4, 1}, Cut{3, 7168, 8, 1},
        Cut{8, 14336, 4, 1}, Cut{12, 14336, 4, 1}, Cut{33, 7184, 8, 1}, Cut{40, 528, 4, 1},
        Cut{5, 12288, 4, 24}, Cut{17, 81920, 4, 20}, Cut{300, 96, 8, 1}}) {
    const size_t rows = static_cast<size_t>(cut.rows),
                 vectors = static_cast<size_t>(cut.row_bytes / kVectorBytes);
    for (const bool by_team : {true, false}) {
      std::vector<int> of_vector(rows * vectors), leading(rows);
      launch("count_jobs", count_jobs, {kBlocks, kSmallThreads}, nullptr, cut, by_team,
             of_vector.data(), leading.data());
      EPCOMM_CUDA_TRY(cudaDeviceSynchronize());
      const int once = by_team ? 1 : kBlocks;
      EXPECT_EQ(of_vector, std::vector<int>(rows * vectors, once))
          << cut.rows << " rows of " << cut.row_bytes << " bytes";
      EXPECT_EQ(leading, std::vector<int>(rows, once));
    }
  }
  for (const std::string& fault : sim::take_faults()) ADD_FAILURE() << fault;
}

}  // namespace
}  // namespace epcomm

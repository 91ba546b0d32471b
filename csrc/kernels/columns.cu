// Columns: received scales, rows of 4-byte units, as the column-major matrices that DeepGEMM reads.
//
// Buffers: rows, counts are read; columns is written, of each group its first counts[g] rows.
// Launch: one block per SM. A warp turns 32 rows of 32 units: lane u reads unit u of each, 128
// bytes of a row at a time, and writes 128 bytes of its column. Memory order: none between threads;
// the rows have arrived before the kernel starts.
//
// Senders could store units to columns themselves. But they are 4 bytes each there: 56 stores for
// the scales of a row of 7168, next to 56 of 128 bytes for the row itself, instead of two.
#include <algorithm>

#include "kernels/columns.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/rows.cuh"

namespace epcomm {
namespace {

constexpr int kTileRows = 32;

// Unit `unit` (of this lane; none if it is not below args.units) of the rows [first, end) of group
// g, of which there are at most kTileRows.
__device__ __forceinline__ void turn(const ScaleColumnsArgs& args, int g, int first, int end,
                                     int unit) {
  if (unit >= args.units) return;
  const auto* from = reinterpret_cast<const uint32_t*>(args.rows) +
                     (int64_t{g} * args.group_rows + first) * args.units + unit;
  auto* to = reinterpret_cast<uint32_t*>(args.columns +
                                         (int64_t{g} * args.units + unit) * args.column_bytes) +
             first;
  const int count = end - first;
  if (count < kTileRows) {
    for (int r = 0; r < count; ++r) to[r] = from[int64_t{r} * args.units];
    return;
  }
  uint32_t data[kTileRows];
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) data[r] = from[int64_t{r} * args.units];
#pragma unroll
  for (int r = 0; r < kTileRows; r += 4)
    *reinterpret_cast<uint4*>(to + r) = make_uint4(data[r], data[r + 1], data[r + 2], data[r + 3]);
}

__global__ void __launch_bounds__(kRowThreads, 1)
    columns_kernel(const __grid_constant__ ScaleColumnsArgs args) {
  const int warps = static_cast<int>(gridDim.x * blockDim.x) / kWarpSize;
  // Warps of one block have tiles far apart, so that few tiles, too, spread over all SMs.
  const int warp = warp_index() * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  const int parts = (args.units + kWarpSize - 1) / kWarpSize;
  int before = 0;  // tiles of the groups before, modulo warps
  for (int g = 0; g < args.groups; ++g) {
    // What was announced is not trusted: an exchange that was cut short leaves anything.
    const int rows = max(min(args.counts[g], args.group_rows), 0);
    const int tiles = (rows + kTileRows - 1) / kTileRows * parts;
    for (int tile = (warp + warps - before) % warps; tile < tiles; tile += warps) {
      const int first = tile / parts * kTileRows;
      turn(args, g, first, min(first + kTileRows, rows), tile % parts * kWarpSize + lane_index());
    }
    before = (before + tiles) % warps;
  }
}

}  // namespace

void launch_scale_columns(const ScaleColumnsArgs& args, int num_sms, cudaStream_t stream) {
  check_aligned(args.columns, "recv_scale_columns");
  EPCOMM_CHECK(
      args.column_bytes % kVectorBytes == 0,
      "scale_column_bytes is " + std::to_string(args.column_bytes) + "; expected a multiple of 16");
  if (args.units == 0) return;
  launch("launch of columns", columns_kernel, {persistent_blocks(num_sms), kRowThreads}, stream,
         args);
}

}  // namespace epcomm

// Host entry point of the kernel that makes columns of received scales.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace epcomm {

/// Received scales: matrices of 4-byte units, one for each of `groups` groups of rows.
struct ScaleColumnsArgs {
  const char* rows;      ///< [groups, group_rows, units]
  char* columns;         ///< [groups, units, column_bytes]: unit u of row i is at 4 * i of column u
  int64_t column_bytes;  ///< a multiple of 16
  int32_t units;         ///< of a row
  int32_t groups;
  int32_t group_rows;     ///< most rows of a group
  const int32_t* counts;  ///< [groups], in device memory: rows of each
};
/// Copies the first counts[g] rows of every group.
void launch_scale_columns(const ScaleColumnsArgs& args, int num_sms, cudaStream_t stream);

}  // namespace epcomm

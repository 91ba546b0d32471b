// The part of NCCL's C interface that epcomm calls, opened at run time: the package needs no NCCL
// to build, and shares the copy that torch has loaded. The names and values are NCCL's stable ABI
// (nccl.h of 2.18 and later, https://github.com/NVIDIA/nccl).
#pragma once

#include <cuda_runtime_api.h>

#include <climits>
#include <cstddef>

namespace epcomm {

struct ncclComm;
using ncclComm_t = ncclComm*;
struct ncclUniqueId {
  char internal[128];
};
enum ncclResult_t : int { ncclSuccess = 0, ncclInProgress = 7 };
enum ncclDataType_t : int { ncclUint8 = 1, ncclFloat32 = 7 };
enum ncclRedOp_t : int { ncclSum = 0 };
/// ncclConfig_t of 2.18: later versions read it by its size and version, and choose the rest.
struct ncclConfig_v21800 {
  static constexpr int kUndefined = INT_MIN;
  size_t size = sizeof(ncclConfig_v21800);
  unsigned magic = 0xcafebeef, version = 21800;
  int blocking = kUndefined, cgaClusterSize = kUndefined;
  int minCTAs = kUndefined, maxCTAs = kUndefined;
  const char* netName = nullptr;
  int splitShare = kUndefined;
  int padding = kUndefined;  // a later version may take it for its next field
};

/// Functions of libnccl.
struct NcclApi {
  ncclResult_t (*GetVersion)(int*);
  ncclResult_t (*GetUniqueId)(ncclUniqueId*);
  ncclResult_t (*CommInitRank)(ncclComm_t*, int, ncclUniqueId, int);
  ncclResult_t (*CommInitRankConfig)(ncclComm_t*, int, ncclUniqueId, int, ncclConfig_v21800*);
  ncclResult_t (*CommAbort)(ncclComm_t);
  ncclResult_t (*CommGetAsyncError)(ncclComm_t, ncclResult_t*);
  const char* (*GetErrorString)(ncclResult_t);
  const char* (*GetLastError)(ncclComm_t);
  ncclResult_t (*GroupStart)();
  ncclResult_t (*GroupEnd)();
  ncclResult_t (*Send)(const void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t);
  ncclResult_t (*Recv)(void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t);
  ncclResult_t (*AllGather)(const void*, void*, size_t, ncclDataType_t, ncclComm_t, cudaStream_t);
  ncclResult_t (*ReduceScatter)(const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t,
                                cudaStream_t);

  /// The library, opened on first use: the copy that this process has loaded already, else the one
  /// that the loader finds. Throws Error if there is none or it is older than 2.18.
  static const NcclApi& get();
};

/// Throws Error naming the call and NCCL's reason.
void check_nccl(ncclResult_t code, const char* call);

}  // namespace epcomm

#define EPCOMM_NCCL_TRY(call) ::epcomm::check_nccl((call), #call)

// The part of the CUDA driver's interface that windows and the check of peer access use, as a
// table: obtained at run time, so that no module links libcuda, and replaced by a fake in tests.
//
// The types mirror those of cuda.h (CUDA 12 and 13, whose layout the driver keeps), so that code
// over the table compiles where no CUDA is; gpu_driver.cc compares the two.
#pragma once

#include <cstddef>
#include <string>

#include "epcomm/error.h"

namespace epcomm {

using CuResult = int;
using CuDevice = int;
using CuAddress = unsigned long long;  ///< CUdeviceptr
using CuMemory = unsigned long long;   ///< CUmemGenericAllocationHandle
using CuContext = void*;

struct CuUuid {
  unsigned char bytes[16];
};
struct CuFabricHandle {
  unsigned char data[64];
};
struct CuIpcHandle {
  char reserved[64];
};
struct CuLocation {
  int type;
  int id;
};
struct CuMemoryProperties {
  int type;
  int handle_types;
  CuLocation location;
  void* win32;
  unsigned char compression, gpu_direct_rdma_capable;
  unsigned short usage;
  unsigned char reserved[4];
};
struct CuAccess {
  CuLocation location;
  int flags;
};

constexpr CuResult kCuSuccess = 0;
constexpr CuResult kCuOutOfMemory = 2;
constexpr CuResult kCuNotPermitted = 800;
constexpr CuResult kCuNotSupported = 801;
// CUdevice_attribute
constexpr int kCuComputeCapabilityMajor = 75;
constexpr int kCuComputeCapabilityMinor = 76;
constexpr int kCuVirtualMemorySupported = 102;
constexpr int kCuDescriptorSupported = 103;
constexpr int kCuFabricSupported = 128;

constexpr int kCuPinned = 1;                  // CU_MEM_ALLOCATION_TYPE_PINNED
constexpr int kCuOnDevice = 1;                // CU_MEM_LOCATION_TYPE_DEVICE
constexpr int kCuReadWrite = 3;               // CU_MEM_ACCESS_FLAGS_PROT_READWRITE
constexpr int kCuDescriptor = 1;              // CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
constexpr int kCuFabric = 8;                  // CU_MEM_HANDLE_TYPE_FABRIC
constexpr int kCuLazyPeerAccess = 1;          // CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
constexpr int kCuRecommendedGranularity = 1;  // CU_MEM_ALLOC_GRANULARITY_RECOMMENDED

/// Functions of libcuda; members are named after them, without "cu".
struct GpuDriver {
  /// The GPU that is current, with its context made: what cudaGetDevice and cudaFree(nullptr) do.
  CuResult (*CurrentDevice)(CuDevice*);
  CuResult (*GetErrorName)(CuResult, const char**);
  CuResult (*GetErrorString)(CuResult, const char**);
  CuResult (*DeviceGetCount)(int*);
  CuResult (*DeviceGetAttribute)(int*, int, CuDevice);
  CuResult (*DeviceGetName)(char*, int, CuDevice);
  CuResult (*DeviceGetUuid)(CuUuid*, CuDevice);
  CuResult (*DeviceGetPCIBusId)(char*, int, CuDevice);
  CuResult (*DeviceCanAccessPeer)(int*, CuDevice, CuDevice);
  CuResult (*CtxGetCurrent)(CuContext*);
  CuResult (*CtxPushCurrent)(CuContext);
  CuResult (*CtxPopCurrent)(CuContext*);
  CuResult (*CtxSynchronize)();
  CuResult (*MemGetAllocationGranularity)(size_t*, const CuMemoryProperties*, int);
  CuResult (*MemCreate)(CuMemory*, size_t, const CuMemoryProperties*, unsigned long long);
  CuResult (*MemRelease)(CuMemory);
  CuResult (*MemExportToShareableHandle)(void*, CuMemory, int, unsigned long long);
  CuResult (*MemImportFromShareableHandle)(CuMemory*, void*, int);
  CuResult (*MemAddressReserve)(CuAddress*, size_t, size_t, CuAddress, unsigned long long);
  CuResult (*MemAddressFree)(CuAddress, size_t);
  CuResult (*MemMap)(CuAddress, size_t, size_t, CuMemory, unsigned long long);
  CuResult (*MemUnmap)(CuAddress, size_t);
  CuResult (*MemSetAccess)(CuAddress, size_t, const CuAccess*, size_t);
  CuResult (*MemsetD8)(CuAddress, unsigned char, size_t);
  CuResult (*MemAlloc)(CuAddress*, size_t);
  CuResult (*MemFree)(CuAddress);
  CuResult (*IpcGetMemHandle)(CuIpcHandle*, CuAddress);
  CuResult (*IpcOpenMemHandle)(CuAddress*, CuIpcHandle, unsigned);
  CuResult (*IpcCloseMemHandle)(CuAddress);

  /// The driver of this process. Throws Error if there is none or it is too old.
  static const GpuDriver& get();
};

/// A driver call that failed.
class DriverError : public Error {
 public:
  DriverError(CuResult code, const std::string& text) : Error(text), code(code) {}
  CuResult code;
};

/// Throws DriverError naming the call and the driver's reason.
void check_driver(CuResult code, const char* call);

/// Functions of libnvidia-ml, which knows the GPUs that CUDA_VISIBLE_DEVICES hides. Members are
/// named after them, without "nvml".
struct NvmlApi {
  int (*DeviceGetHandleByUUID)(const char*, void**);
  /// P2PCapsIndex, P2PStatus: enums of nvml.h.
  int (*DeviceGetP2PStatus)(void*, void*, int, int*);

  /// The library of this process, initialised; null if there is none.
  static const NvmlApi* get();
};

}  // namespace epcomm

#define EPCOMM_DRIVER_TRY(call) ::epcomm::check_driver((call), #call)

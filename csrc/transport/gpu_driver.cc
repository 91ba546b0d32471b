// Where the table of driver functions comes from: the runtime, which has opened libcuda already.
#include "transport/gpu_driver.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "kernels/cuda_error.h"

namespace epcomm {
namespace {

static_assert(sizeof(CuUuid) == sizeof(CUuuid) && sizeof(CuAddress) == sizeof(CUdeviceptr));
static_assert(sizeof(CuMemory) == sizeof(CUmemGenericAllocationHandle));
static_assert(sizeof(CuIpcHandle) == sizeof(CUipcMemHandle));
static_assert(sizeof(CuMemoryProperties) == sizeof(CUmemAllocationProp));
static_assert(offsetof(CuMemoryProperties, handle_types) ==
              offsetof(CUmemAllocationProp, requestedHandleTypes));
static_assert(offsetof(CuMemoryProperties, location) == offsetof(CUmemAllocationProp, location));
static_assert(offsetof(CuMemoryProperties, compression) ==
              offsetof(CUmemAllocationProp, allocFlags));
static_assert(sizeof(CuAccess) == sizeof(CUmemAccessDesc) &&
              offsetof(CuAccess, flags) == offsetof(CUmemAccessDesc, flags));
static_assert(kCuSuccess == CUDA_SUCCESS && kCuOutOfMemory == CUDA_ERROR_OUT_OF_MEMORY &&
              kCuNotPermitted == CUDA_ERROR_NOT_PERMITTED &&
              kCuNotSupported == CUDA_ERROR_NOT_SUPPORTED);
static_assert(kCuComputeCapabilityMajor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR &&
              kCuComputeCapabilityMinor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR &&
              kCuVirtualMemorySupported ==
                  CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED &&
              kCuDescriptorSupported ==
                  CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
static_assert(kCuPinned == CU_MEM_ALLOCATION_TYPE_PINNED &&
              kCuOnDevice == CU_MEM_LOCATION_TYPE_DEVICE &&
              kCuReadWrite == CU_MEM_ACCESS_FLAGS_PROT_READWRITE &&
              kCuDescriptor == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR &&
              kCuLazyPeerAccess == CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS &&
              kCuRecommendedGranularity == CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
#if CUDA_VERSION >= 12040
static_assert(kCuFabric == CU_MEM_HANDLE_TYPE_FABRIC &&
              kCuFabricSupported == CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED &&
              sizeof(CuFabricHandle) == sizeof(CUmemFabricHandle));
#endif

// The version of a function that CUDA 12.0 has: its parameters are those of the table.
constexpr unsigned kInterfaceVersion = 12000;

void* entry_point(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  EPCOMM_CUDA_TRY(cudaGetDriverEntryPointByVersion(name, &function, kInterfaceVersion,
                                                   cudaEnableDefault, &found));
#else
  EPCOMM_CUDA_TRY(cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found));
#endif
  if (found != cudaDriverEntryPointSuccess || function == nullptr)
    throw Error(std::string("the CUDA driver has no ") + name +
                "; install a driver of CUDA 12.0 or later");
  return function;
}

template <class F>
void load(const char* name, F& function) {
  function = reinterpret_cast<F>(entry_point(name));
}

// Error codes of the runtime have the values of the driver's.
CuResult current_device(CuDevice* device) {
  cudaError_t code = cudaGetDevice(device);
  if (code == cudaSuccess) code = cudaFree(nullptr);
  if (code != cudaSuccess) cudaGetLastError();
  return static_cast<CuResult>(code);
}

GpuDriver load_driver() {
  GpuDriver d{};
  d.CurrentDevice = &current_device;
  load("cuGetErrorName", d.GetErrorName);
  load("cuGetErrorString", d.GetErrorString);
  load("cuDeviceGetCount", d.DeviceGetCount);
  load("cuDeviceGetAttribute", d.DeviceGetAttribute);
  load("cuDeviceGetName", d.DeviceGetName);
  load("cuDeviceGetUuid", d.DeviceGetUuid);
  load("cuDeviceGetPCIBusId", d.DeviceGetPCIBusId);
  load("cuDeviceCanAccessPeer", d.DeviceCanAccessPeer);
  load("cuCtxGetCurrent", d.CtxGetCurrent);
  load("cuCtxPushCurrent", d.CtxPushCurrent);
  load("cuCtxPopCurrent", d.CtxPopCurrent);
  load("cuCtxSynchronize", d.CtxSynchronize);
  load("cuMemGetAllocationGranularity", d.MemGetAllocationGranularity);
  load("cuMemCreate", d.MemCreate);
  load("cuMemRelease", d.MemRelease);
  load("cuMemExportToShareableHandle", d.MemExportToShareableHandle);
  load("cuMemImportFromShareableHandle", d.MemImportFromShareableHandle);
  load("cuMemAddressReserve", d.MemAddressReserve);
  load("cuMemAddressFree", d.MemAddressFree);
  load("cuMemMap", d.MemMap);
  load("cuMemUnmap", d.MemUnmap);
  load("cuMemSetAccess", d.MemSetAccess);
  load("cuMemsetD8", d.MemsetD8);
  load("cuMemAlloc", d.MemAlloc);
  load("cuMemFree", d.MemFree);
  load("cuIpcGetMemHandle", d.IpcGetMemHandle);
  load("cuIpcOpenMemHandle", d.IpcOpenMemHandle);
  load("cuIpcCloseMemHandle", d.IpcCloseMemHandle);
  return d;
}

// NVML comes with the driver, and may be missing in a container.
bool load_nvml(NvmlApi* api) {
  void* library = ::dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return false;
  const auto init = reinterpret_cast<int (*)()>(::dlsym(library, "nvmlInit_v2"));
  api->DeviceGetHandleByUUID = reinterpret_cast<decltype(api->DeviceGetHandleByUUID)>(
      ::dlsym(library, "nvmlDeviceGetHandleByUUID"));
  api->DeviceGetP2PStatus = reinterpret_cast<decltype(api->DeviceGetP2PStatus)>(
      ::dlsym(library, "nvmlDeviceGetP2PStatus"));
  return init != nullptr && api->DeviceGetHandleByUUID != nullptr &&
         api->DeviceGetP2PStatus != nullptr && init() == 0;
}

}  // namespace

const GpuDriver& GpuDriver::get() {
  static const GpuDriver driver = load_driver();
  return driver;
}

const NvmlApi* NvmlApi::get() {
  static NvmlApi api{};
  static const bool loaded = load_nvml(&api);
  return loaded ? &api : nullptr;
}

}  // namespace epcomm

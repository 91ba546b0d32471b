#include "tests/cpp/fake_driver.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

namespace epcomm {
namespace testing {
namespace {

constexpr CuResult kInvalidValue = 1;
constexpr size_t kGranularity = size_t{2} << 20;

thread_local FakeMachine machine;

struct Memory {
  int fd;
  size_t bytes;
};
struct Range {
  size_t bytes;
  bool mapped = false;
};

std::mutex mutex;
std::map<CuMemory, Memory> memories;
std::map<CuAddress, Range> ranges;
std::map<CuAddress, size_t> allocations, opened;
CuMemory next_memory = 1;
int foreign_access = 0;

// The code that this call of a function must fail with; 0 = none.
CuResult injected(const char* name) {
  if (machine.failing != name || machine.successes-- > 0) return kCuSuccess;
  return machine.code;
}

#define INJECT(name) \
  if (const CuResult bad = injected(name); bad != kCuSuccess) return bad

const FakeGpu& gpu(CuDevice device) { return machine.visible.at(static_cast<size_t>(device)); }

bool access_allowed(int from, int to) {
  return std::find(machine.no_access.begin(), machine.no_access.end(), std::pair(from, to)) ==
         machine.no_access.end();
}

CuResult get_error(CuResult code, const char** text) {
  *text = code == kCuOutOfMemory    ? "CUDA_ERROR_OUT_OF_MEMORY"
          : code == kCuNotSupported ? "CUDA_ERROR_NOT_SUPPORTED"
                                    : "CUDA_ERROR_FAKE";
  return kCuSuccess;
}

CuResult add_memory(CuMemory* handle, int fd, size_t bytes) {
  std::lock_guard lock(mutex);
  *handle = next_memory++;
  memories[*handle] = {fd, bytes};
  return kCuSuccess;
}

CuResult mem_create(CuMemory* handle, size_t bytes, const CuMemoryProperties* p,
                    unsigned long long) {
  INJECT("MemCreate");
  if (bytes % kGranularity != 0 || p->type != kCuPinned || p->location.id != machine.current)
    return kInvalidValue;
  const int fd = ::memfd_create("fake-gpu", MFD_CLOEXEC);
  if (fd < 0 || ::ftruncate(fd, static_cast<off_t>(bytes)) != 0) return kCuOutOfMemory;
  // What was there before: windows must not rely on fresh memory.
  const char rubbish = 0x5a;
  if (::pwrite(fd, &rubbish, 1, 7) != 1) return kCuOutOfMemory;
  return add_memory(handle, fd, bytes);
}

CuResult mem_export(void* out, CuMemory handle, int type, unsigned long long) {
  INJECT("MemExportToShareableHandle");
  std::lock_guard lock(mutex);
  const Memory& memory = memories.at(handle);
  if (type == kCuDescriptor) {
    *static_cast<int*>(out) = ::dup(memory.fd);
  } else {
    // As a fabric handle: where the file can be opened, by any process that may.
    std::snprintf(static_cast<char*>(out), sizeof(CuFabricHandle), "/proc/%d/fd/%d", ::getpid(),
                  memory.fd);
  }
  return kCuSuccess;
}

CuResult mem_import(CuMemory* handle, void* shared, int type) {
  INJECT("MemImportFromShareableHandle");
  int fd = -1;
  if (type == kCuDescriptor) {
    fd = ::dup(static_cast<int>(reinterpret_cast<intptr_t>(shared)));
  } else if (FILE* file = std::fopen(static_cast<char*>(shared), "r+")) {
    fd = ::dup(::fileno(file));
    std::fclose(file);
  }
  if (fd < 0) return kInvalidValue;
  return add_memory(handle, fd, static_cast<size_t>(::lseek(fd, 0, SEEK_END)));
}

CuResult mem_release(CuMemory handle) {
  std::lock_guard lock(mutex);
  if (!memories.contains(handle)) return kInvalidValue;
  ::close(memories[handle].fd);
  memories.erase(handle);
  return kCuSuccess;
}

CuResult address_reserve(CuAddress* address, size_t bytes, size_t, CuAddress, unsigned long long) {
  INJECT("MemAddressReserve");
  void* p = ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return kCuOutOfMemory;
  *address = reinterpret_cast<CuAddress>(p);
  std::lock_guard lock(mutex);
  ranges[*address] = {bytes};
  return kCuSuccess;
}

CuResult address_free(CuAddress address, size_t bytes) {
  std::lock_guard lock(mutex);
  const auto it = ranges.find(address);
  if (it == ranges.end() || it->second.mapped || it->second.bytes != bytes) return kInvalidValue;
  ::munmap(reinterpret_cast<void*>(address), bytes);
  ranges.erase(it);
  return kCuSuccess;
}

CuResult mem_map(CuAddress address, size_t bytes, size_t, CuMemory handle, unsigned long long) {
  INJECT("MemMap");
  std::lock_guard lock(mutex);
  if (memories.at(handle).bytes != bytes) return kInvalidValue;
  void* p = ::mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED,
                   memories.at(handle).fd, 0);
  if (p == MAP_FAILED) return kInvalidValue;
  ranges.at(address).mapped = true;
  return kCuSuccess;
}

CuResult mem_unmap(CuAddress address, size_t bytes) {
  std::lock_guard lock(mutex);
  const auto it = ranges.find(address);
  if (it == ranges.end() || !it->second.mapped) return kInvalidValue;
  ::mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  it->second.mapped = false;
  return kCuSuccess;
}

CuResult set_access(CuAddress address, size_t bytes, const CuAccess* access, size_t count) {
  INJECT("MemSetAccess");
  for (size_t i = 0; i < count; ++i)
    if (access[i].location.id != machine.current) ++foreign_access;
  return ::mprotect(reinterpret_cast<void*>(address), bytes, PROT_READ | PROT_WRITE) == 0
             ? kCuSuccess
             : kInvalidValue;
}

CuResult mem_alloc(CuAddress* address, size_t bytes) {
  INJECT("MemAlloc");
  void* p = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  *address = reinterpret_cast<CuAddress>(p);
  std::lock_guard lock(mutex);
  allocations[*address] = bytes;
  return kCuSuccess;
}

CuResult mem_free(CuAddress address) {
  std::lock_guard lock(mutex);
  if (!allocations.contains(address)) return kInvalidValue;
  ::munmap(reinterpret_cast<void*>(address), allocations[address]);
  allocations.erase(address);
  return kCuSuccess;
}

GpuDriver make_driver() {
  GpuDriver d{};
  d.CurrentDevice = [](CuDevice* device) {
    INJECT("CurrentDevice");
    *device = machine.current;
    return kCuSuccess;
  };
  d.GetErrorName = &get_error;
  d.GetErrorString = &get_error;
  d.DeviceGetCount = [](int* count) {
    *count = static_cast<int>(machine.visible.size());
    return kCuSuccess;
  };
  d.DeviceGetAttribute = [](int* value, int attribute, CuDevice device) {
    *value = attribute == kCuVirtualMemorySupported   ? gpu(device).vmm
             : attribute == kCuDescriptorSupported    ? gpu(device).descriptor
             : attribute == kCuFabricSupported        ? gpu(device).fabric
             : attribute == kCuComputeCapabilityMajor ? 9
                                                      : 0;
    return kCuSuccess;
  };
  d.DeviceGetName = [](char* name, int bytes, CuDevice device) {
    std::snprintf(name, static_cast<size_t>(bytes), "%s", gpu(device).name.c_str());
    return kCuSuccess;
  };
  d.DeviceGetUuid = [](CuUuid* uuid, CuDevice device) {
    *uuid = {};
    uuid->bytes[15] = static_cast<unsigned char>(gpu(device).id);
    return kCuSuccess;
  };
  d.DeviceGetPCIBusId = [](char* id, int bytes, CuDevice device) {
    std::snprintf(id, static_cast<size_t>(bytes), "0000:%02X:00.0", gpu(device).id);
    return kCuSuccess;
  };
  d.DeviceCanAccessPeer = [](int* can, CuDevice from, CuDevice to) {
    INJECT("DeviceCanAccessPeer");
    *can = access_allowed(gpu(from).id, gpu(to).id);
    return kCuSuccess;
  };
  d.CtxGetCurrent = [](CuContext* context) {
    *context = &machine;
    return kCuSuccess;
  };
  d.CtxPushCurrent = [](CuContext) { return kCuSuccess; };
  d.CtxPopCurrent = [](CuContext*) { return kCuSuccess; };
  d.CtxSynchronize = [] { return kCuSuccess; };
  d.MemGetAllocationGranularity = [](size_t* bytes, const CuMemoryProperties*, int) {
    INJECT("MemGetAllocationGranularity");
    *bytes = kGranularity;
    return kCuSuccess;
  };
  d.MemCreate = &mem_create;
  d.MemRelease = &mem_release;
  d.MemExportToShareableHandle = &mem_export;
  d.MemImportFromShareableHandle = &mem_import;
  d.MemAddressReserve = &address_reserve;
  d.MemAddressFree = &address_free;
  d.MemMap = &mem_map;
  d.MemUnmap = &mem_unmap;
  d.MemSetAccess = &set_access;
  d.MemsetD8 = [](CuAddress address, unsigned char value, size_t bytes) {
    INJECT("MemsetD8");
    std::memset(reinterpret_cast<void*>(address), value, bytes);
    return kCuSuccess;
  };
  d.MemAlloc = &mem_alloc;
  d.MemFree = &mem_free;
  // An IPC handle is the address: right between threads, which is where tests use it.
  d.IpcGetMemHandle = [](CuIpcHandle* handle, CuAddress address) {
    INJECT("IpcGetMemHandle");
    std::memcpy(handle->reserved, &address, sizeof address);
    return kCuSuccess;
  };
  d.IpcOpenMemHandle = [](CuAddress* address, CuIpcHandle handle, unsigned) {
    INJECT("IpcOpenMemHandle");
    std::memcpy(address, handle.reserved, sizeof *address);
    std::lock_guard lock(mutex);
    ++opened[*address];
    return kCuSuccess;
  };
  d.IpcCloseMemHandle = [](CuAddress address) {
    std::lock_guard lock(mutex);
    if (opened[address] == 0) return kInvalidValue;
    --opened[address];
    return kCuSuccess;
  };
  return d;
}

// NVML handles are 1 + the id of a GPU.
int nvml_handle(const char* uuid, void** handle) {
  const std::string text(uuid);
  *handle =
      reinterpret_cast<void*>(1 + std::strtol(text.substr(text.size() - 2).c_str(), nullptr, 16));
  return text.starts_with("GPU-") && text.size() == 40 ? 0 : 2;
}

int nvml_p2p_status(void* from, void* to, int, int* status) {
  const auto id = [](void* handle) {
    return static_cast<int>(reinterpret_cast<intptr_t>(handle)) - 1;
  };
  *status = access_allowed(id(from), id(to)) ? 0 : 2;
  return 0;
}

}  // namespace

void set_fake_machine(FakeMachine m) { machine = std::move(m); }

FakeHoldings fake_holdings() {
  std::lock_guard lock(mutex);
  FakeHoldings held;
  held.memories = static_cast<int>(memories.size());
  held.ranges = static_cast<int>(ranges.size());
  for (const auto& [address, range] : ranges) held.mappings += range.mapped;
  held.allocations = static_cast<int>(allocations.size());
  for (const auto& [address, count] : opened) held.allocations += static_cast<int>(count);
  return held;
}

int fake_foreign_access() {
  std::lock_guard lock(mutex);
  return foreign_access;
}

}  // namespace testing

const GpuDriver& GpuDriver::get() {
  static const GpuDriver driver = testing::make_driver();
  return driver;
}

const NvmlApi* NvmlApi::get() {
  static const NvmlApi api{&testing::nvml_handle, &testing::nvml_p2p_status};
  return testing::machine.nvml ? &api : nullptr;
}

}  // namespace epcomm

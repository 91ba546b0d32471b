#include "transport/gpu_mapping.h"

#include <string>

namespace epcomm {

void check_driver(CuResult code, const char* call) {
  if (code == kCuSuccess) return;
  const GpuDriver& driver = GpuDriver::get();
  const char *name = nullptr, *text = nullptr;
  driver.GetErrorName(code, &name);
  driver.GetErrorString(code, &text);
  std::string function(call);  // "driver.MemMap(...)"
  function = function.substr(0, function.find('('));
  throw DriverError(code, "cu" + function.substr(function.find('.') + 1) + ": " +
                              (text == nullptr ? "unknown error" : text) + " (" +
                              (name == nullptr ? std::to_string(code) : name) + ")");
}

PhysicalMemory::PhysicalMemory(CuDevice device, size_t bytes, int handle_type) {
  const GpuDriver& driver = GpuDriver::get();
  CuMemoryProperties properties{};
  properties.type = kCuPinned;
  properties.handle_types = handle_type;
  properties.location = {kCuOnDevice, device};
  EPCOMM_DRIVER_TRY(driver.MemCreate(&handle_, bytes, &properties, 0));
  held_ = true;
}

PhysicalMemory::PhysicalMemory(void* shared, int handle_type) {
  const GpuDriver& driver = GpuDriver::get();
  EPCOMM_DRIVER_TRY(driver.MemImportFromShareableHandle(&handle_, shared, handle_type));
  held_ = true;
}

PhysicalMemory::~PhysicalMemory() {
  if (held_) GpuDriver::get().MemRelease(handle_);
}

Mapping::Mapping(PhysicalMemory memory, CuDevice device, size_t bytes)
    : memory_(std::move(memory)), bytes_(bytes) {
  const GpuDriver& driver = GpuDriver::get();
  EPCOMM_DRIVER_TRY(driver.MemAddressReserve(&address_, bytes, 0, 0, 0));
  try {
    EPCOMM_DRIVER_TRY(driver.MemMap(address_, bytes, 0, memory_.get(), 0));
    mapped_ = true;
    const CuAccess access{{kCuOnDevice, device}, kCuReadWrite};
    EPCOMM_DRIVER_TRY(driver.MemSetAccess(address_, bytes, &access, 1));
  } catch (...) {
    release();
    throw;
  }
}

Mapping::~Mapping() { release(); }

void Mapping::release() {
  const GpuDriver& driver = GpuDriver::get();
  if (mapped_) driver.MemUnmap(address_, bytes_);
  driver.MemAddressFree(address_, bytes_);
}

IpcMemory::IpcMemory(size_t bytes) : opened_(false) {
  const GpuDriver& driver = GpuDriver::get();
  EPCOMM_DRIVER_TRY(driver.CtxGetCurrent(&context_));
  EPCOMM_DRIVER_TRY(driver.MemAlloc(&address_, bytes));
}

IpcMemory::IpcMemory(const CuIpcHandle& handle) : opened_(true) {
  const GpuDriver& driver = GpuDriver::get();
  EPCOMM_DRIVER_TRY(driver.CtxGetCurrent(&context_));
  EPCOMM_DRIVER_TRY(driver.IpcOpenMemHandle(&address_, handle, kCuLazyPeerAccess));
}

IpcMemory::~IpcMemory() {
  const GpuDriver& driver = GpuDriver::get();
  // The thread that drops the last tensor may have no context, or another.
  if (driver.CtxPushCurrent(context_) != kCuSuccess) return;
  opened_ ? driver.IpcCloseMemHandle(address_) : driver.MemFree(address_);
  driver.CtxPopCurrent(&context_);
}

}  // namespace epcomm

// How ranks come to address each other's device memory.
//
// Order of the steps, each voted on: look at the GPU, take memory and fill it with zeros, export,
// exchange, map. The vote after the zeros comes before any handle is passed on, so no peer ever
// reads what was there before; the vote after mapping means that a rank that returns can use all
// windows. A mapping grants access to this process's own device only.
#include "transport/gpu_window.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "core/clock.h"
#include "core/fd_exchange.h"
#include "core/vote.h"
#include "epcomm/error.h"
#include "kernels/token_layout.h"
#include "transport/gpu_driver.h"
#include "transport/gpu_mapping.h"

namespace epcomm {
namespace {

constexpr size_t kIpcGranularity = size_t{2} << 20;  // else cudaMalloc shares a block between two
constexpr const char* kUseNccl = "use transport='nccl', which needs no peer access";

// What the GPU of a rank offers.
struct Offer {
  uint64_t granularity;
  int32_t device;
  int32_t descriptor, fabric;  // can VMM memory be exported so?
};

bool has(const GpuDriver& driver, int attribute, CuDevice device) {
  int value = 0;
  // A driver that does not know the attribute does not have what it stands for.
  return driver.DeviceGetAttribute(&value, attribute, device) == kCuSuccess && value != 0;
}

// Granularity of memory that can be passed on so; 0 if the driver refuses, as it does with fabric
// handles on a machine whose fabric is not set up, though the device has the attribute.
size_t granularity_of(const GpuDriver& driver, int handle_type, CuDevice device) {
  CuMemoryProperties properties{};
  properties.type = kCuPinned;
  properties.handle_types = handle_type;
  properties.location = {kCuOnDevice, device};
  size_t granularity = 0;
  const CuResult code =
      driver.MemGetAllocationGranularity(&granularity, &properties, kCuRecommendedGranularity);
  return code == kCuSuccess ? granularity : 0;
}

Offer look_at_gpu() {
  const GpuDriver& driver = GpuDriver::get();
  Offer offer{kIpcGranularity, 0, 0, 0};
  EPCOMM_DRIVER_TRY(driver.CurrentDevice(&offer.device));
  if (!has(driver, kCuVirtualMemorySupported, offer.device)) return offer;
  const auto offers = [&](int attribute, int handle_type) {
    if (!has(driver, attribute, offer.device)) return false;
    const size_t granularity = granularity_of(driver, handle_type, offer.device);
    offer.granularity = std::max<uint64_t>(offer.granularity, granularity);
    return granularity != 0;
  };
  offer.descriptor = offers(kCuDescriptorSupported, kCuDescriptor);
  offer.fabric = offers(kCuFabricSupported, kCuFabric);
  return offer;
}

// The best way that all ranks have; nothing if there is none.
std::optional<WindowShare> choose_share(const std::vector<Offer>& offers, bool one_machine) {
  auto all = [&offers](int32_t Offer::* way) {
    return std::all_of(offers.begin(), offers.end(), [way](const Offer& o) { return o.*way; });
  };
  if (one_machine && all(&Offer::descriptor)) return WindowShare::kDescriptor;
  if (all(&Offer::fabric)) return WindowShare::kFabric;
  if (one_machine) return WindowShare::kIpc;
  return std::nullopt;
}

class MappedWindow final : public GpuWindow {
 public:
  MappedWindow(Bootstrap& bootstrap, size_t bytes, double timeout_s)
      : bootstrap_(bootstrap),
        rank_(bootstrap.rank()),
        size_(bootstrap.size()),
        deadline_(timeout_s),
        peers_(static_cast<size_t>(size_)) {
    const bool one_machine = bootstrap.in_process() || on_one_machine(bootstrap);
    const std::vector<Offer> offers = gather_offers();
    for (const Offer& o : offers) granularity_ = std::max<size_t>(granularity_, o.granularity);
    bytes_ = align_up(std::max<size_t>(bytes, 1), granularity_);
    device_ = offers[static_cast<size_t>(rank_)].device;
    const auto share = choose_share(offers, one_machine);
    if (!share)
      throw Error(
          "the ranks are on several machines (or in several network namespaces, or of several "
          "users), and not every GPU offers fabric handles; run all ranks on one machine, or " +
          std::string(kUseNccl));
    share_ = *share;
    make(one_machine);
    if (one_machine) connect();
    if (share_ == WindowShare::kDescriptor)
      share_descriptors();
    else if (share_ == WindowShare::kFabric)
      share_fabric_handles();
    else
      share_ipc_handles();
  }

  size_t bytes() const override { return bytes_; }
  char* peer(int rank) const override { return peers_[static_cast<size_t>(rank)].get(); }
  std::shared_ptr<char> own() const override { return peers_[static_cast<size_t>(rank_)]; }
  bool alive(int rank) const override { return !links_ || links_->alive(rank); }
  int device() const override { return device_; }
  WindowShare share() const override { return share_; }

 private:
  template <class Body>
  void step(const std::string& name, const std::string& advice, Body&& body) {
    throw_failures(name, failures_of(bootstrap_, body), advice);
  }
  template <class Owner>
  static std::shared_ptr<char> address_of(std::shared_ptr<Owner> owner) {
    char* address = reinterpret_cast<char*>(owner->address());
    return {std::move(owner), address};
  }

  std::vector<Offer> gather_offers() {
    Offer mine{};
    step("looking at the GPU", kUseNccl, [&] { mine = look_at_gpu(); });
    std::vector<Offer> offers(static_cast<size_t>(size_));
    bootstrap_.all_gather(&mine, offers.data(), sizeof mine);
    return offers;
  }

  // This rank's memory, all zeros. Where a driver claims to export VMM memory and then refuses (in
  // a container that may not, say), all ranks of a machine fall back to CUDA IPC.
  void make(bool one_machine) {
    bool refused = false;
    auto failures = failures_of(bootstrap_, [&] {
      try {
        take_memory();
      } catch (const DriverError& e) {
        refused = e.code == kCuNotSupported || e.code == kCuNotPermitted;
        throw;
      }
    });
    const bool failed = std::any_of(failures.begin(), failures.end(),
                                    [](const std::string& f) { return !f.empty(); });
    if (failed && one_machine && share_ != WindowShare::kIpc) {
      const std::string& mine = failures[static_cast<size_t>(rank_)];
      const char other_reason = !mine.empty() && !refused;
      std::vector<char> other_reasons(static_cast<size_t>(size_));
      bootstrap_.all_gather(&other_reason, other_reasons.data(), 1);
      if (std::find(other_reasons.begin(), other_reasons.end(), 1) == other_reasons.end()) {
        peers_[static_cast<size_t>(rank_)].reset();
        exported_ = Fd();
        share_ = WindowShare::kIpc;
        failures = failures_of(bootstrap_, [&] { take_memory(); });
      }
    }
    throw_failures("making a window of " + std::to_string(bytes_) + " bytes on the GPU", failures,
                   "make the Buffer with a smaller window_bytes or max_tokens, or free memory of "
                   "the GPU; or " +
                       std::string(kUseNccl));
  }

  void take_memory() {
    const GpuDriver& driver = GpuDriver::get();
    std::shared_ptr<char>& own = peers_[static_cast<size_t>(rank_)];
    if (share_ == WindowShare::kIpc) {
      auto memory = std::make_shared<IpcMemory>(bytes_);
      EPCOMM_DRIVER_TRY(driver.IpcGetMemHandle(&ipc_, memory->address()));
      own = address_of(std::move(memory));
    } else {
      const bool descriptor = share_ == WindowShare::kDescriptor;
      const int type = descriptor ? kCuDescriptor : kCuFabric;
      PhysicalMemory memory(device_, bytes_, type);
      if (descriptor) {
        int fd = -1;
        EPCOMM_DRIVER_TRY(driver.MemExportToShareableHandle(&fd, memory.get(), type, 0));
        exported_ = Fd(fd);
      } else {
        EPCOMM_DRIVER_TRY(driver.MemExportToShareableHandle(&fabric_, memory.get(), type, 0));
      }
      own = address_of(std::make_shared<Mapping>(std::move(memory), device_, bytes_));
    }
    EPCOMM_DRIVER_TRY(driver.MemsetD8(reinterpret_cast<CuAddress>(own.get()), 0, bytes_));
    EPCOMM_DRIVER_TRY(driver.CtxSynchronize());
  }

  void connect() {
    step("connecting the ranks of this machine", kUseNccl, [&] {
      links_ = std::make_unique<PeerLinks>(bootstrap_, deadline_, "make its window", 0);
    });
  }

  // Maps what every peer shared: import(rank) gives an owner of a mapping.
  template <class Import>
  void map_peers(const Import& import) {
    step("mapping the peers' windows",
         "check that every GPU can access every other (nvidia-smi topo -p2p rw), and that the "
         "ranks share one IPC and PID namespace; or " +
             std::string(kUseNccl),
         [&] {
           for (int r = 0; r < size_; ++r) {
             if (r == rank_) continue;
             try {
               peers_[static_cast<size_t>(r)] = address_of(import(r));
             } catch (const DriverError& e) {
               throw Error("window of rank " + std::to_string(r) + ": " + e.what());
             }
           }
         });
  }

  std::shared_ptr<Mapping> map(void* shared, int handle_type) const {
    return std::make_shared<Mapping>(PhysicalMemory(shared, handle_type), device_, bytes_);
  }

  void share_descriptors() {
    std::vector<Fd> theirs;
    step("exchanging file descriptors", kUseNccl,
         [&] { theirs = links_->exchange(exported_.get(), deadline_); });
    exported_ = Fd();
    map_peers([&](int r) {
      const intptr_t fd = theirs[static_cast<size_t>(r)].get();
      return map(reinterpret_cast<void*>(fd), kCuDescriptor);
    });
  }

  void share_fabric_handles() {
    std::vector<CuFabricHandle> theirs(static_cast<size_t>(size_));
    bootstrap_.all_gather(&fabric_, theirs.data(), sizeof fabric_);
    map_peers([&](int r) { return map(&theirs[static_cast<size_t>(r)], kCuFabric); });
  }

  void share_ipc_handles() {
    std::vector<CuIpcHandle> theirs(static_cast<size_t>(size_));
    bootstrap_.all_gather(&ipc_, theirs.data(), sizeof ipc_);
    map_peers([&](int r) { return std::make_shared<IpcMemory>(theirs[static_cast<size_t>(r)]); });
  }

  Bootstrap& bootstrap_;  // used by the constructor only
  int rank_, size_;
  Deadline deadline_;
  size_t granularity_ = 1, bytes_ = 0;
  CuDevice device_ = 0;
  WindowShare share_ = WindowShare::kDescriptor;
  Fd exported_;
  CuFabricHandle fabric_{};
  CuIpcHandle ipc_{};
  std::unique_ptr<PeerLinks> links_;
  std::vector<std::shared_ptr<char>> peers_;  // by rank, this rank's own piece among them
};

}  // namespace

std::unique_ptr<GpuWindow> make_gpu_window(Bootstrap& bootstrap, size_t bytes, double timeout_s) {
  return std::make_unique<MappedWindow>(bootstrap, bytes, timeout_s);
}

}  // namespace epcomm

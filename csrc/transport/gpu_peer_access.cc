// Two exchanges: who has which GPU, then what each rank finds about each other rank's.
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <string>
#include <vector>

#include "core/subgroup.h"
#include "core/vote.h"
#include "epcomm/error.h"
#include "epcomm/peer_access.h"
#include "kernels/node_layout.h"
#include "transport/gpu_driver.h"
#include "transport/gpu_window.h"

namespace epcomm {
namespace {

// What a rank tells of its GPU.
struct Card {
  CuUuid uuid;
  char boot_id[40];  // of the machine
  char host[64];     // its name, for messages
  char pci[16];
  char name[96];
  int32_t mig, fabric;
  int32_t ordinal, visible;  // in that rank's process, for messages
};

// What a rank finds about a peer's GPU; detail says more.
enum class Finding : int32_t { kGood, kSameGpu, kMig, kOtherMachine, kNoAccess, kNvmlRefuses };
struct Verdict {
  Finding finding = Finding::kGood;
  int32_t detail = 0;
};

// NVML: nvmlGpuP2PCapsIndex_t and nvmlGpuP2PStatus_t of nvml.h.
constexpr int kNvmlRead = 0, kNvmlWrite = 1;
const char* nvml_reason(int status) {
  switch (status) {
    case 1:
      return "the chipset does not support it";
    case 2:
      return "a GPU does not support it";
    case 3:
      return "the PCIe topology does not support it";
    case 4:
      return "it is disabled by a registry key of the driver";
    case 5:
      return "it is not supported";
    default:
      return "the status is unknown";
  }
}

std::string uuid_text(const CuUuid& uuid) {
  std::string text = "GPU-";
  for (int i = 0; i < 16; ++i) {
    char byte[3];
    std::snprintf(byte, sizeof byte, "%02x", uuid.bytes[i]);
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += byte;
  }
  return text;
}

bool same(const CuUuid& a, const CuUuid& b) { return std::memcmp(&a, &b, sizeof a) == 0; }

Card describe_gpu() {
  const GpuDriver& driver = GpuDriver::get();
  Card card{};
  EPCOMM_DRIVER_TRY(driver.CurrentDevice(&card.ordinal));
  EPCOMM_DRIVER_TRY(driver.DeviceGetCount(&card.visible));
  // Of a MIG instance this is the instance's own UUID, so two instances of one GPU differ.
  EPCOMM_DRIVER_TRY(driver.DeviceGetUuid(&card.uuid, card.ordinal));
  EPCOMM_DRIVER_TRY(driver.DeviceGetName(card.name, sizeof card.name - 1, card.ordinal));
  EPCOMM_DRIVER_TRY(driver.DeviceGetPCIBusId(card.pci, sizeof card.pci, card.ordinal));
  // CUDA has no attribute for it, but names MIG instances so: "NVIDIA H200 MIG 1g.18gb".
  card.mig = std::strstr(card.name, " MIG ") != nullptr;
  int fabric = 0;
  driver.DeviceGetAttribute(&fabric, kCuFabricSupported, card.ordinal);
  card.fabric = fabric;
  std::ifstream("/proc/sys/kernel/random/boot_id").read(card.boot_id, 36);
  ::gethostname(card.host, sizeof card.host - 1);
  return card;
}

// Ordinal in this process of the GPU with a UUID; -1 if it is hidden from it.
CuDevice visible_device(const CuUuid& uuid) {
  const GpuDriver& driver = GpuDriver::get();
  int count = 0;
  EPCOMM_DRIVER_TRY(driver.DeviceGetCount(&count));
  for (CuDevice d = 0; d < count; ++d) {
    CuUuid other{};
    EPCOMM_DRIVER_TRY(driver.DeviceGetUuid(&other, d));
    if (same(other, uuid)) return d;
  }
  return -1;
}

// NVML's answer for two GPUs; good if it knows nothing of them.
Verdict ask_nvml(const CuUuid& mine, const CuUuid& theirs) {
  const NvmlApi* nvml = NvmlApi::get();
  void *here = nullptr, *there = nullptr;
  if (nvml == nullptr || nvml->DeviceGetHandleByUUID(uuid_text(mine).c_str(), &here) != 0 ||
      nvml->DeviceGetHandleByUUID(uuid_text(theirs).c_str(), &there) != 0)
    return {};
  for (int way : {kNvmlRead, kNvmlWrite}) {
    int status = 0;
    if (nvml->DeviceGetP2PStatus(here, there, way, &status) == 0 && status != 0)
      return {Finding::kNvmlRefuses, status};
  }
  return {};
}

Verdict judge(const Card& mine, const Card& theirs, bool share_gpu) {
  if (std::memcmp(mine.boot_id, theirs.boot_id, sizeof mine.boot_id) != 0)
    return {mine.fabric && theirs.fabric ? Finding::kGood : Finding::kOtherMachine, 0};
  if (same(mine.uuid, theirs.uuid)) return {share_gpu ? Finding::kGood : Finding::kSameGpu, 0};
  if (mine.mig || theirs.mig) return {Finding::kMig, 0};
  const CuDevice peer = visible_device(theirs.uuid);
  if (peer < 0) return ask_nvml(mine.uuid, theirs.uuid);
  int can = 0;
  const GpuDriver& driver = GpuDriver::get();
  EPCOMM_DRIVER_TRY(driver.DeviceCanAccessPeer(&can, mine.ordinal, peer));
  return {can ? Finding::kGood : Finding::kNoAccess, 0};
}

std::string reason(const Verdict& verdict, const Card& from, const Card& to) {
  const std::string gpus = std::string(from.pci) + " to " + to.pci + " on " + from.host;
  switch (verdict.finding) {
    case Finding::kSameGpu:
      return "both ranks use the same GPU " + uuid_text(from.uuid) +
             "; call torch.cuda.set_device with a GPU of its own on each rank";
    case Finding::kMig:
      return std::string("MIG instances have no peer access (") + (from.mig ? from : to).name + ")";
    case Finding::kOtherMachine:
      return std::string("they are on different machines (") + from.host + ", " + to.host +
             ") and not both GPUs offer fabric handles";
    case Finding::kNoAccess:
      return "CUDA reports no peer access from " + gpus;
    case Finding::kNvmlRefuses:
      return "NVML reports no peer access from " + gpus + ": " + nvml_reason(verdict.detail);
    case Finding::kGood:
      break;
  }
  return "";
}

// Collective. The bad pairs that the drivers know of.
std::vector<BadPair> known_bad_pairs(Bootstrap& bootstrap, bool share_gpu) {
  const size_t size = static_cast<size_t>(bootstrap.size());
  const std::string advice = "check the driver (nvidia-smi)";
  Card mine{};
  throw_failures("looking at the GPUs", failures_of(bootstrap, [&] { mine = describe_gpu(); }),
                 advice);
  std::vector<Card> cards(size);
  bootstrap.all_gather(&mine, cards.data(), sizeof mine);

  const size_t rank = static_cast<size_t>(bootstrap.rank());
  std::vector<Verdict> row(size), all(size * size);
  throw_failures("asking for peer access",
                 failures_of(bootstrap,
                             [&] {
                               for (size_t r = 0; r < size; ++r)
                                 if (r != rank) row[r] = judge(mine, cards[r], share_gpu);
                             }),
                 advice);
  bootstrap.all_gather(row.data(), all.data(), size * sizeof(Verdict));
  std::vector<BadPair> bad;
  for (size_t from = 0; from < size; ++from)
    for (size_t to = 0; to < size; ++to)
      if (const Verdict& v = all[from * size + to]; v.finding != Finding::kGood)
        bad.push_back(
            {static_cast<int>(from), static_cast<int>(to), reason(v, cards[from], cards[to])});
  return bad;
}

}  // namespace

std::string PeerAccess::text() const {
  std::string text;
  for (const BadPair& pair : bad_pairs) {
    if (!text.empty()) text += "; ";
    text += "rank " + std::to_string(pair.from) + " -> rank " + std::to_string(pair.to) + ": " +
            pair.reason;
  }
  return text.empty() ? failure : text;
}

PeerAccess check_peer_access(Bootstrap& bootstrap, double timeout_s, bool share_gpu) {
  PeerAccess access;
  try {
    access.bad_pairs = known_bad_pairs(bootstrap, share_gpu);
    if (access.good()) make_gpu_window(bootstrap, 1, timeout_s);
  } catch (const PeerLost&) {
    throw;
  } catch (const Error& e) {  // voted, so the same on all ranks
    access.failure = e.what();
  }
  return access;
}

PeerAccess check_peer_access_in_nodes(Bootstrap& bootstrap, double timeout_s, int ranks_per_node) {
  const NodeMap map{bootstrap.size(), ranks_per_node};
  const int node = map.node(bootstrap.rank());
  SubgroupBootstrap group(bootstrap, map.first(node), map.size(node));
  PeerAccess access;
  try {
    access = check_peer_access(group, timeout_s);
  } catch (const PeerLost&) {
    throw;
  } catch (const std::exception& e) {
    access.failure = e.what();  // the other nodes still wait for this one
  }
  group.finish();
  return access;
}

}  // namespace epcomm

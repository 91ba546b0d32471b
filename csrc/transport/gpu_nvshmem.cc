#include "transport/gpu_nvshmem.h"

#include <host/nvshmem_api.h>
// NVSHMEM's inline initialisation ends the process where it fails; so it returns what went wrong.
#undef NONZERO_EXIT
#define NONZERO_EXIT(status, ...)
#include <cuda_runtime_api.h>
#include <host/nvshmemx_api.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "core/vote.h"
#include "epcomm/error.h"
#include "kernels/cuda_error.h"
#include "kernels/token_layout.h"
#include "transport/gpu_memory.h"
#include "transport/gpu_symmetric_heap.h"

namespace epcomm {
namespace {

// The job of this process. Never ends.
struct Job {
  nvshmemx_uniqueid_t id;  // names the job
  int pe, num_pes, device;
  SymmetricHeap heap;

  Job(const nvshmemx_uniqueid_t& id_, int device_)
      : id(id_),
        pe(nvshmem_my_pe()),
        num_pes(nvshmem_n_pes()),
        device(device_),
        heap(num_pes, &take) {}
  static char* take(size_t bytes) {
    return static_cast<char*>(nvshmem_align(kBlockAlignment, bytes));
  }
};
std::mutex job_mutex;
Job* job = nullptr;

// What a rank tells its group of the job that its process is in.
struct Membership {
  nvshmemx_uniqueid_t id;
  int32_t pe;  // -1 = in none
};

int current_device() {
  int device = 0;
  EPCOMM_CUDA_TRY(cudaGetDevice(&device));
  return device;
}

std::vector<Membership> gather_memberships(Bootstrap& group) {
  Membership mine{};
  mine.pe = -1;
  if (job != nullptr) {
    mine.id = job->id;
    mine.pe = job->pe;
  }
  std::vector<Membership> all(static_cast<size_t>(group.size()));
  group.all_gather(&mine, all.data(), sizeof mine);
  return all;
}

std::string ranks_text(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank" : "ranks";
  for (size_t i = 0; i < ranks.size(); ++i)
    text += (i == 0 ? " " : ", ") + std::to_string(ranks[i]);
  return text;
}

// Throws on all ranks unless each GPU has as many ranks: NVSHMEM makes teams of the ranks of a GPU,
// all alike, and with others its initialisation does not return.
void check_ranks_per_gpu(Bootstrap& group, int device) {
  cudaDeviceProp properties{};
  std::vector<cudaUUID_t> all(static_cast<size_t>(group.size()));
  throw_failures(
      "looking for this rank's GPU",
      failures_of(group, [&] { EPCOMM_CUDA_TRY(cudaGetDeviceProperties(&properties, device)); }),
      "see what nvidia-smi says of it");
  group.all_gather(&properties.uuid, all.data(), sizeof properties.uuid);
  std::vector<std::vector<int>> of_gpu;  // ranks, by the first of them
  for (int r = 0; r < group.size(); ++r) {
    const auto shares = [&](const std::vector<int>& ranks) {
      return std::memcmp(&all[static_cast<size_t>(ranks[0])], &all[static_cast<size_t>(r)],
                         sizeof(cudaUUID_t)) == 0;
    };
    const auto ranks = std::find_if(of_gpu.begin(), of_gpu.end(), shares);
    if (ranks == of_gpu.end())
      of_gpu.push_back({r});
    else
      ranks->push_back(r);
  }
  for (const auto& ranks : of_gpu)
    EPCOMM_CHECK(ranks.size() == of_gpu[0].size(),
                 "NVSHMEM needs as many ranks on each GPU as on every other, but one has " +
                     ranks_text(of_gpu[0]) + " and another " + ranks_text(ranks) +
                     "; give each rank a GPU of its own, by torch.cuda.set_device, or each GPU as "
                     "many ranks");
}

// The first group of all its processes: makes the job.
void initialise(Bootstrap& group) {
  nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
  const int device = current_device();
  auto advice = "see what NVSHMEM says with NVSHMEM_DEBUG=INFO, and docs/rdma.md";
  auto step = [&](const std::string& name, auto&& body) {
    throw_failures(name, failures_of(group, body), advice);
  };
  check_ranks_per_gpu(group, device);
  step("preparing NVSHMEM", [&] {
    EPCOMM_CUDA_TRY(cudaFree(nullptr));  // NVSHMEM takes the context that is current
    if (group.rank() != 0) return;
    if (const int code = nvshmemx_get_uniqueid(&id); code != 0)
      throw Error("nvshmemx_get_uniqueid gave " + std::to_string(code));
  });
  std::vector<nvshmemx_uniqueid_t> ids(static_cast<size_t>(group.size()), id);
  group.all_gather(&id, ids.data(), sizeof id);
  step("initialising NVSHMEM", [&] {
    nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
    nvshmemx_set_attr_uniqueid_args(group.rank(), group.size(), &ids[0], &attributes);
    if (const int code = nvshmemx_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes); code != 0)
      throw Error("nvshmemx_init_attr gave " + std::to_string(code));
    job = new Job(ids[0], device);
  });
}

// The PE of every rank.
std::vector<int> join(Bootstrap& group) {
  std::vector<Membership> all = gather_memberships(group);
  const auto in_none = [](const Membership& m) { return m.pe < 0; };
  if (std::all_of(all.begin(), all.end(), in_none)) {
    initialise(group);
    all = gather_memberships(group);
  }
  std::string strangers;
  for (size_t r = 0; r < all.size(); ++r) {
    const bool same =
        !in_none(all[r]) && std::memcmp(&all[r].id, &all[0].id, sizeof all[r].id) == 0;
    if (!same) strangers += (strangers.empty() ? "" : ", ") + std::to_string(r);
  }
  if (!strangers.empty())
    throw Error(
        "NVSHMEM was initialised by an earlier Buffer, over a group that does not hold all "
        "ranks of this one (not in the job of rank 0: " +
        strangers +
        "); make the first Buffer of transport rdma over all ranks that will "
        "ever share one");
  throw_failures("taking symmetric memory",
                 failures_of(group,
                             [] {
                               if (current_device() != job->device)
                                 throw Error("NVSHMEM was initialised on GPU " +
                                             std::to_string(job->device) + ", now GPU " +
                                             std::to_string(current_device()) + " is current");
                             }),
                 "a process uses NVSHMEM on one GPU");
  std::vector<int> pes;
  for (const Membership& m : all) pes.push_back(m.pe);
  return pes;
}

class JobWindow final : public NvshmemWindow {
 public:
  JobWindow(Bootstrap& group, size_t bytes, size_t slab_bytes)
      : pes_(join(group)), piece_(job->heap.allocate(group, pes_, bytes, slab_bytes)) {
    const auto failures = failures_of(group, [&] {
      // On a stream of its own, so that it waits for nobody's kernels.
      const Stream stream;
      EPCOMM_CUDA_TRY(cudaMemsetAsync(piece_->data(), 0, bytes, stream.get()));
      EPCOMM_CUDA_TRY(cudaStreamSynchronize(stream.get()));
    });
    // Nobody writes before all have cleared.
    throw_failures("clearing symmetric memory", failures, "see the reason above");
  }
  char* own() const override { return piece_->data(); }
  int pe(int rank) const override { return pes_[static_cast<size_t>(rank)]; }
  bool mapped(int rank) const override { return nvshmem_ptr(piece_->data(), pe(rank)) != nullptr; }
  void abandon() override { piece_->abandon(); }

 private:
  std::vector<int> pes_;
  std::unique_ptr<SymmetricHeap::Piece> piece_;
};

}  // namespace

std::shared_ptr<NvshmemWindow> make_nvshmem_window(Bootstrap& bootstrap, size_t bytes,
                                                   size_t slab_bytes) {
  std::lock_guard lock(job_mutex);
  return std::make_shared<JobWindow>(bootstrap, bytes, slab_bytes);
}

}  // namespace epcomm

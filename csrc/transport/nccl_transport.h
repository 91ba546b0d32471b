// Moves rows with NCCL, which finds a way between any two GPUs. A token crosses once per
// destination rank.
//
// route (nccl.cc): counts on the device, one all-gather of the counts, slots on the device. Rows go
// one of three ways (transport_options "algorithm"; nccl_dispatch.cc, nccl_combine.cc):
//
// exact: the host knows all counts (host_sync=True). Rows are packed by destination and sent with
// ncclSend/ncclRecv in as many bytes as there are, in chunks, so that packing one chunk overlaps
// sending the one before. In layout "token" rows are received in their final place. What a rank
// sends itself never goes through NCCL, and is copied while NCCL moves the rest.
//
// static: the host knows nothing; every pair exchanges max_tokens rows. Can be captured into a
// graph.
//
// allgather: every rank gets every row and keeps its own; the way back is a reduce-scatter in fp32,
// whose order of summation is NCCL's (results may differ in the last bit from the other ways). Can
// be captured. Moves as many bytes as static.
//
// small: batches of up to 256 tokens a rank whose counts the host does not know, when they are
// first dispatched: expert ids and rows go together, one all-gather, and every rank routes for all
// (nccl_small.cc). Replays and combines as static. Can be captured.
//
// window: no NCCL at all; a transport of its own (nccl_window.h).
//
// auto: window where it can be; else exact where the host knows the counts, else small, or static
// where batches are larger.
// docs/nccl.md has the measurements.
//
// Memory, made with the Buffer: send_ and stage_ hold max_tokens rows per rank each (for allgather
// at least fp32 rows).
#pragma once

#include <string>
#include <vector>

#include "core/expert_map.h"
#include "kernels/kernels.h"
#include "transport/gpu_call_order.h"
#include "transport/gpu_memory.h"
#include "transport/gpu_route.h"
#include "transport/gpu_watchdog.h"
#include "transport/nccl_comm.h"
#include "transport/transport.h"

namespace epcomm {

enum class NcclAlgorithm { kAuto, kExact, kStatic, kSmall, kAllGather, kWindow };

struct NcclOptions {
  NcclAlgorithm algorithm = NcclAlgorithm::kAuto;
  Schedule schedule = Schedule::kAuto;
  int chunks = 0;  // 0: from bytes
  int ctas = 0;    // 0: NCCL's choice
};

// Host-side counts of a plan made with host_sync.
struct PlanCounts {
  const RouteResult* result;
  int num_ranks, chunks;
  int64_t chunk(int c, int source, int destination) const {
    return result
        ->chunk_count[static_cast<size_t>((c * num_ranks + source) * num_ranks + destination)];
  }
  int64_t total(int source, int destination) const { return before(chunks, source, destination); }
  // Tokens of the chunks before c.
  int64_t before(int c, int source, int destination) const {
    int64_t n = 0;
    for (int i = 0; i < c; ++i) n += chunk(i, source, destination);
    return n;
  }
  // Index of source's first token at destination.
  int64_t recv_base(int source, int destination) const {
    int64_t n = 0;
    for (int s = 0; s < source; ++s) n += total(s, destination);
    return n;
  }
  // Index of destination's first token among those that source sends.
  int64_t send_base(int source, int destination) const {
    int64_t n = 0;
    for (int d = 0; d < destination; ++d) n += total(source, d);
    return n;
  }
};

class NcclTransport final : public Transport {
 public:
  /// Collective. choice: see Buffer::choice.
  NcclTransport(const TransportContext& context, const NcclOptions& options, std::string choice);
  ~NcclTransport() override;

  const Caps& caps() const override { return caps_; }
  std::string choice() const override { return choice_; }
  RouteResult route(const RouteArgs& args) override;
  void dispatch(const Plan& plan, const DispatchArgs& args) override;
  void combine(const Plan& plan, const CombineArgs& args) override;
  void check() override { watchdog_.confirm(); }
  Allocation allocate(size_t) override { return {}; }
  size_t free_bytes() const override { return 0; }

 private:
  // A call on the stream, and its marks: both are made, that of the begin before NCCL is first
  // called, that of the end after the last exchange.
  class Call {
   public:
    Call(const GpuWatchdog& watchdog, Operation operation, cudaStream_t stream)
        : watchdog_(watchdog), operation_(operation), stream_(stream) {}
    cudaStream_t stream() const { return stream_; }
    Mark begin_mark() const { return watchdog_.begin_mark(operation_); }
    Mark end_mark() const { return watchdog_.end_mark(operation_); }

   private:
    const GpuWatchdog& watchdog_;
    Operation operation_;
    cudaStream_t stream_;
  };
  // put(call) puts the call on the stream. Where it throws the call is half-way: the peers are
  // told, and nothing more can be sent. What NCCL refuses because the connection to a peer broke,
  // or because a fault that is known has ended its communicator, is raised as that fault.
  template <class Put>
  void make_call(Operation operation, cudaStream_t stream, Put put) {
    watchdog_.check();
    order_.begin(stream);
    try {
      put(Call(watchdog_, operation, stream));
      order_.end(stream);
    } catch (const std::exception& error) {
      if (comm_.failed()) watchdog_.lose_connection(error.what());
      watchdog_.check();
      watchdog_.abandon("it failed half-way through a call");
      throw;
    }
  }

  // Where the rows of one region (payload, scales, records) of a send or receive buffer start.
  struct Region {
    char *x, *scales, *meta;
  };
  // Where the rows of an exact dispatch are, on both sides of an exchange.
  struct ExactRows {
    PlanCounts counts;
    int rank;
    RowSpec spec;
    size_t record;  // bytes
    bool records;   // are sent
    bool in_place;  // rows are received where the caller gets them
    PackTarget send, recv;

    // All that is placed is there before the first exchange.
    bool places_early() const { return in_place && !records; }
    PackTarget at(const PackTarget& region, int64_t n) const;
    PackTarget outgoing(int peer, int chunk) const {
      return at(send, counts.send_base(rank, peer) + counts.before(chunk, rank, peer));
    }
    PackTarget incoming(int peer, int chunk) const {
      return at(recv, counts.recv_base(peer, rank) + counts.before(chunk, peer, rank));
    }
    // What crosses in one exchange, to and from rank + 1, rank + 2, ...
    std::vector<Message> messages(int chunk) const;
  };
  ExactRows exact_rows(const Plan& plan, const DispatchArgs& args) const;
  // As ExactRows, the other way: partial rows of an exact combine.
  struct ExactPartials {
    PlanCounts counts;
    int rank;
    size_t row;  // bytes
    bool whole;  // rows are partials as they are: one for each token, without weights
    char *x, *staged, *arrived;

    // The i-th chunk to cross. What overlaps nothing is that of the smallest: making its partials,
    // which comes first, or where there are none to make its sum, which comes last.
    int chunk(int i) const { return whole ? counts.chunks - 1 - i : i; }
    // First partial of a chunk of owner's tokens, in an array of those of all owners.
    char* at(char* base, int owner, int chunk) const {
      const int64_t n = counts.recv_base(owner, rank) + counts.before(chunk, owner, rank);
      return base + static_cast<size_t>(n) * row;
    }
    char* incoming(int peer, int chunk) const {
      const int64_t n = counts.send_base(rank, peer) + counts.before(chunk, rank, peer);
      return arrived + static_cast<size_t>(n) * row;
    }
    std::vector<Message> messages(int chunk) const;
  };
  ExactPartials exact_partials(const Plan& plan, const CombineArgs& args) const;
  void partials_aside(const ExactPartials& rows, PartialArgs& partials, int num_sms);
  static Region region(char* base, int64_t rows, const RowSpec& spec);
  size_t region_bytes(int64_t rows, const RowSpec& spec, size_t record_bytes) const;

  NcclAlgorithm algorithm(const Plan& plan) const;
  // Bit r for rank r.
  uint64_t own() const { return uint64_t{1} << rank_; }
  uint64_t all() const { return ~uint64_t{0} >> (kMaxPackRanks - num_ranks_); }
  // SMs for a kernel that runs while NCCL's kernel does and must leave it room.
  int beside(int num_sms) const { return num_sms == 0 ? num_sms_ * 3 / 8 : num_sms; }
  void check_fits(const char* what, int64_t row_bytes, int64_t scale_bytes) const;
  PackArgs pack_args(const Plan& plan, const DispatchArgs& args) const;
  void dispatch_exact(const Plan& plan, const DispatchArgs& args, const Call& call);
  void dispatch_static(const Plan& plan, const DispatchArgs& args, const Call& call);
  void dispatch_gathered(const Plan& plan, const DispatchArgs& args, const Call& call);
  // Block r of send_, for another rank r, to that rank's stage_; block r of stage_ is what r sent.
  void exchange_blocks(size_t block, cudaStream_t stream);
  RouteResult route_small(const RouteArgs& args);
  void dispatch_small(const Plan& plan, const DispatchArgs& args, const Call& call);
  // Block r of gathered_ is rank r's, for all ranks.
  void exchange_batches(size_t block, cudaStream_t stream);
  PartialArgs partial_args(const Plan& plan, const CombineArgs& args, const Call& call);
  SumArgs sum_args(const Plan& plan, const CombineArgs& args) const;
  void combine_exact(const Plan& plan, const CombineArgs& args, const Call& call);
  void combine_static(const Plan& plan, const CombineArgs& args, const Call& call);
  void combine_gathered(const Plan& plan, const CombineArgs& args, const Call& call);

  Config config_;
  const ExpertMap& experts_;
  int rank_, num_ranks_;
  NcclOptions options_;
  std::string choice_;
  Dims dims_;
  Caps caps_;
  double timeout_s_;
  int num_sms_ = 0;
  size_t widest_row_;  // bytes of a row with its scales and record
  int chunks_;         // of an exact exchange
  bool aside_;         // own rows are copied beside an exact exchange
  bool small_;         // see NcclAlgorithm::kSmall
  GpuRoute route_;
  DeviceMemory send_, stage_, gathered_;
  NcclComm comm_;
  GpuWatchdog watchdog_;
  DeviceMemory weights_;
  GpuCallOrder order_;
  Stream side_;  // works beside the exchanges on the caller's stream
  Event fork_, own_done_, join_, chunk_done_[kMaxChunks];
};

}  // namespace epcomm

// The plain data that crosses every layer: configuration, what a transport can do, and the
// arguments of the three collective steps. Trivially copyable where device code sees it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace epcomm {

constexpr int kMaxTopk = 32;
constexpr int kRowAlignment = 16;  ///< bytes; every row moved is a multiple of this

/// Element type of token rows. Values are part of the wire signature; never renumber.
enum class Dtype : int32_t {
  kUnset = 0,
  kBfloat16 = 1,
  kFloat16 = 2,
  kFloat32 = 3,
  kFloat8E4M3 = 4,  ///< moved as bytes, always with scales
  kUint8 = 5,       ///< packed sub-byte formats, moved as bytes, always with scales
};

/// Bytes of one element; 0 for kUnset.
constexpr int dtype_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::kBfloat16:
    case Dtype::kFloat16:
      return 2;
    case Dtype::kFloat32:
      return 4;
    case Dtype::kFloat8E4M3:
    case Dtype::kUint8:
      return 1;
    case Dtype::kUnset:
      break;
  }
  return 0;
}

/// How a row is quantised on its way; formulas in csrc/kernels/quant.h and docs/quantisation.md.
enum class Quant : int32_t {
  kNone = 0,
  kFp8 = 1,       ///< e4m3, one fp32 scale per 128 elements
  kFp8Ue8m0 = 2,  ///< e4m3, one power-of-two scale per 128 elements, four exponents to an int32
  kNvfp4 = 3,     ///< two e2m1 to a byte, one e4m3 scale per 16 elements, one fp32 global scale
};

/// Sizes of a quantised row.
struct QuantLayout {
  int32_t group;        ///< elements that share a scale
  int32_t multiple;     ///< hidden is a multiple of it
  int32_t num_groups;   ///< scales of a row
  int32_t row_bytes;    ///< of q
  int32_t scale_bytes;  ///< of the scales
  /// Of the scales as a dispatch moves them. kNvfp4: followed by zeros to a multiple of 16 bytes,
  /// with the global scale in the last 4, which may differ between source ranks.
  int32_t wire_scale_bytes;
};

/// Where scales are, in bytes between rows and between units of one row: an fp32 of kFp8, an int32
/// of kFp8Ue8m0 (4 scales), a byte of kNvfp4.
struct ScaleStrides {
  int64_t row = 0;
  int64_t unit = 0;
  bool swizzled = false;  ///< kNvfp4: tiles of 128 x 4 instead, from the start of the array
};

/// Rows to quantise, or quantised rows to turn back. Local; nothing is sent.
struct QuantizeArgs {
  Quant quant = Quant::kNone;
  Dtype dtype = Dtype::kUnset;  ///< of x: kBfloat16, kFloat16 or kFloat32
  int64_t num_rows = 0;
  int32_t hidden = 0;
  void* x = nullptr;                    ///< [num_rows, hidden]; dequantize writes it
  void* q = nullptr;                    ///< [num_rows, QuantLayout::row_bytes]; quantize writes it
  void* scales = nullptr;               ///< as scale_strides says; quantize writes it
  const float* global_scale = nullptr;  ///< kNvfp4: of row r at global_scale[r * global_stride]
  int64_t global_stride = 0;            ///< 0: one for all rows; quantize takes no other
  ScaleStrides scale_strides;
  bool wire = false;       ///< quantize: also write what QuantLayout::wire_scale_bytes adds
  int32_t num_sms = 0;     ///< most SMs used; 0 = all
  void* stream = nullptr;  ///< cudaStream_t of the GPU functions
};

/// Element type of topk_idx; the value is its size in bytes.
enum class IndexType : int32_t { kInt32 = 4, kInt64 = 8 };

/// Arrangement of the rows that a rank receives.
enum class Layout : int32_t {
  kUnset = 0,
  kToken = 1,   ///< one row per (token, this rank); by source rank, then token
  kExpert = 2,  ///< one row per (token, local expert); grouped by expert, group starts aligned
  kPadded = 3,  ///< [local_experts, num_ranks * max_tokens] rows; the first tokens_per_expert[e]
                ///< are valid
};

/// Which part of a dispatch or combine a call does. Transports with Caps::two_phases offer halves:
/// both are called with the same arguments, no other call of the Buffer between them. The send half
/// occupies no SM once its rows are on their way; nothing received may be read before the receive
/// half.
enum class Phase : int32_t { kAll = 0, kSend = 1, kReceive = 2 };

/// What every rank of a Buffer must agree on.
struct Config {
  int32_t num_experts = 0;
  int32_t hidden = 0;              ///< elements of a token row before quantisation
  int32_t topk = 0;                ///< most experts per token, 1..kMaxTopk
  int32_t max_tokens = 0;          ///< most tokens that any rank dispatches in one call
  Dtype dtype = Dtype::kBfloat16;  ///< widest element type of a token row
};

/// How a Buffer is made.
struct BufferOptions {
  Config config;
  /// Owner of each expert; empty = contiguous split, ceil(num_experts / num_ranks) each, the tail
  /// shorter.
  std::vector<int32_t> expert_to_rank;
  /// Ranks [0, n) form node 0, [n, 2n) node 1, ...; 0 = all ranks are one node. NodeMap in
  /// csrc/kernels/node_layout.h says what follows from it.
  int32_t ranks_per_node = 0;
  std::string transport = "cpu";
  double timeout_s = 30.0;  ///< every wait for a peer gives up after this
  size_t window_bytes = 0;  ///< memory for what calls return; 0 = sized from config
  /// Choices that only one transport knows, by name; each transport documents and checks its own.
  std::map<std::string, std::string> transport_options;
  // What the environment of a rank says to transports that have a choice (nccl). Ranks may differ.
  /// Why this rank shall not use the memory of peers' GPUs; empty = it may.
  std::string refuses_peer_memory;
  /// Names the host that this rank counts as being on; empty = the machine that it runs on.
  std::string host;
};

/// What a transport can do. Buffer refuses by it, tests skip by it.
struct Caps {
  bool token_layout = false;
  bool expert_layout = false;
  bool padded_layout = false;
  bool symmetric_outputs = false;  ///< received rows must lie in Buffer::allocate() memory
  bool graph_capture = false;      ///< host_sync=False calls can be captured into a CUDA graph
  bool cuda = false;               ///< tensors are on the GPU (else on the CPU)
  bool two_phases = false;         ///< dispatch and combine can be called in halves, see Phase
  bool small_batches = false;      ///< the path for batches of at most 256 tokens a rank is taken
  uint32_t fused_quants = 0;       ///< Caps::bit(q): dispatch can quantise rows on the way
  uint32_t combine_quants = 0;     ///< Caps::bit(q): combine can send partial rows as q
  bool link_counters = false;      ///< Buffer::link_counters() is offered
  bool sends_ahead = false;        ///< RouteArgs::ahead is offered
  bool forwards = false;           ///< rows reach a node once and are forwarded inside it
  bool received_tokens = false;    ///< Statistics::received_tokens is offered
  bool wait_times = false;         ///< Statistics::max_wait_ns is offered
  bool column_scales = false;      ///< DispatchArgs::recv_scale_columns is offered

  static constexpr uint32_t bit(Quant quant) { return 1u << static_cast<int32_t>(quant); }

  bool takes(Layout layout) const {
    return (layout == Layout::kToken && token_layout) ||
           (layout == Layout::kExpert && expert_layout) ||
           (layout == Layout::kPadded && padded_layout);
  }
};

/// Counters of one Buffer that its calls add to, in the caller's memory: of the GPU on GPU
/// transports, so that a CUDA graph counts at every replay. Null = not counted.
struct Statistics {
  /// [local_experts]: tokens that dispatches have delivered to each, replays included; what
  /// PlanView::tokens_per_expert says, added up.
  int64_t* received_tokens = nullptr;
  /// [num_ranks]: nanoseconds of the longest wait of any call for what a rank had to signal.
  int64_t* max_wait_ns = nullptr;
};

/// What went over one kind of link, counted where it was sent.
struct LinkTraffic {
  uint64_t rows = 0;        ///< token rows or sums of rows
  uint64_t bytes = 0;       ///< of those rows, scales included
  uint64_t meta_bytes = 0;  ///< what travels with them: routing records, weights
};

/// Rows that one operation moved from this rank to itself, inside its node, and to other nodes.
struct OperationTraffic {
  LinkTraffic local, node, rail;
};

/// Since the Buffer was made, or since they were last reset. Signals, and the counts and addresses
/// that ranks announce when they enter a call, are not in them.
struct LinkCounters {
  OperationTraffic dispatch, combine;
};

/// Pointers into a plan's two memory blocks (see token_layout.h for sizes and offsets). R =
/// num_ranks, E = num_experts, L = local_experts, T = num_tokens, K = topk, N = received tokens.
struct PlanView {
  // The send block, filled by route.
  int32_t* topk_idx = nullptr;  ///< [T, K] global expert ids, -1 = none
  int32_t* row = nullptr;       ///< [T, K] row of the owner's layout that carries (t, k), -1
  int32_t* slot = nullptr;  ///< [T, R] index among the tokens that rank r receives, -1 = not sent
  int32_t* rank_count = nullptr;         ///< [R source, R destination] tokens
  int32_t* expert_count = nullptr;       ///< [R source, E] tokens
  int32_t* expert_offset = nullptr;      ///< [L + 1] first row of each local expert's group
  int32_t* tokens_per_expert = nullptr;  ///< [L] tokens received, without alignment padding
  int32_t* num_recv = nullptr;           ///< [1] N
  int32_t* announced = nullptr;          ///< GPU only: [R, AnnounceLayout::words()], by rank
  int32_t* first_row = nullptr;          ///< GPU only: [T, R] first row at rank r that carries t,
                                         ///< -1 = not sent; unused in kToken, where it is slot
  // Only where rows are forwarded inside their node; M = num_nodes.
  int32_t* node_slot = nullptr;   ///< [T, M] index among the tokens that this rank sends to a node
  int32_t* node_count = nullptr;  ///< [R source, M] tokens; on a GPU only what this rank sends, and
                                  ///< what it forwards inside its own node
  int32_t* node_token = nullptr;  ///< GPU only: [M, T] token that is the m-th which goes to a node
  int32_t* forwarded = nullptr;  ///< GPU only, filled by dispatch: what stays of the rows that this
                                 ///< rank forwards (ForwardedLayout in rail_layout.h)
  // The receive block, filled by dispatch: N records of MetaLayout, written by the source ranks;
  // behind them, where a rank forwards rows between processes, one record of ForwardLayout for
  // each.
  void* recv_meta = nullptr;
};

/// Step 1, route: expert ids in, counts and slots out. Collective.
struct RouteArgs {
  const void* topk_idx = nullptr;  ///< [num_tokens, topk], contiguous
  IndexType index_type = IndexType::kInt64;
  int32_t num_tokens = 0;
  int32_t topk = 0;
  Layout layout = Layout::kToken;
  int32_t expert_alignment = 1;  ///< rows; group starts of kExpert are multiples of it
  /// What the dispatch that follows will move: announced, so that ranks that disagree learn of it
  /// here.
  Dtype dtype = Dtype::kUnset;
  int32_t row_bytes = 0;
  int32_t scale_bytes = 0;
  bool weighted = false;  ///< with topk_weights
  bool host_sync = true;  ///< the host learns the counts; false: worst-case shapes, no host wait
  /// With host_sync, where caps().sends_ahead: route does not wait for the counts. The dispatch
  /// goes to memory of a guessed size, then Buffer::settle says the counts, and whether it fitted.
  /// Small batches (caps().small_batches) need room for the most that can be received, and a whole
  /// call. Alike on all ranks.
  bool ahead = false;
  PlanView plan;           ///< send block to fill
  void* stream = nullptr;  ///< cudaStream_t on GPU transports
};

/// Host-known numbers of a routing. -1 where host_sync was off.
struct RouteResult {
  uint64_t epoch = 0;            ///< of the route call, alike on all ranks; 0: plans not compared
  int32_t num_recv_tokens = -1;  ///< N
  int32_t num_recv_rows = -1;    ///< rows of the receive tensor in this layout
  std::vector<int32_t> tokens_per_expert;  ///< [L]; empty where unknown
  /// For transports that send a batch in pieces: [pieces, R source, R destination] tokens.
  std::vector<int32_t> chunk_count;
  /// route has only taken note of these expert ids: the first dispatch of the plan
  /// (DispatchArgs::replay false) fills its send block, and reads them.
  bool deferred = false;
  const void* topk_idx = nullptr;
  IndexType index_type = IndexType::kInt64;
  bool unsettled = false;  ///< RouteArgs::ahead: the numbers above come with Buffer::settle
};

/// Step 2, dispatch: rows to the ranks of their experts. Collective. A null pointer means "not
/// given", and ranks must agree on what is given: a rank without tokens passes any other address.
struct DispatchArgs {
  // What this rank sends.
  const void* x = nullptr;              ///< [num_tokens, row_bytes]
  const void* scales = nullptr;         ///< [num_tokens, scale_bytes], or null
  const float* topk_weights = nullptr;  ///< [num_tokens, topk], or null
  Dtype dtype = Dtype::kUnset;
  int32_t row_bytes = 0;
  int32_t scale_bytes = 0;  ///< 0 = no scales
  // Quantised on the way, where caps().fused_quants has it: x holds [num_tokens, hidden] of x_dtype
  // and there are no scales to send; dtype, row_bytes and scale_bytes say what arrives.
  Quant quant = Quant::kNone;
  Dtype x_dtype = Dtype::kUnset;
  const float* global_scale = nullptr;  ///< kNvfp4: [1]
  // Where it lands on this rank. Null recv_x with needed_bytes set = the window was full.
  void* recv_x = nullptr;       ///< [rows of the layout, row_bytes]
  void* recv_scales = nullptr;  ///< [rows of the layout, scale_bytes]
  /// Not null, where caps().column_scales: where scales are delivered column-major. Columns of
  /// 4-byte units are scale_column_bytes (a multiple of 16) apart: unit u of row i is at u *
  /// scale_column_bytes + 4 * i. In kPadded every expert has such a matrix of its own, of num_ranks
  /// * max_tokens rows, one after another. recv_scales is then memory that peers write before
  /// (where caps().symmetric_outputs), or unused.
  void* recv_scale_columns = nullptr;
  int64_t scale_column_bytes = 0;
  void* recv_topk_idx = nullptr;  ///< kToken: [N, K] local ids; kExpert: [rows] local id; -1 = none
  float* recv_topk_weights = nullptr;  ///< kToken: [N, K]; kExpert, kPadded: [rows]; 0 = none
  IndexType index_type = IndexType::kInt64;
  bool replay = false;        ///< recv_meta was filled by an earlier dispatch with this plan
  int32_t recv_capacity = 0;  ///< received tokens that recv_meta and outputs of kToken hold
                              ///< (unsettled plans: -1 = there is no memory at all)
  int32_t row_capacity = 0;   ///< rows that recv_x holds
  size_t needed_bytes = 0;
  size_t free_bytes = 0;
  // How.
  Phase phase = Phase::kAll;
  int32_t num_sms = 0;     ///< most SMs used; 0 = the transport's choice
  void* stream = nullptr;  ///< cudaStream_t on GPU transports
};

/// Step 3, combine: results back to the source ranks and summed. Collective.
struct CombineArgs {
  const void* x = nullptr;              ///< rows in the plan's layout
  const float* topk_weights = nullptr;  ///< [num_tokens, topk] on the source rank, or null
  const void* bias = nullptr;           ///< [num_tokens, hidden] of dtype, or null
  void* out = nullptr;                  ///< [num_tokens, hidden] of dtype
  Dtype dtype = Dtype::kUnset;          ///< kBfloat16, kFloat16 or kFloat32
  /// Partial rows cross as this, where caps().combine_quants has it; kNone: as dtype.
  Quant quant = Quant::kNone;
  int32_t hidden = 0;
  Phase phase = Phase::kAll;
  /// Floats per slot instead of rows of the layout: x is [N, hidden] with one row per received
  /// token, whatever the plan's layout; y[t] is the sum of its rows. dtype kFloat32, hidden = topk
  /// rounded up to a multiple of 4, no topk_weights.
  bool by_token = false;
  int32_t num_sms = 0;
  void* stream = nullptr;
};

}  // namespace epcomm

// Exchange: what ranks tell each other before rows move, and when they have moved.
//
// Buffers: entries and announcements go to the inboxes in the peers' windows; announced [R, words]
// is written from this rank's own inboxes.
// Launch: one block; a warp per peer.
// Memory order: kernels/link.cuh.
#include "kernels/launch.cuh"
#include "kernels/link.cuh"
#include "kernels/rows.cuh"

namespace epcomm {
namespace {

constexpr int kThreads = 512;

struct ExchangeArgs {
  LinkArgs link;
  const int32_t* announce;
  int32_t* announced;
  int32_t words;
};

__global__ void __launch_bounds__(kThreads, 1)
    exchange_kernel(const __grid_constant__ ExchangeArgs args) {
  EPCOMM_SHARED(LinkCall, call);
  const LinkArgs& link = args.link;
  if (link_enter(link, call, args.announce, args.words)) {
    for (int r = warp_index(); r < link.num_ranks; r += kThreads / kWarpSize)
      copy_words<uint4>(reinterpret_cast<char*>(args.announced + int64_t{r} * args.words),
                        link.window[link.rank] + link.control.counts(r, call.epoch),
                        args.words * 4);
  } else {
    // Nothing was told: no rank sends anything.
    for (int i = thread_index(); i < link.num_ranks * args.words; i += kThreads)
      args.announced[i] = 0;
  }
  link_finish(link, call);
}

__global__ void __launch_bounds__(kThreads, 1) enter_kernel(const __grid_constant__ LinkArgs link) {
  EPCOMM_SHARED(LinkCall, call);
  link_enter(link, call);
}

}  // namespace

void launch_exchange(const LinkArgs& link, const int32_t* announce, int32_t* announced, int words,
                     cudaStream_t stream) {
  launch("launch of exchange", exchange_kernel, {1, kThreads}, stream,
         ExchangeArgs{link, announce, announced, words});
}

void launch_enter(const LinkArgs& link, cudaStream_t stream) {
  launch("launch of enter", enter_kernel, {1, kThreads}, stream, link);
}

}  // namespace epcomm

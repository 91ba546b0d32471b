// Exchange: what ranks tell each other before rows move, and when they have moved.
//
// Buffers: entries and announcements go to the inboxes in the peers' windows; announced [R, words]
// is written from this rank's own inboxes.
// Launch: one block; a warp per peer.
// Memory order: kernels/link.cuh.
#pragma once

#include "kernels/launch.cuh"
#include "kernels/link.cuh"
#include "kernels/rows.cuh"
#include "kernels/small.h"

namespace epcomm {
namespace {

constexpr int kExchangeThreads = 512;

struct ExchangeArgs {
  LinkArgs link;
  const int32_t* announce;
  int32_t* announced;
  int32_t words;
};

template <class Link>
__global__ void __launch_bounds__(kExchangeThreads, 1)
    exchange_kernel(const __grid_constant__ ExchangeArgs args) {
  EPCOMM_SHARED(LinkCall, call);
  const LinkArgs& link = args.link;
  const bool entered = link_enter<Link>(link, call, args.announce, args.words);
  if (thread_index() == 0) {
    link.state->route_refused = !entered;
    // Ranks that wanted a small batch have staged rows here, which nobody takes.
    if (!entered) link.state->clean[call.epoch & 1] = 0;
  }
  if (entered) {
    for (int r = warp_index(); r < link.num_ranks; r += kExchangeThreads / kWarpSize)
      copy_words<uint4>(reinterpret_cast<char*>(args.announced + int64_t{r} * args.words),
                        link.window[link.rank] + link.control.counts(r, call.epoch),
                        args.words * 4);
  } else {
    // Nothing was told.
    for (int i = thread_index(); i < link.num_ranks * args.words; i += kExchangeThreads)
      args.announced[i] = 0;
  }
  link_finish<Link>(link, call);
}

}  // namespace

template <class Link>
void launch_exchange(const LinkArgs& link, const int32_t* announce, int32_t* announced, int words,
                     cudaStream_t stream) {
  launch("launch of exchange", exchange_kernel<Link>, {1, kExchangeThreads}, stream,
         ExchangeArgs{link, announce, announced, words});
}

}  // namespace epcomm

// Memory that a CUDA graph uses for as long as it may be replayed.
#pragma once

#include <memory>

namespace epcomm {

/// If stream (a cudaStream_t) is being captured, the graph, and every executable graph made of it,
/// keeps owner until it is destroyed; returns false, and keeps nothing, if it is not. Given back by
/// the next call of this function or of release_uncaptured(): a graph's end may come on a thread of
/// the driver, which must not call CUDA.
bool retain_in_capture(void* stream, std::shared_ptr<void> owner);

/// Gives back what graphs that are gone had kept.
void release_uncaptured();

}  // namespace epcomm

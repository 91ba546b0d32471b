"""The names of `deep_ep_cpp`, deep_ep's extension module, that old callers import."""

from .deep_ep import Config, EventHandle, topk_idx_t
from .deep_ep.buffers.legacy import Buffer
from .deep_ep.config import get_low_latency_rdma_size_hint

is_sm90_compiled = Buffer.is_sm90_compiled

__all__ = [
    "Config",
    "EventHandle",
    "get_low_latency_rdma_size_hint",
    "is_sm90_compiled",
    "topk_idx_t",
]

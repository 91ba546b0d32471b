"""The interface of `deep_ep` (https://github.com/deepseek-ai/DeepEP) on epcomm.

    from epcomm.compat.deep_ep import Buffer

For engines that import `deep_ep` itself see docs/engines.md.
"""

import torch

from ..._core import version as _version
from .buffers.elastic import ElasticBuffer, EPHandle
from .buffers.legacy import Buffer
from .config import Config
from .utils.envs import get_logical_domain_size, get_physical_domain_size
from .utils.event import EventHandle, EventOverlap

topk_idx_t = torch.int64
__version__ = f"2.1.0+epcomm.{_version}"

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "__version__",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "topk_idx_t",
]

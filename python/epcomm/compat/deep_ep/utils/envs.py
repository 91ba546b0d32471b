"""`deep_ep.utils.envs`: what callers ask of the machine."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

__all__ = ["check_nvlink_connections", "get_logical_domain_size", "get_physical_domain_size"]


def check_nvlink_connections(group: Any) -> None:
    """Nothing to check: epcomm also has transports for GPUs without NVLink."""


def get_physical_domain_size(group: dist.ProcessGroup) -> tuple[int, int]:
    """(nodes, ranks of a node): one node, since epcomm chooses its own ways."""
    return 1, dist.get_world_size(group)


def get_logical_domain_size(
    group: dist.ProcessGroup, allow_hybrid_mode: bool = True
) -> tuple[int, int]:
    """As get_physical_domain_size."""
    return get_physical_domain_size(group)

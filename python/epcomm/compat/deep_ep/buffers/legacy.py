"""deep_ep's V1 `Buffer`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ....checks import integer
from ..config import (
    Config,
    combine_config,
    dispatch_config,
    get_low_latency_rdma_size_hint,
)
from ..groups import Group
from ..low_latency import LowLatencyCalls
from ..masking import Masks
from ..normal import NormalCalls
from ..pool import Pool
from ..utils.event import EventOverlap, capture

__all__ = ["Buffer"]


class Buffer(NormalCalls, LowLatencyCalls):
    """The V1 interface of deep_ep on epcomm.

    Making one exchanges nothing: what a call needs is made by the first call of its shape. Only
    `group` and `comm` have an effect; the byte sizes are kept for callers that read them.

    Attributes:
        num_sms: most SMs of a normal call without a config; `set_num_sms` sets it for all.
        rank, group_size: of the group.
        group, num_nvl_bytes, num_rdma_bytes, low_latency_mode, explicitly_destroy,
            enable_shrink: as given.
    """

    num_sms: int = 20

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        *,
        enable_shrink: bool = False,
        comm: Any = None,
        use_fabric: bool = False,
        num_nvl_peers: int = 8,
    ) -> None:
        # Versions and forks of deep_ep disagree on what the ninth position is: by keyword only.
        self._pool = Pool(Group(group, comm))
        self.group = group
        self.rank = self._pool.group.rank
        self.group_size = self._pool.group.size
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self._masks = Masks(self.rank, self.group_size, enable_shrink)

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The stream that asynchronous calls run on. Others run on the caller's."""
        return self._pool.comm_stream()

    def destroy(self) -> None:
        """Gives back all memory. Local. Needs explicitly_destroy=True, as deep_ep's does."""
        if not self.explicitly_destroy:
            raise AssertionError("explicitly_destroy is False; make the Buffer with True")
        self._pool.destroy()

    @staticmethod
    def is_sm90_compiled() -> bool:
        """True: what deep_ep offers with kernels for sm_90 alone, epcomm offers everywhere."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Sets `Buffer.num_sms`; an even number."""
        if integer("new_num_sms", new_num_sms, 0, 1024) % 2 != 0:
            raise AssertionError(f"new_num_sms is {new_num_sms}; expected an even number")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event on the current stream."""
        return capture()

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """The bytes that deep_ep would need for num_rdma_bytes."""
        return get_low_latency_rdma_size_hint(
            num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts
        )

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """deep_ep's recommendation. AssertionError for a number of ranks that has none."""
        return dispatch_config(num_ranks, Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """deep_ep's recommendation. AssertionError for a number of ranks that has none."""
        return combine_config(num_ranks, Buffer.num_sms)

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """An empty tensor: epcomm has no communication memory that callers may read or write.

        Callers that clear it have nothing to clear.
        """
        if size is not None and size.numel() > 0:
            raise NotImplementedError(
                f"get_local_buffer_tensor(size={tuple(size)}) is not offered: epcomm has no "
                "communication memory of its callers"
            )
        device = "cuda" if torch.cuda.is_initialized() else "cpu"
        return torch.empty(0, dtype=dtype, device=device)

"""deep_ep's V2 `ElasticBuffer` and its handle."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ....buffer import Buffer as EpcommBuffer
from ....checks import integer
from ....events import Event
from ....results import Plan, Rows
from ....slots import rows_and_tokens
from ..finish import Finish
from ..groups import Group
from ..normal import Bias, combined, contiguous_rows, one_bias, rounded_up
from ..pool import Pool, Shape
from ..utils.event import EventHandle, EventOverlap, capture, epcomm_event, result_event

NUM_SMS = 24  # what get_theoretical_num_sms says: enough for epcomm to fill NVLink

__all__ = ["EPHandle", "ElasticBuffer"]


class EPHandle:
    """The routing of a dispatch. R = ranks, L = local experts, T = tokens, K = top-k.

    Attributes:
        do_expand, num_experts, expert_alignment, num_max_tokens_per_rank, num_sms: of the dispatch.
        topk_idx: [T, K], a copy.
        num_recv_tokens: received tokens; without a host wait the most possible.
        num_expanded_tokens: rows of the expanded layout, alignment included; else num_recv_tokens.
        num_recv_tokens_per_expert_list: counts rounded up to expert_alignment; [] without a host
            wait.
        num_unaligned_recv_tokens_per_expert: int32 [L].
        psum_num_recv_tokens_per_scaleup_rank: int32 [R], rows from ranks 0 to r; the last = all.
        psum_num_recv_tokens_per_expert: int32 [L], sums of the counts rounded up to
            expert_alignment; expanded: where each expert's rows end, so its own count is exact.
        recv_src_metadata: int32 [N, 2 + K]: source token, source rank, then the row of each slot of
            this rank in the received tensor, -1 = expert elsewhere.
        dst_buffer_slot_idx: None, as token_metadata_at_forward and channel_linked_list: deep_ep's
            own memory, which epcomm does not have.
    """

    def __init__(
        self,
        buffer: EpcommBuffer,
        plan: Plan,
        topk_idx: torch.Tensor,
        num_sms: int,
        num_max_tokens_per_rank: int,
        expert_alignment: int,
    ) -> None:
        self.buffer = buffer
        self.plan = plan
        self.do_expand = plan.layout == "expert"
        self.num_experts = buffer.num_experts
        self.expert_alignment = expert_alignment
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.num_sms = num_sms
        self.topk_idx = topk_idx
        synced = plan.num_recv_tokens is not None
        self.num_recv_tokens = plan.num_recv_tokens if synced else plan.recv_capacity
        self.num_expanded_tokens = plan.num_recv_rows if self.do_expand else self.num_recv_tokens
        counts = plan.native.tokens_per_expert if synced else []
        self.num_recv_tokens_per_expert_list = rounded_up(list(counts), expert_alignment)
        self.dst_buffer_slot_idx = None
        self.token_metadata_at_forward = None
        self.channel_linked_list = None

    @cached_property
    def num_unaligned_recv_tokens_per_expert(self) -> torch.Tensor:
        return self.plan.tokens_per_expert.clone()

    @cached_property
    def psum_num_recv_tokens_per_scaleup_rank(self) -> torch.Tensor:
        return self.plan.rank_count[:, self.buffer.rank].cumsum(0, dtype=torch.int32)

    @cached_property
    def psum_num_recv_tokens_per_expert(self) -> torch.Tensor:
        counts = self.plan.tokens_per_expert
        align = self.expert_alignment
        room = (counts + (align - 1)) // align * align
        ends = room.cumsum(0, dtype=torch.int32)
        return ends - room + counts if self.do_expand else ends

    @cached_property
    def recv_src_metadata(self) -> torch.Tensor:
        row, token = rows_and_tokens(self.plan)
        ends = self.psum_num_recv_tokens_per_scaleup_rank
        place = torch.arange(len(token), device=token.device, dtype=torch.int32)
        source = torch.searchsorted(ends, place, right=True, out_int32=True)
        return torch.cat([token.unsqueeze(1), source.unsqueeze(1), row], dim=1)


class ElasticBuffer:
    """The V2 interface of deep_ep on epcomm. Making one exchanges nothing.

    Of the arguments `group` and the timeouts have an effect (a wait for a peer takes at most
    num_gpu_timeout_secs), and num_max_tokens_per_rank where a dispatch does not give it. Sizes are
    kept for callers that read them; results are deterministic always.

    Attributes:
        group, num_bytes, num_max_tokens_per_rank: as given.
        rank_idx, num_ranks: of the group.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        self._pool = Pool(Group(group), float(num_gpu_timeout_secs))
        self.group = group
        self.rank_idx = self._pool.group.rank
        self.num_ranks = self._pool.group.size
        if num_bytes is None and num_max_tokens_per_rank > 0 and hidden > 0:
            num_bytes = self.get_buffer_size_hint(
                group, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch
            )
        self.num_bytes = num_bytes
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.explicitly_destroy = explicitly_destroy

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The stream that asynchronous calls run on. Others run on the caller's."""
        return self._pool.comm_stream()

    def destroy(self) -> None:
        """Gives back all memory. Local. Needs explicitly_destroy=True, as deep_ep's does."""
        if not self.explicitly_destroy:
            raise AssertionError("explicitly_destroy is False; make the ElasticBuffer with True")
        self._pool.destroy()

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes for the rows of one dispatch and one combine, with metadata; multiple of 2 MiB.

        epcomm's own estimate, not the number that deep_ep would say.
        """
        rows = dist.get_world_size(group) * num_max_tokens_per_rank
        row = hidden * (1 if use_fp8_dispatch else 2) + hidden * 2 + (num_topk or 32) * 12 + 64
        return -(-rows * row // 2**21) * 2**21

    @staticmethod
    def capture() -> EventHandle:
        """An event on the current stream."""
        event = capture().event
        assert event is not None
        return event

    def barrier(
        self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True
    ) -> None:
        """Returns when all ranks have called it. Waits on the host, whatever the arguments say."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._pool.barrier()

    def get_physical_domain_size(self) -> tuple[int, int]:
        """(nodes, ranks of a node): one node, since epcomm chooses its own ways."""
        return 1, self.num_ranks

    def get_logical_domain_size(self) -> tuple[int, int]:
        """As get_physical_domain_size."""
        return 1, self.num_ranks

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """A number of SMs that suffices; a constant."""
        return NUM_SMS

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """1: epcomm has no queue pairs to choose."""
        return 1

    def dispatch(
        self,
        x: Rows,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Rows, torch.Tensor | None, torch.Tensor | None, EPHandle, EventOverlap]:
        """Sends tokens to their experts. Collective.

        Args:
            x: bf16 [T, H], or a pair (float8_e4m3fn [T, H], scales [T, S] fp32 or int32).
            topk_idx, topk_weights: int64 and fp32 [T, K]; -1 = no expert; weights may be None.
            cumulative_local_expert_recv_stats: int32 [L], counts are added to it.
            num_experts: needed with topk_idx.
            num_max_tokens_per_rank: most tokens of any rank; None = the constructor's.
            expert_alignment: None = 1, or the handle's.
            num_sms: most SMs; 0 = get_theoretical_num_sms.
            previous_event, previous_event_before_epilogue: the work starts after both.
            async_with_compute_stream: the returned event marks completion.
            handle: of an earlier dispatch, to send other rows the same way.
            do_cpu_sync: the host learns the counts, so that shapes are exact. None = True without a
                handle. A handle keeps the shapes of its dispatch.
            do_expand: a row per (token, local expert), grouped by expert; else per (token, rank).
            do_zero_padding: clears the alignment rows of the expanded layout.
            use_tma_aligned_col_major_sf: received scales with stride 1 over rows, columns on
                multiples of 16 bytes.
            num_qps, allocate_on_comm_stream, do_handle_copy: no effect; epcomm always keeps a copy.

        Returns:
            (recv_x like x; recv_topk_idx [N, K] local ids or -1, None if expanded;
            recv_topk_weights [N, K], expanded [rows], None if there are none; handle; event).
        """
        x = contiguous_rows(x)
        rows = x[0] if isinstance(x, tuple) else x
        how: dict[str, Any] = {
            "async_op": async_with_compute_stream,
            "previous_event": _both(previous_event, previous_event_before_epilogue),
            "num_sms": num_sms or NUM_SMS,
        }
        if handle is not None:
            if topk_idx is not None or do_cpu_sync:
                raise ValueError(
                    "handle is given with topk_idx or do_cpu_sync; expected neither: its routing "
                    "and shapes are known"
                )
            recv = handle.buffer.dispatch(x, topk_weights=topk_weights, plan=handle.plan, **how)
        else:
            if topk_idx is None or num_experts is None:
                raise ValueError("topk_idx and num_experts are needed without a handle")
            alignment = integer("expert_alignment", expert_alignment or 1, 1)
            most = num_max_tokens_per_rank or self.num_max_tokens_per_rank
            buffer = self._buffer(rows, topk_idx, num_experts, most)
            recv = buffer.dispatch(
                x,
                topk_idx,
                topk_weights,
                layout="expert" if do_expand else "token",
                expert_alignment=alignment if do_expand else 1,
                host_sync=do_cpu_sync is not False,
                **how,
            )
            handle = EPHandle(buffer, recv.plan, topk_idx.clone(), how["num_sms"], most, alignment)
        finish = Finish(self._pool.stream_of(rows.device, async_with_compute_stream))
        recv_x = recv.x
        if do_zero_padding and handle.do_expand and recv.topk_idx is not None:
            finish.clear_padding(recv_x, recv.topk_idx)
        if isinstance(recv_x, tuple) and use_tma_aligned_col_major_sf:
            recv_x = recv_x[0], finish.column_major(recv_x[1])
        if cumulative_local_expert_recv_stats is not None:
            finish.add(cumulative_local_expert_recv_stats, recv.tokens_per_expert)
        event, _ = finish.after(recv, async_with_compute_stream)
        recv_topk_idx = None if handle.do_expand else recv.topk_idx
        return recv_x, recv_topk_idx, recv.topk_weights, handle, event

    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None = None,
        bias: Bias | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Sums rows, unweighted, on the rank of their token. Collective.

        Args:
            x: bf16, rows as dispatch returned them.
            topk_weights: fp32 in the shape of recv_topk_weights, returned per slot.
            bias: bf16 [T, H], or a pair, which is added up and rounded to bf16 first.

        Returns:
            (bf16 [T, H], fp32 [T, K] or None, event).
        """
        buffer, plan = handle.buffer, handle.plan
        how: dict[str, Any] = {
            "async_op": async_with_compute_stream,
            "previous_event": _both(previous_event, previous_event_before_epilogue),
            "num_sms": num_sms or handle.num_sms,
        }
        y, event = combined(buffer.combine(x, plan, bias=one_bias(bias), **how))
        y_weights = None
        if topk_weights is not None:
            every = plan.layout == "token"
            y_weights, event = combined(
                buffer.combine_topk_weights(topk_weights, plan, every_slot=every, **how)
            )
        return y, y_weights, result_event(event)

    # Steps.

    def _buffer(
        self, rows: torch.Tensor, topk_idx: torch.Tensor, num_experts: int, most: int
    ) -> EpcommBuffer:
        if num_experts % self.num_ranks != 0:
            raise ValueError(
                f"num_experts is {num_experts}; expected a multiple of {self.num_ranks} ranks"
            )
        if most < 1:
            raise ValueError("num_max_tokens_per_rank is given neither here nor to the constructor")
        if rows.shape[0] > most:
            raise ValueError(
                f"x has {rows.shape[0]} tokens; expected at most num_max_tokens_per_rank = {most}"
            )
        dtype = rows.dtype if rows.dtype in (torch.float16, torch.float32) else torch.bfloat16
        shape = Shape(
            rows.device, num_experts, rows.shape[1], topk_idx.shape[1], dtype, max_tokens=most
        )
        return self._pool.get(shape, rows.shape[0])


def _both(first: Any, second: Any) -> Event | None:
    """One event that stands for both: the current stream has waited for the first."""
    one, other = epcomm_event(first), epcomm_event(second)
    if one is None or other is None:
        return one or other
    one.wait()
    other.wait()
    return None


def _not_offered(name: str) -> Callable[..., NoReturn]:
    def method(self: ElasticBuffer, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"ElasticBuffer.{name} is not offered: epcomm moves tokens of MoE layers only"
        )

    method.__name__ = name
    method.__doc__ = "NotImplementedError: no part of expert parallelism."
    return method


for _name in (
    *("engram_write", "engram_fetch", "get_engram_storage_size_hint"),
    *("pp_set_config", "pp_send", "pp_recv", "get_pp_buffer_size_hint"),
    *("create_agrs_session", "destroy_agrs_session", "new_agrs_session", "agrs_set_config"),
    *("agrs_get_inplace_tensor", "all_gather", "get_agrs_buffer_size_hint"),
):
    setattr(ElasticBuffer, _name, _not_offered(_name))

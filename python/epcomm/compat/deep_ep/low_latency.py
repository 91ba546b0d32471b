"""Low-latency calls of deep_ep's V1 `Buffer`: layout "padded" of epcomm, no host wait."""

from __future__ import annotations

from typing import Any

import torch

from ...checks import integer
from ...errors import PeerLost
from ...results import Combined
from ...slots import rows_and_tokens
from .finish import Finish, Hook
from .handles import Handle, Routing, routing_of
from .masking import Masks, remapped
from .pool import Pool, Shape
from .utils.event import EventOverlap, result_event


def refuse_stats(name: str, value: torch.Tensor | None) -> None:
    """deep_ep adds up the cycles that a call waited for each source; epcomm keeps the longest."""
    if value is not None:
        raise NotImplementedError(
            f"{name} is not offered: epcomm measures the longest wait for each source, not a sum "
            "of cycles (epcomm.Buffer.statistics)"
        )


class LowLatencyCalls:
    """Mixed into `Buffer`. R = group_size, L = num_experts / R, M = tokens per rank."""

    group_size: int
    _pool: Pool
    _masks: Masks

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Nothing to clean: normal and low-latency calls share no memory here."""

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[
        torch.Tensor | tuple[torch.Tensor, torch.Tensor], torch.Tensor, Handle, EventOverlap, Hook
    ]:
        """Sends tokens to their experts, grouped by expert in a fixed shape. Collective.

        Args:
            x: bf16 [T, H], T at most num_max_dispatch_tokens_per_rank; with use_fp8 H a multiple of
                128, with use_ue8m0 of 512.
            topk_idx: int64 [T, K], -1 = no expert.
            num_max_dispatch_tokens_per_rank: M, the same on all ranks.
            cumulative_local_expert_recv_stats: int32 [L], counts are added to it.
            dispatch_wait_recv_cost_stats: NotImplementedError unless None.
            use_fp8: quantises to e4m3 with a scale per 128 channels.
            round_scale: scales are powers of two.
            use_ue8m0: the exponents of such scales, four to an int32; implies round_scale.
            async_finish: the returned event marks completion.
            return_recv_hook: nothing received may be read before hook() was called.

        Returns:
            (recv_x bf16 [L, R * M, H], or (float8_e4m3fn of that shape, scales fp32
            [L, R * M, H / 128] or int32 [L, R * M, H / 512], column-major in their last two
            dimensions); recv_count int32 [L]; handle (src_info, layout_range, M, H, num_experts);
            event; hook or None). In each expert's rows the first recv_count are valid, by source
            rank, then token.
        """
        refuse_stats("dispatch_wait_recv_cost_stats", dispatch_wait_recv_cost_stats)
        most = integer("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, 1)
        if x.dim() != 2 or x.shape[0] > most:
            raise ValueError(
                f"x has shape {list(x.shape)}; expected [num_tokens, hidden] with at most "
                f"num_max_dispatch_tokens_per_rank = {most} tokens"
            )
        if topk_idx.dim() != 2:
            raise ValueError(
                f"topk_idx has shape {list(topk_idx.shape)}; expected [num_tokens, num_topk]"
            )
        if integer("num_experts", num_experts, 1) % self.group_size != 0:
            raise ValueError(
                f"num_experts is {num_experts}; expected a multiple of {self.group_size} ranks"
            )
        members = self._masks.members()
        hidden = x.shape[1]
        width = 512 if use_ue8m0 else 128
        if use_fp8 and hidden % width != 0:
            raise ValueError(f"x has hidden {hidden}; expected a multiple of {width}")
        quant = None
        if use_fp8:
            quant = "fp8_ue8m0" if round_scale or use_ue8m0 else "fp8"
        local_experts, sent_idx, sent_most = num_experts // self.group_size, topk_idx, most
        if members:  # as many rows as the full group has, and the experts that are left
            sent_idx = remapped(topk_idx, members, local_experts)
            sent_most = -(-most * self.group_size // len(members))
        shape = Shape(
            x.device,
            local_experts * (len(members) or self.group_size),
            hidden,
            topk_idx.shape[1],
            x.dtype,
            max_tokens=sent_most,
            members=members,
        )
        buffer = self._pool.get(shape, x.shape[0])
        # Powers of two as floats, and the rows of a full group where some ranks are masked, are
        # made here from what arrives.
        powers = hidden // 128 if use_fp8 and round_scale and not use_ue8m0 else None
        arrives_whole = powers is None and not members
        try:
            recv = buffer.dispatch(
                x,
                sent_idx,
                layout="padded",
                quant=quant,
                scale_layout="column" if quant and arrives_whole else "row",
                host_sync=False,
                async_op=async_finish,
                return_recv_hook=return_recv_hook,
            )
        except PeerLost as error:
            self._lose(error.rank, members)
            raise

        finish = Finish(self._pool.stream_of(x.device, async_finish))
        recv_x = recv.x
        if not arrives_whole:
            recv_x = finish.first_rows(recv_x, self.group_size * most)
            if isinstance(recv_x, tuple):
                recv_x = recv_x[0], finish.column_major(recv_x[1], powers)
        if cumulative_local_expert_recv_stats is not None:
            finish.add(cumulative_local_expert_recv_stats, recv.tokens_per_expert)
        rows = self.group_size * most
        routing = Routing(buffer, recv.plan, num_experts, rows, topk_idx, members)
        handle = Handle(routing, _source_info, 2, (most, hidden, num_experts))
        event, hook = finish.after(recv, async_finish)
        return recv_x, recv.tokens_per_expert, handle, event, hook

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Hook]:
        """Sums rows, weighted, on the rank of their token. Collective.

        Args:
            x: bf16 [L, R * M, H]; rows from recv_count on are not looked at.
            topk_idx: as in the dispatch; -1 in it leaves a slot out.
            topk_weights: fp32 [T, K].
            use_logfmt: NotImplementedError if True.
            zero_copy: takes the rows from get_next_low_latency_combine_buffer(handle), not from x.
            out: bf16 [T, H], written and returned.
            combine_wait_recv_cost_stats: NotImplementedError unless None.
            async_finish, return_recv_hook: as in the dispatch.

        Returns:
            (bf16 [T, H], event, hook or None).
        """
        refuse_stats("combine_wait_recv_cost_stats", combine_wait_recv_cost_stats)
        if use_logfmt:
            raise NotImplementedError("use_logfmt is not offered: epcomm combines in bf16")
        routing = routing_of(handle)
        if zero_copy:
            if routing.combine_buffer is None:
                raise ValueError(
                    "zero_copy is True, but get_next_low_latency_combine_buffer was not called "
                    "with this handle"
                )
            x = routing.combine_buffer
        try:
            result = routing.buffer.combine(
                _with_rows(x, routing),
                routing.plan,
                topk_weights=_weights_of(topk_idx, topk_weights, routing),
                out=out,
                async_op=async_finish,
                return_recv_hook=return_recv_hook,
            )
        except PeerLost as error:
            self._lose(error.rank, routing.members)
            raise
        if not isinstance(result, Combined):
            return result, EventOverlap(), None
        return result.y, result_event(result.event if async_finish else None), result.hook

    def get_next_low_latency_combine_buffer(self, handle: tuple[Any, ...]) -> torch.Tensor:
        """bf16 [L, R * M, H], to be filled for low_latency_combine(zero_copy=True) of this handle.

        Kept with the handle.
        """
        routing = routing_of(handle)
        if routing.combine_buffer is None:
            tensor = routing.buffer.combine_input(routing.plan)
            # With masked ranks the Buffer's has a few rows more.
            routing.combine_buffer = tensor[:, : routing.recv_rows]
        return routing.combine_buffer

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Masks or unmasks a rank from the next low_latency_dispatch on. Local.

        All ranks that are left must say the same before that dispatch: they make a Buffer together.
        """
        self._masks.check_enabled()
        self._masks.set(integer("rank_to_mask", rank_to_mask), mask)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Writes 1 for every masked rank and 0 for the others into mask_status, int32 [R].

        Ranks that finished calls have lost count, too. Does not wait for calls that run.
        """
        self._masks.check_enabled()
        for rank, members in self._pool.losses():
            self._lose(rank, members)
        if mask_status.shape != (self.group_size,) or mask_status.dtype != torch.int32:
            raise ValueError(
                f"mask_status is {mask_status.dtype} {list(mask_status.shape)}; expected int32 "
                f"[{self.group_size}]"
            )
        mask_status.copy_(torch.tensor(self._masks.status(), dtype=torch.int32))

    def low_latency_clean_mask_buffer(self) -> None:
        """Unmasks all ranks. Local; see low_latency_update_mask_buffer."""
        self._masks.check_enabled()
        self._masks.clear()

    def _lose(self, rank: int, members: tuple[int, ...]) -> None:
        """A call over these ranks lost one of them: its Buffer is not used again."""
        self._masks.lose(rank, members)
        self._pool.forget(members)


def _with_rows(x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """x [L, R * M, H] with the rows of the Buffer, which has a few more if ranks are masked."""
    buffer = routing.buffer
    rows = buffer.num_ranks * buffer.max_tokens
    if rows == routing.recv_rows or x.dim() != 3 or x.shape[1] != routing.recv_rows:
        return x
    padded = x.new_empty((x.shape[0], rows, x.shape[2]))
    padded[:, : routing.recv_rows] = x
    return padded


def _weights_of(
    topk_idx: torch.Tensor, topk_weights: torch.Tensor, routing: Routing
) -> torch.Tensor:
    """topk_weights, 0 where topk_idx leaves out a slot that the dispatch had."""
    sent = routing.topk_idx
    if sent is None:
        raise ValueError("handle is of a normal dispatch; expected that of low_latency_dispatch")
    if topk_idx is sent or _same_memory(topk_idx, sent):
        return topk_weights
    if topk_idx.shape != sent.shape:
        raise ValueError(
            f"topk_idx has shape {list(topk_idx.shape)}; expected {list(sent.shape)}, as in the "
            "dispatch"
        )
    # Compared on the CPU only: on a GPU it would cost a host wait.
    if sent.device.type == "cpu" and not bool(((topk_idx == sent) | (topk_idx < 0)).all()):
        raise ValueError(
            "topk_idx names other experts than in the dispatch; expected the same, or -1"
        )
    return torch.where(topk_idx >= 0, topk_weights, 0.0)


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Are these views of the same elements? Callers pass a reshaped topk_idx now and then."""
    kinds = ((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in (one, other))
    return next(kinds) == next(kinds)


def _source_info(routing: Routing) -> tuple[torch.Tensor, ...]:
    """src_info int32 [L, R * M], token on its source rank (-1 = no row); layout_range int64 [L, R]:
    rows from each source in the low 32 bits, the first of them in the high 32.
    """
    buffer, plan = routing.buffer, routing.plan
    experts = buffer.local_experts
    per_expert = buffer.num_ranks * buffer.max_tokens
    rows = experts * per_expert
    row, token = rows_and_tokens(plan)
    # One more place, for slots without a row.
    at = torch.where(row >= 0, row, rows).long()
    source = torch.full((rows + 1,), -1, dtype=torch.int32, device=row.device)
    source[at] = token.unsqueeze(1).expand_as(at)
    first = buffer.rank * experts
    counts = plan.expert_count[:, first : first + experts].t().long()
    begins = counts.cumsum(1) - counts
    ranges = (begins << 32) | counts
    if routing.members:  # masked ranks have sent nothing
        size = routing.num_experts // experts
        all_ranges = torch.zeros(experts, size, dtype=torch.int64, device=row.device)
        all_ranges[:, list(routing.members)] = ranges
        ranges = all_ranges
    return source[:rows].view(experts, per_expert)[:, : routing.recv_rows], ranges

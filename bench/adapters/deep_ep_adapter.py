"""DeepEP V1, where it is installed.

Its normal kernels serve the token layout, its low-latency kernels the padded one.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from adapters.base import Adapter, Operation, Options, Unavailable, captured, spoil
from workload import Placement, Workload, source_factor

DEFAULT_NUM_SMS = 24  # what DeepEP's own tests use between the GPUs of one node


class DeepEpAdapter(Adapter):
    takes_num_sms = True
    transport = "nvlink"

    def __init__(self, workload: Workload, options: Options):
        self._workload = workload
        self._launches = options.launches
        self.layout = workload.config.layout
        self._refuse_unless_able(options)
        self._max_tokens = workload.tokens
        self._buffer: Any = None
        if self.layout == "padded":
            self._make_low_latency_buffer()
        else:
            self.num_sms = options.num_sms or DEFAULT_NUM_SMS
            self._make_normal_buffer()

    def _refuse_unless_able(self, options: Options) -> None:
        config, routing = self._workload.config, self._workload.routing
        self._deep_ep = self._library(options)
        if self.layout == "expert":
            raise Unavailable("DeepEP V1 has no expert layout")
        if config.dtype not in ("bf16", "fp8"):
            raise Unavailable(f"DeepEP V1 moves bf16 and fp8, not {config.dtype}")
        if routing.num_ranks not in (2, 4, 8) or routing.num_experts % routing.num_ranks:
            raise Unavailable(
                "set up for 2, 4 or 8 ranks of one node with equally many experts each"
            )
        if config.quant and (self.layout != "padded" or config.quant == "nvfp4"):
            raise Unavailable("DeepEP V1 quantises to fp8, in its low-latency kernels (padded)")
        if config.dtype == "fp8" and self.layout == "padded":
            raise Unavailable("DeepEP V1's low-latency kernels take bf16; ask for --quant fp8")
        if options.launches == ("graph",) and self.layout != "padded":
            raise Unavailable("of DeepEP V1 only the low-latency kernels (padded) are captured")

    def _library(self, options: Options) -> ModuleType:
        """The module with DeepEP's interface. Raises Unavailable if it cannot run here."""
        if self._workload.config.device.type != "cuda":
            raise Unavailable("DeepEP needs a GPU")
        try:
            import deep_ep
        except ImportError as error:
            raise Unavailable(f"import deep_ep failed: {error}") from error
        return deep_ep

    def _make_normal_buffer(self) -> None:
        buffer_class, num_ranks = self._deep_ep.Buffer, self._workload.routing.num_ranks
        buffer_class.set_num_sms(self.num_sms)
        row_bytes = self._workload.row_bytes("combine")
        configs = (
            buffer_class.get_dispatch_config(num_ranks),
            buffer_class.get_combine_config(num_ranks),
        )
        num_bytes = max(c.get_nvl_buffer_size_hint(row_bytes, num_ranks) for c in configs)
        self._buffer = buffer_class(dist.group.WORLD, num_bytes, 0, explicitly_destroy=True)

    def _make_low_latency_buffer(self) -> None:
        buffer_class, routing = self._deep_ep.Buffer, self._workload.routing
        num_bytes = buffer_class.get_low_latency_rdma_size_hint(
            self._max_tokens, self._workload.config.hidden, routing.num_ranks, routing.num_experts
        )
        self._buffer = buffer_class(
            dist.group.WORLD,
            0,
            num_bytes,
            low_latency_mode=True,
            num_qps_per_rank=routing.num_experts // routing.num_ranks,
            explicitly_destroy=True,
        )

    def close(self) -> None:
        dist.barrier()  # a rank that unmaps early would fault a peer
        self._buffer.destroy()

    def operations(self) -> Iterator[Operation]:
        yield from self._low_latency() if self.layout == "padded" else self._normal()

    # Normal kernels: rows by source rank, then token, as in epcomm's token layout.

    def _normal(self) -> Iterator[Operation]:
        workload, buffer = self._workload, self._buffer
        payload = workload.x if workload.scales is None else (workload.x, workload.scales)

        def fresh() -> tuple:
            per_rank, per_rdma_rank, per_expert, in_rank, _ = buffer.get_dispatch_layout(
                workload.topk_idx, workload.routing.num_experts
            )
            return buffer.dispatch(
                payload,
                topk_idx=workload.topk_idx,
                topk_weights=workload.topk_weights,
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_rdma_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
            )

        first = fresh()
        handle = first[4]
        received = first[0][0] if workload.num_scales else first[0]
        expert_output = workload.expert_output(received.shape)

        def wrong_dispatch(result: tuple) -> int:
            x, scales = result[0] if workload.num_scales else (result[0], None)
            wrong = workload.wrong_received(x, scales, workload.received)
            spoil(x, scales)
            return wrong

        def wrong_combine(result: tuple) -> int:
            wrong = workload.wrong_elements(result[0], workload.combined())
            spoil(result[0])
            return wrong

        def replay() -> tuple:
            return buffer.dispatch(payload, handle=handle)

        def combine() -> tuple:
            return buffer.combine(expert_output, handle)

        def pair() -> tuple:
            return buffer.combine(expert_output, fresh()[4])

        def pair_again() -> tuple:
            replay()
            return combine()

        yield Operation("dispatch", "fresh", fresh, wrong_dispatch)
        yield Operation("dispatch", "replay", replay, wrong_dispatch)
        yield Operation("combine", "replay", combine, wrong_combine)
        yield Operation("pair", "fresh", pair, wrong_combine)
        yield Operation("pair", "replay", pair_again, wrong_combine)

    # Low-latency kernels: rows of one expert lie in the order in which sources arrived.

    def _low_latency(self) -> Iterator[Operation]:
        workload, buffer = self._workload, self._buffer
        # Power-of-two scales where ue8m0 is asked for; they are not packed here.
        quant = workload.config.quant
        x = workload.rows(workload.own_ids, torch.bfloat16)
        weights = torch.ones_like(workload.topk_weights)

        def dispatch() -> tuple:
            return buffer.low_latency_dispatch(
                x,
                workload.topk_idx,
                self._max_tokens,
                workload.routing.num_experts,
                use_fp8=quant is not None,
                round_scale=quant == "fp8_ue8m0",
            )

        first = dispatch()
        handle = first[2]
        arrived = self._arrived(handle)
        shape = (first[0][0] if quant else first[0]).shape
        expert_output = torch.zeros(shape, dtype=torch.bfloat16, device=x.device)
        rows = workload.rows(arrived.ids, torch.bfloat16) * arrived.factors[:, None]
        expert_output.view(-1, shape[-1])[arrived.positions] = rows.to(torch.bfloat16)

        def combine() -> tuple:
            return buffer.low_latency_combine(expert_output, workload.topk_idx, weights, handle)

        # Rows of ones: each dispatch places rows as they come, so a chained combine cannot be given
        # what belongs there without a look at the handle.
        ones = torch.ones_like(expert_output)

        def pair() -> tuple:
            handle = dispatch()[2]
            return buffer.low_latency_combine(ones, workload.topk_idx, weights, handle)

        def wrong_dispatch(result: tuple) -> int:
            at = self._arrived(result[2])
            if quant:
                # Scales lie column-major: [experts, rows, groups] by their strides.
                wrong = workload.wrong_quantised(*result[0], None, at)
                spoil(*result[0])
            else:
                got = result[0].reshape(-1, shape[-1])[at.positions]
                wrong = workload.wrong_elements(got, workload.rows(at.ids, torch.bfloat16))
                spoil(result[0])
            return wrong + self._wrong_ids(at)

        def wrong_combine(result: tuple) -> int:
            wrong = workload.wrong_elements(result[0], workload.combined())
            spoil(result[0])
            return wrong

        def wrong_pair(result: tuple) -> int:
            experts = (workload.topk_idx >= 0).sum(1, keepdim=True).to(torch.bfloat16)
            wrong = workload.wrong_elements(result[0], experts.expand_as(result[0]))
            spoil(result[0])
            return wrong

        if "eager" in self._launches:
            yield Operation("dispatch", "fresh", dispatch, wrong_dispatch)
            yield Operation("combine", "replay", combine, wrong_combine)
            yield Operation("pair", "fresh", pair, wrong_pair)
        if "graph" in self._launches:  # one at a time: each keeps memory for its results
            yield Operation("dispatch", "graph", captured(dispatch), wrong_dispatch)
            yield Operation("combine", "graph", captured(combine), wrong_combine)
            yield Operation("pair", "graph", captured(pair), wrong_pair)

    def _arrived(self, handle: tuple) -> Placement:
        """Where rows lie, by what DeepEP says of them in its handle."""
        source_token, ranges = handle[0].cpu().numpy(), handle[1].cpu().numpy()
        rows_per_expert = source_token.shape[1]
        experts = self._workload.routing.local_experts(self._workload.rank)
        positions, ids, factors = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], []
        for index, expert in enumerate(experts):
            for source, packed in enumerate(ranges[index]):
                count, begin = int(packed) & 0xFFFFFFFF, int(packed) >> 32
                tokens = source_token[index, begin : begin + count].astype(np.int64)
                positions.append(np.arange(begin, begin + count) + index * rows_per_expert)
                ids.append(tokens + source * self._workload.tokens)
                factors.append(np.full(count, source_factor(expert)))
        device = self._workload.config.device
        return Placement(
            *(torch.from_numpy(np.concatenate(p)).to(device) for p in (positions, ids, factors))
        )

    def _wrong_ids(self, at: Placement) -> int:
        """Tokens that an expert should have and has not, or has and should not."""
        rows_per_expert = self._workload.routing.num_ranks * self._max_tokens
        expected = self._workload.received
        got, want = (
            set(zip((p.positions // rows_per_expert).tolist(), p.ids.tolist(), strict=True))
            for p in (at, expected)
        )
        return len(got ^ want)

"""epcomm itself, by its public API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from adapters.base import Adapter, Operation, Options, Unavailable, captured, spoil
from overlap import Started
from workload import Workload


class EpcommAdapter(Adapter):
    takes_transport = True
    takes_num_sms = True

    def __init__(self, workload: Workload, options: Options):
        try:
            import epcomm
        except ImportError as error:
            raise Unavailable(f"import epcomm failed: {error}") from error
        self._workload = workload
        self._options = options
        self.num_sms, self.ranks_per_node = options.num_sms, options.ranks_per_node
        self._graph = "graph" in options.launches
        self.layout = workload.config.layout
        self._buffer = epcomm.Buffer(
            num_experts=workload.routing.num_experts,
            hidden=workload.config.hidden,
            topk=workload.routing.topk,
            max_tokens=workload.tokens,
            dtype=workload.combine_dtype,
            transport=options.transport,
            ranks_per_node=options.ranks_per_node,
            timeout=options.timeout,
            transport_options=options.transport_options,
        )
        self.transport = self._buffer.transport
        self._refuse_unless_able()
        if options.transport_options:
            chosen = ",".join(f"{k}={v}" for k, v in options.transport_options.items())
            self.transport += f":{chosen}"

    def _refuse_unless_able(self) -> None:
        caps, device = self._buffer.caps, self._workload.config.device
        reason = None
        if self._options.transport not in ("auto", self.transport):
            raise RuntimeError(f"asked for {self._options.transport}, but {self.transport} ran")
        if caps.cuda != (device.type == "cuda"):
            reason = (
                f"moves {'CUDA' if caps.cuda else 'CPU'} tensors, the bench runs on {device.type}"
            )
        elif not getattr(caps, f"{self.layout}_layout"):
            reason = f"has no {self.layout} layout"
        elif "graph" in self._options.launches and not caps.graph_capture:
            self._graph = False
            self.left_out = f"transport {self.transport} cannot be captured into a CUDA graph"
            if "eager" not in self._options.launches:
                reason = "cannot be captured into a CUDA graph"
        if reason:
            self.close()
            raise Unavailable(f"transport {self.transport} {reason}")

    def close(self) -> None:
        self._buffer.destroy()

    def operations(self) -> Iterator[Operation]:
        """Graphs are captured one at a time: each keeps memory for its results."""
        caps = self._buffer.caps
        if "eager" in self._options.launches:
            calls = self._calls(host_sync=True)
            yield Operation("dispatch", "fresh", calls.fresh, self._wrong_dispatch)
            yield Operation("dispatch", "replay", calls.replay, self._wrong_rows)
            yield Operation("combine", "replay", calls.combine, self._wrong_combine)
            yield Operation("pair", "fresh", calls.pair, self._wrong_combine)
            yield Operation("pair", "replay", calls.pair_again, self._wrong_combine)
            if caps.cuda and caps.symmetric_outputs and not self._options.like_deep_ep:
                elsewhere = calls.combine_elsewhere
                yield Operation("combine", "elsewhere", elsewhere, self._wrong_combine)
            del calls
            if caps.cuda:  # elsewhere nothing is waited for anyway
                calls = self._calls(host_sync=False)
                yield Operation("dispatch", "no-sync", calls.fresh, self._wrong_dispatch)
                yield Operation("pair", "no-sync", calls.pair, self._wrong_combine)
        if self._graph:
            calls = self._calls(host_sync=False)
            yield Operation("dispatch", "graph", captured(calls.fresh), self._wrong_dispatch)
            yield Operation("dispatch", "graph-replay", captured(calls.replay), self._wrong_rows)
            yield Operation("combine", "graph", captured(calls.combine), self._wrong_combine)
            yield Operation("pair", "graph", captured(calls.pair), self._wrong_combine)

    def overlapped(self) -> list[tuple[str, Callable[[], Started], Callable[[Any], int]]]:
        """Calls on the communication stream: operation, what starts one, and its check."""
        calls, buffer = self._calls(host_sync=True), self._buffer

        def dispatch() -> Started:
            recv = buffer.dispatch(
                calls.payload, plan=calls.plan, num_sms=self.num_sms, async_op=True, **calls.quant
            )
            return Started(recv, recv.event.wait)

        def combine() -> Started:
            combined = buffer.combine(
                calls.expert_output,
                calls.plan,
                out=calls.out,
                num_sms=self.num_sms,
                async_op=True,
            )
            return Started(combined.y, combined.event.wait)

        return [
            ("dispatch", dispatch, self._wrong_rows),
            ("combine", combine, self._wrong_combine),
        ]

    def _calls(self, host_sync: bool) -> _Calls:
        return _Calls(self._workload, self._buffer, self._options, host_sync)

    def _wrong_rows(self, recv: Any) -> int:
        x, scales = recv.x if isinstance(recv.x, tuple) else (recv.x, None)
        at = self._workload.received
        if self._workload.config.quant:
            wrong = self._workload.wrong_quantised(x, scales, recv.global_scale, at)
        else:
            wrong = self._workload.wrong_received(x, scales, at)
        spoil(x, scales)
        return wrong

    def _wrong_dispatch(self, recv: Any) -> int:
        counts = recv.tokens_per_expert.tolist()
        expected = self._workload.tokens_per_expert()
        num_tokens = len(self._workload.received_by_token().ids)
        return (
            self._wrong_rows(recv)
            + sum(got != want for got, want in zip(counts, expected, strict=True))
            + int(recv.num_tokens.item() != num_tokens)
        )

    def _wrong_combine(self, out: torch.Tensor) -> int:
        wrong = self._workload.wrong_elements(out, self._workload.combined())
        out.fill_(float("nan"))  # the next call must write every element again
        return wrong


class _Calls:
    """The calls that are timed, on one plan."""

    def __init__(self, workload: Workload, buffer: Any, options: Options, host_sync: bool):
        self._workload, self._buffer, self._num_sms = workload, buffer, options.num_sms
        self._host_sync = host_sync
        self._sent_weights: torch.Tensor | None = workload.topk_weights
        self._sum_weights: torch.Tensor | None = None
        self.quant: dict[str, Any] = {"quant": workload.config.quant}
        if options.like_deep_ep and workload.config.layout == "padded":
            self._sent_weights, self._sum_weights = None, torch.ones_like(workload.topk_weights)
            if workload.config.quant:
                self.quant["scale_layout"] = "column"
        x = workload.x
        self.payload = x if workload.scales is None else (x, workload.scales)
        first = self.fresh()
        self.plan = first.plan
        # Experts that write into memory of the Buffer, and experts that know nothing of it.
        rows = first.x[0] if isinstance(first.x, tuple) else first.x
        shape = (*rows.shape[:-1], workload.config.hidden)
        self._elsewhere = workload.expert_output(torch.Size(shape))
        self.expert_output = self._elsewhere
        self.out: torch.Tensor | None = None  # as made by the call
        if not options.like_deep_ep:
            self.expert_output = buffer.combine_input(self.plan, self._elsewhere.dtype)
            self.expert_output.copy_(self._elsewhere)
            self.out = torch.full_like(workload.combined(), float("nan"))

    def fresh(self) -> Any:
        return self._buffer.dispatch(
            self.payload,
            self._workload.topk_idx,
            self._sent_weights,
            layout=self._workload.config.layout,
            expert_alignment=self._workload.config.expert_alignment,
            host_sync=self._host_sync,
            num_sms=self._num_sms,
            **self.quant,
        )

    def replay(self) -> Any:
        return self._buffer.dispatch(
            self.payload, plan=self.plan, num_sms=self._num_sms, **self.quant
        )

    def combine(self) -> torch.Tensor:
        return self._combine(self.expert_output, self.plan)

    def combine_elsewhere(self) -> torch.Tensor:
        return self._combine(self._elsewhere, self.plan)

    # A dispatch and its combine, as one layer after the other would call them.

    def pair(self) -> torch.Tensor:
        return self._combine(self.expert_output, self.fresh().plan)

    def pair_again(self) -> torch.Tensor:
        self.replay()
        return self.combine()

    def _combine(self, x: torch.Tensor, plan: Any) -> torch.Tensor:
        return self._buffer.combine(
            x, plan, topk_weights=self._sum_weights, out=self.out, num_sms=self._num_sms
        )

"""epcomm itself, by its public API."""

from __future__ import annotations

from typing import Any

import torch

from adapters.base import Adapter, Operation, Options, Unavailable, captured
from workload import Workload


class EpcommAdapter(Adapter):
    takes_num_sms = True

    def __init__(self, workload: Workload, options: Options):
        try:
            import epcomm
        except ImportError as error:
            raise Unavailable(f"import epcomm failed: {error}") from error
        self._workload = workload
        self._options = options
        self.num_sms = options.num_sms
        self.layout = workload.config.layout
        self._buffer = epcomm.Buffer(
            num_experts=workload.routing.num_experts,
            hidden=workload.config.hidden,
            topk=workload.routing.topk,
            max_tokens=workload.tokens,
            dtype=workload.combine_dtype,
            transport=options.transport,
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
        elif self._options.graph and not caps.graph_capture:
            reason = "cannot be captured into a CUDA graph"
        if reason:
            self.close()
            raise Unavailable(f"transport {self.transport} {reason}")

    def close(self) -> None:
        self._buffer.destroy()

    def operations(self) -> list[Operation]:
        x = self._workload.x
        payload = x if self._workload.scales is None else (x, self._workload.scales)
        host_sync = not self._options.graph

        def fresh() -> Any:
            return self._buffer.dispatch(
                payload,
                self._workload.topk_idx,
                self._workload.topk_weights,
                layout=self.layout,
                expert_alignment=self._workload.config.expert_alignment,
                host_sync=host_sync,
                num_sms=self.num_sms,
            )

        first = fresh()
        plan = first.plan
        # Experts that write into memory of the Buffer, and experts that know nothing of it.
        elsewhere = self._workload.expert_output(self._rows(first)[0].shape)
        expert_output = self._buffer.combine_input(plan, elsewhere.dtype)
        expert_output.copy_(elsewhere)
        out = torch.full_like(self._workload.combined(), float("nan"))
        del first

        def replay() -> Any:
            return self._buffer.dispatch(payload, plan=plan, num_sms=self.num_sms)

        def combine() -> torch.Tensor:
            return self._buffer.combine(expert_output, plan, out=out, num_sms=self.num_sms)

        def combine_elsewhere() -> torch.Tensor:
            return self._buffer.combine(elsewhere, plan, out=out, num_sms=self.num_sms)

        def pair() -> torch.Tensor:
            received = fresh()
            return self._buffer.combine(expert_output, received.plan, out=out, num_sms=self.num_sms)

        if self._options.graph:
            return [
                Operation("dispatch", "graph", captured(fresh), self._wrong_dispatch),
                Operation("combine", "graph", captured(combine), self._wrong_combine),
                Operation("pair", "graph", captured(pair), self._wrong_combine),
            ]
        operations = [
            Operation("dispatch", "fresh", fresh, self._wrong_dispatch),
            Operation("dispatch", "replay", replay, self._wrong_rows),
            Operation("combine", "replay", combine, self._wrong_combine),
        ]
        if self._buffer.caps.cuda and self._buffer.caps.symmetric_outputs:
            operations.append(
                Operation("combine", "elsewhere", combine_elsewhere, self._wrong_combine)
            )
        return operations

    @staticmethod
    def _rows(recv: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        return recv.x if isinstance(recv.x, tuple) else (recv.x, None)

    def _wrong_rows(self, recv: Any) -> int:
        x, scales = self._rows(recv)
        wrong = self._workload.wrong_received(x, scales, self._workload.received)
        for rows in (x, scales):
            if rows is not None:  # the next call may get this memory, and must write it again
                rows.view(torch.uint8).fill_(0xFF)
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

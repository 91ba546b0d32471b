"""torch.distributed.all_to_all_single of the same rows, already packed by destination rank.

The plainest baseline: no routing, counting, packing or reduction is timed, just the rows.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from adapters.base import Adapter, Operation, Options, Unavailable, captured
from workload import Workload


class TorchAdapter(Adapter):
    layout = "token"  # rows arrive by source rank, then token

    def __init__(self, workload: Workload, options: Options):
        if workload.config.quant:
            raise Unavailable("torch.distributed quantises nothing")
        self._workload = workload
        self._launches = options.launches
        self.transport = "gloo" if workload.config.device.type == "cpu" else "nccl"

    def operations(self) -> list[Operation]:
        dispatch, combine = self._dispatch(), self._combine()

        def both() -> tuple[torch.Tensor, torch.Tensor]:
            return dispatch.call(), combine.call()

        def wrong(received: tuple[torch.Tensor, torch.Tensor]) -> int:
            return dispatch.wrong(received[0]) + combine.wrong(received[1])

        calls = [dispatch, combine, Operation("pair", "packed", both, wrong)]
        timed = calls if "eager" in self._launches else []
        if "graph" in self._launches:
            timed = timed + [
                dataclasses.replace(one, routing_mode="graph", call=captured(one.call))
                for one in calls
            ]
        return timed

    def _dispatch(self) -> Operation:
        workload = self._workload
        ids = workload.packed().ids
        rows = workload.rows(ids, workload.dtype).view(torch.uint8)
        scales = workload.scale_rows(ids).view(torch.uint8) if workload.num_scales else None
        # Scales travel behind their row, so that one all-to-all moves both.
        packed = rows if scales is None else torch.cat([rows, scales], dim=1)
        arrived = workload.received_by_token()

        def wrong(received: torch.Tensor) -> int:
            if len(received) != len(arrived.ids):
                return max(received.numel(), 1)
            split = rows.shape[1]
            x = received[:, :split].contiguous().view(workload.dtype)
            got = (
                received[:, split:].contiguous().view(torch.float32)
                if workload.num_scales
                else None
            )
            wrong = workload.wrong_received(x, got, arrived)
            received.fill_(0xFF)  # the next call must write every byte again
            return wrong

        return self._operation("dispatch", packed, wrong)

    def _combine(self) -> Operation:
        workload = self._workload
        dtype = workload.combine_dtype
        arrived, packed = workload.received_by_token(), workload.packed()
        outputs = (workload.rows(arrived.ids, dtype) * arrived.factors[:, None]).to(dtype)

        def wrong(received: torch.Tensor) -> int:
            expected = (workload.rows(packed.ids, dtype) * packed.factors[:, None]).to(dtype)
            wrong = workload.wrong_elements(received.view(dtype), expected)
            received.fill_(0xFF)
            return wrong

        return self._operation("combine", outputs.view(torch.uint8), wrong)

    def _operation(self, operation: str, send: torch.Tensor, wrong) -> Operation:
        rows = self._workload.rows_between(operation)
        send_sizes = rows[self._workload.rank].tolist()
        recv_sizes = rows[:, self._workload.rank].tolist()
        recv = send.new_empty(sum(recv_sizes), send.shape[1])

        def call() -> torch.Tensor:
            dist.all_to_all_single(recv, send, recv_sizes, send_sizes)
            return recv

        return Operation(operation, "packed", call, wrong)

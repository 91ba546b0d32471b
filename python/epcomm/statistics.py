"""Counters that the calls of one Buffer add to."""

from __future__ import annotations

from typing import Any

import torch

from .results import Statistics


class Counters:
    """Memory on the Buffer's device that its calls count in; graphs count in it at every replay.

    Must live as long as the native Buffer. What the transport does not offer is not counted.
    """

    def __init__(self, native: Any, device: torch.device) -> None:
        self._received = self._wait_ns = None
        if native.caps.received_tokens:
            self._received = torch.zeros(native.local_experts, dtype=torch.int64, device=device)
        if native.caps.wait_times:
            self._wait_ns = torch.zeros(native.num_ranks, dtype=torch.int64, device=device)
        if device.type == "cuda":  # calls on other streams add to them
            torch.cuda.current_stream(device).synchronize()
        native.set_statistics(*(0 if t is None else t.data_ptr() for t in self._all()))

    def _all(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self._received, self._wait_ns

    def read(self, reset: bool) -> Statistics:
        """What the calls have counted that the current stream has waited for."""
        received = None if self._received is None else self._received.clone()
        waits = None if self._wait_ns is None else self._wait_ns / 1000
        if reset:
            for counter in self._all():
                if counter is not None:
                    counter.zero_()
        return Statistics(received, waits)

"""Events that order work after a call, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Event:
    """Marks the completion of a call's work.

    On the CPU a call is complete when it returns, and so is its event. On a GPU it wraps a
    `torch.cuda.Event` recorded on the stream that the call ran on.
    """

    def __init__(
        self,
        cuda_event: torch.cuda.Event | None = None,
        keep_alive: tuple[torch.Tensor, ...] = (),
        check: Callable[[], None] | None = None,
    ) -> None:
        self._cuda_event = cuda_event
        self._keep_alive = keep_alive
        self._check = check

    def wait(self, stream: torch.cuda.Stream | None = None) -> None:
        """Orders later work of `stream` (None = the current one) after the event. No host wait."""
        if self._cuda_event is not None:
            self._cuda_event.wait(stream)

    def record(self, stream: torch.cuda.Stream) -> None:
        """Marks what is in the stream so far instead. For the Buffer, not for its callers."""
        if self._cuda_event is not None:
            self._cuda_event.record(stream)

    def query(self) -> bool:
        """True if the work is complete."""
        return self._cuda_event is None or bool(self._cuda_event.query())

    def synchronize(self) -> None:
        """Blocks the host until the work is complete. `PeerLost` if a peer cut it short."""
        if self._cuda_event is not None:
            self._cuda_event.synchronize()
        if self._check is not None:
            self._check()

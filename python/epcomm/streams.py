"""Where a call's work runs, and how it is ordered with the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from .events import Event


class CallOrder:
    """The streams of a Buffer.

    A call runs on the caller's current stream, or, with async_op or a hook, on the Buffer's own
    communication stream, which starts after the caller's stream (or after previous_event) and which
    the caller joins by the event. On the CPU a call is complete when it returns.

    Args:
        device: of the Buffer's tensors.
        check: raises what the transport has to report; called after a host wait.
    """

    def __init__(self, device: torch.device, check: Callable[[], None]) -> None:
        self._device = device
        self._check = check
        self._own = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def begin(self, own_stream: bool, previous_event: Event | None) -> torch.cuda.Stream | None:
        """Orders the call after what must come before; returns its stream, None on the CPU."""
        if self._own is None:
            if previous_event is not None:
                previous_event.synchronize()
            return None
        current = torch.cuda.current_stream(self._device)
        stream = self._own if own_stream else current
        if previous_event is not None:
            previous_event.wait(stream)
        elif own_stream:
            stream.wait_stream(current)
        return stream

    def end(
        self, stream: torch.cuda.Stream | None, tensors: Iterable[torch.Tensor | None]
    ) -> Event:
        """The event of the call's completion; keeps `tensors` from being reused before it."""
        if stream is None:
            return Event()
        keep: tuple[torch.Tensor, ...] = ()
        if stream == self._own:
            used = tuple(t for t in tensors if t is not None)
            if torch.cuda.is_current_stream_capturing():
                keep = used  # recording a stream on a tensor is not possible in a graph's pool
            else:
                for t in used:
                    t.record_stream(stream)
        event = torch.cuda.Event()
        event.record(stream)
        return Event(event, keep, self._check)

"""Where a call's work runs, and how it is ordered with the caller's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from .events import Event


class CallOptions(NamedTuple):
    """How a call runs; the arguments of these names of `Buffer.dispatch`."""

    async_op: bool
    return_recv_hook: bool
    previous_event: Event | torch.cuda.Event | None
    num_sms: int | None


_HERE = contextlib.nullcontext()


class Call:
    """One call of a Buffer, on one stream.

    A call runs on the caller's current stream, or, with async_op or a hook, on the Buffer's own
    communication stream, which starts after the caller's stream (or after previous_event) and which
    the caller joins by the event. On the CPU a call is complete when it returns.

    Tensors that the call makes are allocated on its stream, so that their memory is free when the
    call's work reaches it; the caller's stream is recorded on them, and the call's on its inputs.
    """

    def __init__(
        self,
        own: torch.cuda.Stream | None,
        current: torch.cuda.Stream | None,
        inputs: Iterable[torch.Tensor | None],
        check: Callable[[], None],
    ) -> None:
        self._own = own
        self._current = current
        self._check = check
        if own is None:
            return
        self._inputs = tuple(t for t in inputs if t is not None)
        self._capturing = torch.cuda.is_current_stream_capturing()
        # Recorded before the launch: the work may be under way when an error ends the call.
        if not self._capturing:
            for t in self._inputs:
                t.record_stream(own)

    @property
    def stream(self) -> int:
        """Address of the stream that the call runs on, 0 on the CPU."""
        stream = self._own or self._current
        return 0 if stream is None else int(stream.cuda_stream)

    def allocating(self) -> contextlib.AbstractContextManager[object]:
        """Where tensors of the call are made."""
        if self._own is None:
            return _HERE
        return torch.cuda.stream(self._own)

    def end(self, made: Iterable[torch.Tensor | None] = ()) -> Event:
        """The event of the call's completion. made: the tensors that the call made."""
        if self._current is None:
            return Event()
        event = torch.cuda.Event()
        event.record(self._own or self._current)
        if self._own is None:
            return Event(event, check=self._check)
        outputs = tuple(t for t in made if t is not None)
        if self._capturing:
            # A graph's pool knows no other streams: the event keeps the tensors until it is gone.
            return Event(event, (*self._inputs, *outputs), self._check)
        for t in outputs:
            t.record_stream(self._current)
        return Event(event, check=self._check)

    def resume(self, launch: Callable[[], None], event: Event) -> None:
        """Issues more of a call that ran on the Buffer's own stream, and marks its event anew."""
        if self._own is None:
            launch()
            return
        self._own.wait_stream(torch.cuda.current_stream(self._own.device))
        launch()
        event.record(self._own)


class ReceiveHalf:
    """Completes a call of which only the send half was issued: the hook that the caller gets.

    Runs once, on the call's stream, after what the caller's current stream holds by then; called
    again it only makes the current stream wait.

    Args:
        call: the call; ended.
        event: what `call.end` gave; marks the completion of the call once this has run.
        launch: issues the receive half on the call's stream.
        keep: what the receive half reads or writes; held until it is issued.
    """

    def __init__(
        self,
        call: Call,
        event: Event,
        launch: Callable[[], None],
        keep: Iterable[torch.Tensor | None],
    ) -> None:
        self._call = call
        self._event = event
        self._launch: Callable[[], None] | None = launch
        self._keep = tuple(keep)

    def finish(self) -> None:
        """Issues the receive half if it was not; the current stream does not wait for it."""
        launch, self._launch = self._launch, None
        if launch is not None:
            self._call.resume(launch, self._event)
            self._keep = ()

    def __call__(self) -> None:
        self.finish()
        self._event.wait()


class CallOrder:
    """Makes the calls of one Buffer.

    Args:
        device: of the Buffer's tensors.
        check: raises what the transport has to report; called after a host wait.
        own: the stream of asynchronous calls; None = a new one.
    """

    def __init__(
        self,
        device: torch.device,
        check: Callable[[], None],
        own: torch.cuda.Stream | None = None,
    ) -> None:
        self._device = device
        self._check = check
        self._own = None
        if device.type == "cuda":
            self._own = own or torch.cuda.Stream(device, priority=-1)
        self._half: ReceiveHalf | None = None  # of the last call, if it was made in halves

    def begin(self, options: CallOptions, inputs: Iterable[torch.Tensor | None]) -> Call:
        """Orders a call after what must come before it."""
        self._finish_half()
        own_stream = options.async_op or options.return_recv_hook
        previous_event = options.previous_event
        if self._own is None:
            if previous_event is not None:
                previous_event.synchronize()
            return Call(None, None, (), self._check)
        current = torch.cuda.current_stream(self._device)
        if previous_event is not None:
            previous_event.wait(self._own if own_stream else current)
        elif own_stream:
            self._own.wait_stream(current)
        return Call(self._own if own_stream else None, current, inputs, self._check)

    def defer_half(
        self,
        call: Call,
        event: Event,
        launch: Callable[[], None],
        keep: Iterable[torch.Tensor | None],
    ) -> ReceiveHalf:
        """The receive half of the call that just ended; the next call issues it if nobody did."""
        self._half = ReceiveHalf(call, event, launch, keep)
        return self._half

    def close(self) -> None:
        """The Buffer is destroyed: a receive half that nobody issued is not issued any more."""
        self._half = None

    def _finish_half(self) -> None:
        """Nothing else may run between the halves of a call."""
        half, self._half = self._half, None
        if half is not None:
            half.finish()

"""What is left to do with what a dispatch received: forms of scales, statistics, padding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from ...events import Event
from ...quant import column_shape, columns_of
from ...results import Recv, Rows
from .utils.event import EventOverlap, result_event

Hook = Callable[[], None] | None


class Finish:
    """What is left to do with what a dispatch received, once it is there.

    Args:
        stream: that the dispatch ran on, if it is not the caller's: what is left runs there, too.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._stream = stream
        self._steps: list[Callable[[], object]] = []
        self._tensors: list[torch.Tensor] = []

    def first_rows(self, x: Rows, rows: int) -> Rows:
        """The first rows [L, rows, H] of every expert; x itself if it has no more."""
        if isinstance(x, tuple):
            return self._first_rows(x[0], rows), self._first_rows(x[1], rows)
        return self._first_rows(x, rows)

    def _first_rows(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        if x.shape[1] == rows:
            return x
        with self._on_stream():
            to = x.new_empty((x.shape[0], rows, x.shape[2]))
        self._steps.append(lambda: to.copy_(x[:, :rows]))
        self._tensors += [x, to]
        return to

    def column_major(self, scales: torch.Tensor, unpacked: int | None = None) -> torch.Tensor:
        """The scales [..., rows, S] with stride 1 over rows and columns on multiples of 16 bytes.

        unpacked: int32 of four exponents each become so many float32 powers of two.
        """
        *rows, width = scales.shape
        dtype = torch.float32 if unpacked else scales.dtype
        shape = column_shape(dtype, (*rows, unpacked or width))
        with self._on_stream():
            to = columns_of(torch.empty(shape, dtype=dtype, device=scales.device), rows[-1])
        self._steps.append(lambda: to.copy_(_powers(scales, unpacked) if unpacked else scales))
        self._tensors += [scales, to]
        return to

    def clear_padding(self, x: Rows, topk_idx: torch.Tensor) -> None:
        """Zeroes rows of the expanded layout that carry no token. topk_idx: [rows], -1 = none."""
        parts = [part.view(torch.uint8) for part in (x if isinstance(x, tuple) else (x,))]
        self._steps.append(
            lambda: [part.masked_fill_(topk_idx.unsqueeze(1) < 0, 0) for part in parts]
        )
        self._tensors += [*parts, topk_idx]

    def add(self, stats: torch.Tensor, counts: torch.Tensor) -> None:
        """stats += counts."""
        self._steps.append(lambda: stats.add_(counts))
        self._tensors += [stats, counts]

    def after(self, recv: Recv, async_finish: bool) -> tuple[EventOverlap, Hook]:
        """Does it when the dispatch is complete; the event and the hook that say so."""
        receive = recv.hook
        if receive is not None:

            def hook() -> None:
                receive()
                self._run()

            return EventOverlap(), hook if self._steps else receive
        if not async_finish:
            self._run()
            return EventOverlap(), None
        if not self._steps:
            return result_event(recv.event), None
        return result_event(self._run_beside(recv.event)), None

    def _run(self) -> None:
        for step in self._steps:
            step()

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        stream = self._stream
        return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)

    def _run_beside(self, event: Event) -> Event:
        """Runs behind the dispatch on its stream, so that the caller's need not wait."""
        if self._stream is None:  # on the CPU
            self._run()
            return event
        callers = torch.cuda.current_stream(self._stream.device)
        with self._on_stream():
            self._run()
            done = torch.cuda.Event()
            done.record()
        if not torch.cuda.is_current_stream_capturing():  # a graph's pool knows no other streams
            for tensor in self._tensors:
                tensor.record_stream(self._stream)
                tensor.record_stream(callers)
        return Event(done, tuple(self._tensors))


def _powers(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The powers of two behind biased exponents, four to an int32; 255, a NaN, becomes infinite."""
    exponents = packed.contiguous().view(torch.uint8)[..., :count]
    return (exponents.to(torch.int32) << 23).view(torch.float32)

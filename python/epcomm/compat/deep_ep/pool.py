"""The epcomm Buffers behind one buffer of deep_ep.

A deep_ep constructor says how many bytes to take; an epcomm Buffer wants to know hidden, experts,
top-k and tokens. Calls say those, so the Buffers are made by the first call that needs one, which
is collective like every call. They are kept by what they were made for.

Tokens are the exception: in a normal call each rank knows its own number only. So the ranks agree
through the process group, once, on the largest of their numbers, rounded up. A later batch may be
larger, on some ranks only, and an exchange in every call would cost more than the call. Instead the
rank with the larger batch *knocks*: it makes a call of the Buffer that has no tokens and an
expert_alignment that nothing else uses. epcomm compares what ranks announce in every call, so all
ranks get the same ConfigMismatch, see the mark in it, and make a larger Buffer together.
"""

from __future__ import annotations

import contextlib
import struct
import weakref
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from ... import env
from ...buffer import Buffer
from ...errors import BufferUnusable, ConfigMismatch, PeerLost
from .groups import Group

T = TypeVar("T")

TIMEOUT_S = 100.0  # deep_ep's; callers count on ranks being allowed to be that late
KNOCK = 2**20  # expert_alignment of a rank that asks for a larger Buffer
_MIN_TOKENS = 256


class Shape(NamedTuple):
    """What an epcomm Buffer is made for, the same on all ranks.

    max_tokens: 0 = the ranks agree on it.
    num_worst_tokens: received rows that the caller makes room for; 0 = it asks for the number.
    members: the ranks that take part; () = all.
    """

    device: torch.device
    num_experts: int
    hidden: int
    topk: int
    dtype: torch.dtype = torch.bfloat16
    max_tokens: int = 0
    num_worst_tokens: int = 0
    members: tuple[int, ...] = ()


class Pool:
    """Makes and keeps the epcomm Buffers of one group."""

    def __init__(self, group: Group, timeout: float = TIMEOUT_S) -> None:
        self.group = group
        self._timeout = timeout
        self._buffers: dict[Shape, Buffer] = {}
        self._made: weakref.WeakSet[Buffer] = weakref.WeakSet()
        self._comm_stream: torch.cuda.Stream | None = None
        self._destroyed = False

    def get(self, shape: Shape, num_tokens: int) -> Buffer:
        """The Buffer for a shape; the first call for it is collective.

        num_tokens: of this rank, for shapes that leave max_tokens to the ranks.
        """
        buffer = self._buffers.get(shape)
        if buffer is None:
            buffer = self._make(shape, shape.max_tokens or self._agree(shape, num_tokens))
        return buffer

    def call(
        self,
        shape: Shape,
        num_tokens: int,
        dispatch: Callable[[Buffer], T],
        knock: Callable[[Buffer], object],
    ) -> T:
        """dispatch(buffer) on a Buffer that holds every rank's batch.

        knock: makes the same call without tokens and with expert_alignment=KNOCK.
        """
        while True:
            buffer = self.get(shape, num_tokens)
            try:
                if num_tokens <= buffer.max_tokens:
                    return dispatch(buffer)
                knock(buffer)  # returns only if every rank knocks
            except ConfigMismatch as error:
                if error.field != "expert_alignment" or str(KNOCK) not in error.value_per_rank:
                    raise
            del self._buffers[shape]

    def losses(self) -> list[tuple[int, tuple[int, ...]]]:
        """(rank, members) of peers that calls have lost that returned before it was known.

        On a GPU calls return at once, so a caller may ask before its next call would raise.
        """
        lost = []
        for shape, buffer in self._buffers.items():
            try:
                buffer.check_faults()
            except PeerLost as error:
                lost.append((error.rank, shape.members))
        return lost

    def forget(self, members: tuple[int, ...]) -> None:
        """Drops the Buffers over these ranks: one of them is lost."""
        for shape in [s for s in self._buffers if s.members == members]:
            del self._buffers[shape]

    def comm_stream(self) -> torch.cuda.Stream:
        """The stream of asynchronous calls on this process's GPU."""
        if not torch.cuda.is_available():
            raise NotImplementedError(
                "get_comm_stream is not offered without a GPU: calls are complete when they return"
            )
        if self._comm_stream is None:
            self._comm_stream = torch.cuda.Stream(priority=-1)
        return self._comm_stream

    def stream_of(self, device: torch.device, is_async: bool) -> torch.cuda.Stream | None:
        """The stream that a call on a device runs on; None = the caller's."""
        return self.comm_stream() if is_async and device.type == "cuda" else None

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        self._check()
        self.group.bootstrap(self._timeout_s()).all_gather(b"0")

    def destroy(self) -> None:
        """Local. Later calls raise BufferUnusable, also those with handles of earlier ones."""
        self._destroyed = True
        self._buffers.clear()
        for buffer in list(self._made):
            buffer.destroy()

    def _timeout_s(self) -> float:
        return env.number("EPCOMM_TIMEOUT", self._timeout)

    def _agree(self, shape: Shape, num_tokens: int) -> int:
        self._check()
        wanted = max(num_tokens, int(env.number("EPCOMM_MAX_TOKENS", 0)), 1)
        data = struct.pack("<q", wanted)
        answers = self.group.bootstrap(self._timeout_s()).all_gather(data)
        most: int = max(struct.unpack("<q", answer)[0] for answer in answers)
        size = self.group.size
        if shape.num_worst_tokens:
            # Exactly the rows that the caller expects, if no rank exceeds its share.
            return max(most, -(-shape.num_worst_tokens // size))
        rounded = max(_MIN_TOKENS, size, 1 << (most - 1).bit_length())
        return max(most, min(rounded, (2**31 - 1) // (32 * size)))

    def _make(self, shape: Shape, max_tokens: int) -> Buffer:
        self._check()
        on_gpu = shape.device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, and no earlier call had this shape "
                f"({shape}); make one such call before the capture"
            )
        with torch.cuda.device(shape.device) if on_gpu else contextlib.nullcontext():
            buffer = Buffer(
                self.group.bootstrap(self._timeout_s(), shape.members),
                num_experts=shape.num_experts,
                hidden=shape.hidden,
                topk=shape.topk,
                max_tokens=max_tokens,
                dtype=shape.dtype,
                transport="auto" if on_gpu else "cpu",
                timeout=self._timeout_s(),
                comm_stream=self.comm_stream() if on_gpu else None,
            )
        self._buffers[shape] = buffer
        self._made.add(buffer)
        return buffer

    def _check(self) -> None:
        if self._destroyed:
            raise BufferUnusable("this buffer was destroyed; make a new one")

"""The exceptions of epcomm.

A bad argument raises `ValueError` (`TypeError` for a wrong Python type) before anything is sent;
the same call may be repeated with a correct argument. All other faults derive from `Error`.
"""

from __future__ import annotations


class Error(RuntimeError):
    """Base of every fault that is not the caller's argument."""


class PeerLost(Error):
    """A peer did not answer within the timeout, or its process is gone.

    Raised on every rank that needed the peer. This Buffer refuses all later calls; make a new one
    over the ranks that are left.

    Attributes:
        rank: the lost peer; -1 where the process group cannot tell (during init).
        operation: "init", "route", "dispatch" or "combine".
        epoch: number of that operation on this Buffer, from 1; 0 during init.
    """

    def __init__(self, message: str, rank: int, operation: str, epoch: int) -> None:
        super().__init__(message)
        self.rank = rank
        self.operation = operation
        self.epoch = epoch


class Evicted(Error):
    """This rank was given up as lost by a peer: it did not answer within the timeout.

    Attributes:
        by_rank: the peer that gave up.
        operation: what that peer was doing.
        epoch: number of that operation.
    """

    def __init__(self, message: str, by_rank: int, operation: str, epoch: int) -> None:
        super().__init__(message)
        self.by_rank = by_rank
        self.operation = operation
        self.epoch = epoch


class ConfigMismatch(Error):
    """Ranks disagree on something that must be equal. Every rank raises it with the same text.

    Attributes:
        field: name of the first field that differs.
        value_per_rank: its value on each rank, as text.
    """

    def __init__(self, message: str, field: str, value_per_rank: list[str]) -> None:
        super().__init__(message)
        self.field = field
        self.value_per_rank = value_per_rank


class WindowFull(Error):
    """A rank's window has no room for what the call returns. Every rank raises it.

    The Buffer stays usable: drop tensors that earlier calls returned, or send less.

    Attributes:
        rank: the rank whose window is full.
        needed_bytes: what the call needed there.
        free_bytes: the largest contiguous piece left there.
    """

    def __init__(self, message: str, rank: int, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(message)
        self.rank = rank
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class BufferUnusable(Error):
    """The Buffer was destroyed, or belongs to the process that this one was forked from."""

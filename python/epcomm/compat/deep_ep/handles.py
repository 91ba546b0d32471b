"""The handles that dispatch returns and combine takes.

Callers keep them and give them back; a few read their leading tensors. Those cost kernels, so they
are made when they are first read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ...buffer import Buffer
from ...results import Plan


@dataclass
class Routing:
    """What a handle stands for.

    Attributes:
        buffer, plan: of epcomm.
        num_experts: as the caller counts them.
        recv_rows: rows of recv_x as the caller has it (low latency: per expert); fewer than the
            Buffer's with num_worst_tokens that the ranks cannot share evenly, or masked ranks.
        topk_idx: [T, K] that low_latency_dispatch was given, or None.
        members: ranks that took part; () = all.
        combine_buffer: what get_next_low_latency_combine_buffer has returned.
    """

    buffer: Buffer
    plan: Plan
    num_experts: int
    recv_rows: int
    topk_idx: torch.Tensor | None = None
    members: tuple[int, ...] = ()
    combine_buffer: torch.Tensor | None = None


class Handle(tuple[Any, ...]):
    """A tuple whose first items are made by `make` when an item is first read.

    Callers may take it apart and build a tuple again: the first tensor knows its routing, too.
    """

    routing: Routing
    _make: Callable[[Routing], tuple[torch.Tensor, ...]]
    _items: tuple[Any, ...] | None

    def __new__(
        cls,
        routing: Routing,
        make: Callable[[Routing], tuple[torch.Tensor, ...]],
        num_tensors: int,
        rest: tuple[Any, ...] = (),
    ) -> Handle:
        handle = super().__new__(cls, (None,) * num_tensors + rest)
        handle.routing = routing
        handle._make = make
        handle._items = None
        return handle

    def _all(self) -> tuple[Any, ...]:
        if self._items is None:
            tensors = self._make(self.routing)
            _routing_of_tensor[tensors[0]] = self.routing
            self._items = tensors + tuple(super().__iter__())[len(tensors) :]
        return self._items

    def __getitem__(self, index: Any) -> Any:
        return self._all()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all())

    def __repr__(self) -> str:
        return f"Handle(num_tokens={self.routing.plan.num_tokens}, items={len(self)})"


# The first tensor of each handle that was read.
_routing_of_tensor = WeakTensorKeyDictionary()


def routing_of(handle: Any) -> Routing:
    """The routing of a handle, or of a tuple that was built from its items."""
    routing = getattr(handle, "routing", None)
    if routing is None and isinstance(handle, (tuple, list)) and handle:
        first = handle[0]
        routing = _routing_of_tensor.get(first) if isinstance(first, torch.Tensor) else None
    if not isinstance(routing, Routing):
        raise TypeError(
            f"handle is a {type(handle).__name__} that no dispatch returned; expected the handle "
            "of a dispatch"
        )
    return routing


def normal_handle(routing: Routing) -> Handle:
    """(rank_prefix_matrix,): int32 [R, R], rows that rank j receives from ranks 0 to i."""
    return Handle(routing, _rank_prefix_matrix, 1)


def _rank_prefix_matrix(routing: Routing) -> tuple[torch.Tensor, ...]:
    return (routing.plan.rank_count.cumsum(0, dtype=torch.int32),)

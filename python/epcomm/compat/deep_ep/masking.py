"""Going on without lost ranks (enable_shrink).

A low-latency call that loses a peer raises PeerLost, on every rank that is left; nothing incomplete
is passed off as a result. The peer is masked from then on. The next low_latency_dispatch makes an
epcomm Buffer over the ranks that are left: experts of masked ranks get no tokens and contribute
nothing, shapes stay those of the full group.
"""

from __future__ import annotations

import torch


class Masks:
    """Which ranks of a group are masked; kept on the host."""

    def __init__(self, rank: int, size: int, enabled: bool) -> None:
        self._rank = rank
        self._size = size
        self._enabled = enabled
        self._masked: set[int] = set()

    def check_enabled(self) -> None:
        """Refuses mask calls without enable_shrink, as deep_ep does."""
        if not self._enabled:
            raise ValueError("enable_shrink is False; make the Buffer with True to mask ranks")

    def set(self, rank: int, masked: bool) -> None:
        """Masks or unmasks a rank."""
        if not 0 <= rank < self._size or (masked and rank == self._rank):
            raise ValueError(
                f"rank_to_mask is {rank}; expected another rank than this ({self._rank}), "
                f"0 to {self._size - 1}"
            )
        (self._masked.add if masked else self._masked.discard)(rank)

    def clear(self) -> None:
        """Unmasks all."""
        self._masked.clear()

    def status(self) -> list[int]:
        """1 for every masked rank, else 0."""
        return [int(r in self._masked) for r in range(self._size)]

    def members(self) -> tuple[int, ...]:
        """The ranks that are left; () = all."""
        if not self._masked:
            return ()
        return tuple(r for r in range(self._size) if r not in self._masked)

    def lose(self, rank: int, members: tuple[int, ...]) -> None:
        """Masks the peer that a call over these members (() = all) lost; -1 = it cannot tell."""
        if self._enabled and rank >= 0:
            self._masked.add(members[rank] if members else rank)


def remapped(topk_idx: torch.Tensor, members: tuple[int, ...], local_experts: int) -> torch.Tensor:
    """Expert ids among the members' experts; -1 for experts of masked ranks."""
    owner = topk_idx.div(local_experts, rounding_mode="floor")
    result = torch.full_like(topk_idx, -1)
    for index, rank in enumerate(members):
        moved = topk_idx + (index - rank) * local_experts
        result = torch.where((owner == rank) & (topk_idx >= 0), moved, result)
    return result

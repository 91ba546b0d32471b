"""Operations that make the host wait, where softnic is the card. Meta tensors stand for a GPU's."""

from collections.abc import Callable

import pytest
import torch

import rdma_modes

CPU = torch.ones(3)
META = torch.ones(3, device="meta")


@pytest.mark.parametrize(
    ("waits", "operation"),
    [
        (True, lambda: META.cpu()),
        (True, lambda: META.tolist()),
        (True, lambda: META.sum().item()),
        (True, lambda: bool((META > 0).all())),
        (True, lambda: torch.equal(META, META)),
        (True, lambda: META[META > 0]),
        (True, lambda: META.nonzero()),
        (True, lambda: META.copy_(CPU)),
        (True, lambda: CPU.clone().copy_(META)),
        (True, lambda: CPU.to("meta")),
        (False, lambda: META + 1),
        (False, lambda: META.bfloat16()),
        (False, lambda: META.clone().copy_(META)),
        (False, lambda: torch.full((3,), 1.0, device="meta")),
        (False, lambda: torch.cat([META, META])),
        (False, lambda: CPU.sum().item()),
        (False, lambda: CPU.double()),
        (False, lambda: torch.equal(CPU, CPU)),
    ],
)
def test_which_operations_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, waits: bool, operation: Callable[[], object]
) -> None:
    seen = []
    monkeypatch.setattr(rdma_modes, "GPU", "meta")
    monkeypatch.setattr(rdma_modes, "wait_for_stream", lambda: seen.append(1))
    with rdma_modes.Patience():
        try:
            operation()
        except (NotImplementedError, RuntimeError):
            assert waits  # a meta tensor has no values
    assert bool(seen) == waits

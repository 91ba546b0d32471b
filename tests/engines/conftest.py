"""Ranks import the modules of this folder by name too."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import engine
import launcher

RANKS = 4


# Not for the session: Megatron-Core makes dozens of process groups in each rank, and a thread of
# gloo wakes up a hundred times a second for each of them, also when nobody calls.
@pytest.fixture(scope="module")
def ranks_of() -> Iterator[Callable[[str, str], launcher.Pool]]:
    """ranks_of(engine, device): RANKS ranks, or one per GPU, which import no other engine."""
    pools: dict[tuple[str, str], launcher.Pool] = {}

    def ranks_of(name: str, device: str) -> launcher.Pool:
        engine.folder(name)
        if (name, device) not in pools:
            pools[name, device] = launcher.Pool(device, RANKS if device == "cpu" else None)
        return pools[name, device]

    yield ranks_of
    for pool in pools.values():
        pool.kill()

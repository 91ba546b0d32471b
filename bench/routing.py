"""Which experts each token goes to.

Every rank computes the routing of all ranks from the same seed, so that traffic and expected
results are known everywhere without a word on the wire.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import numpy as np


def expert_owners(num_experts: int, num_ranks: int) -> np.ndarray:
    """Rank of each expert: a contiguous split, ceil(num_experts / num_ranks) each, shorter tail."""
    return np.arange(num_experts) // -(-num_experts // num_ranks)


@dataclasses.dataclass(frozen=True)
class Routing:
    """The routing of all ranks. topk_idx: int64 [ranks, tokens, topk], -1 = none."""

    topk_idx: np.ndarray
    num_experts: int
    name: str

    @property
    def num_ranks(self) -> int:
        return self.topk_idx.shape[0]

    @property
    def tokens(self) -> int:
        return self.topk_idx.shape[1]

    @property
    def topk(self) -> int:
        return self.topk_idx.shape[2]

    @functools.cached_property
    def owners(self) -> np.ndarray:
        return expert_owners(self.num_experts, self.num_ranks)

    @functools.cached_property
    def reaches(self) -> np.ndarray:
        """bool [source rank, token, destination rank]: the token has an expert on that rank."""
        reaches = np.zeros((self.num_ranks, self.tokens, self.num_ranks), dtype=bool)
        source, token, slot = np.nonzero(self.topk_idx >= 0)
        reaches[source, token, self.owners[self.topk_idx[source, token, slot]]] = True
        return reaches

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """int64 [source rank, destination rank]: rows that cross, one per (token, destination)."""
        return self.reaches.sum(axis=1)

    def local_experts(self, rank: int) -> np.ndarray:
        return np.flatnonzero(self.owners == rank)


@dataclasses.dataclass(frozen=True)
class RoutingSpec:
    """--routing, parsed: uniform, zipf:S, one-expert, or a file of expert ids."""

    name: str
    skew: float = 0.0
    table: np.ndarray | None = None  # int64 [any number of tokens, topk]

    @classmethod
    def parse(cls, text: str) -> RoutingSpec:
        if text in ("uniform", "one-expert"):
            return cls(text)
        if text.startswith("zipf:"):
            return cls(text, skew=float(text.removeprefix("zipf:")))
        path = pathlib.Path(text)
        if not path.is_file():
            raise ValueError(
                f"routing {text!r} is none of uniform, zipf:S, one-expert, and no file of that name"
            )
        table = (
            np.load(path) if path.suffix == ".npy" else np.loadtxt(path, dtype=np.int64, ndmin=2)
        )
        if not np.issubdtype(table.dtype, np.integer) or table.ndim < 2 or table.size == 0:
            raise ValueError(f"routing file {text}: expected integers, one row of topk per token")
        return cls(path.name, table=table.reshape(-1, table.shape[-1]).astype(np.int64))

    def make(self, num_ranks: int, tokens: int, num_experts: int, topk: int, seed: int) -> Routing:
        """The routing of one case.

        A file's rows are dealt to ranks in blocks, again from the top when they run out.
        """
        if self.table is not None:
            topk_idx = np.resize(self.table, (num_ranks, tokens, self.table.shape[1]))
            if topk_idx.min() < -1 or topk_idx.max() >= num_experts:
                raise ValueError(
                    f"routing file {self.name}: ids {topk_idx.min()} to {topk_idx.max()}, "
                    f"expected -1 to {num_experts - 1}"
                )
        elif self.name == "one-expert":
            topk_idx = np.full((num_ranks, tokens, topk), -1, dtype=np.int64)
            topk_idx[:, :, 0] = 0
        else:
            topk_idx = self._sample(num_ranks, tokens, num_experts, topk, seed)
        return Routing(topk_idx, num_experts, self.name)

    def _sample(
        self, num_ranks: int, tokens: int, num_experts: int, topk: int, seed: int
    ) -> np.ndarray:
        """Draws topk distinct experts per token, popularity 1 / place^skew (skew 0: uniform)."""
        places = np.random.default_rng(seed).permutation(num_experts) + 1
        log_popularity = -self.skew * np.log(places)
        drawn = []
        for rank in range(num_ranks):
            noise = np.random.default_rng([seed, rank]).gumbel(size=(tokens, num_experts))
            # The topk largest of log p + Gumbel noise are a draw without replacement.
            drawn.append(np.argsort(-(log_popularity + noise), axis=1)[:, :topk])
        return np.stack(drawn).astype(np.int64)

"""What deep_ep's calls must give, from the inputs of all ranks at once: numpy, nothing of epcomm.

R ranks, E experts, L = E / R local experts, T tokens, K slots. A row is named (source, token).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class World:
    """One routing of all ranks. idx[r], weights[r]: [T, K]."""

    num_experts: int
    idx: Sequence[Array]
    weights: Sequence[Array]

    @property
    def num_ranks(self) -> int:
        return len(self.idx)

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    def experts(self, source: int, token: int) -> set[int]:
        return {e for e in self.idx[source][token].tolist() if e >= 0}

    def ranks(self, source: int, token: int) -> set[int]:
        return {e // self.local_experts for e in self.experts(source, token)}

    def tokens(self) -> list[tuple[int, int]]:
        return [(s, t) for s in range(self.num_ranks) for t in range(len(self.idx[s]))]

    # V1: what get_dispatch_layout says on one rank.

    def is_token_in_rank(self, rank: int) -> Array:
        told = np.zeros((len(self.idx[rank]), self.num_ranks), dtype=bool)
        for t in range(len(told)):
            told[t, sorted(self.ranks(rank, t))] = True
        return told

    def per_expert(self, rank: int) -> Array:
        count = np.zeros(self.num_experts, dtype=np.int32)
        for t in range(len(self.idx[rank])):
            count[sorted(self.experts(rank, t))] += 1
        return count

    # What a rank receives.

    def rows(self, rank: int) -> list[tuple[int, int]]:
        """One per (token, rank), by source, then token."""
        return [(s, t) for s, t in self.tokens() if rank in self.ranks(s, t)]

    def counts(self, rank: int) -> list[int]:
        """Tokens of each local expert."""
        first = rank * self.local_experts
        total = sum(self.per_expert(s) for s in range(self.num_ranks))
        return [int(n) for n in total[first : first + self.local_experts]]

    def recv_idx_weights(self, rank: int) -> tuple[Array, Array]:
        """[N, K] local ids or -1, and weights, 0 where -1."""
        shape = (len(self.rows(rank)), self.idx[rank].shape[1])
        ids, weights = np.full(shape, -1), np.zeros(shape, dtype=np.float32)
        for n, (s, t) in enumerate(self.rows(rank)):
            for k, e in enumerate(self.idx[s][t].tolist()):
                if e >= 0 and e // self.local_experts == rank:
                    ids[n, k] = e % self.local_experts
                    weights[n, k] = self.weights[s][t, k]
        return ids, weights

    def expert_rows(self, rank: int, local: int) -> list[tuple[int, int]]:
        """Tokens of one local expert, by source, then token."""
        expert = rank * self.local_experts + local
        return [(s, t) for s, t in self.tokens() if expert in self.experts(s, t)]

    def rank_prefix_matrix(self) -> Array:
        """[i, j]: rows that rank j receives from ranks 0 to i."""
        sends = [self.is_token_in_rank(s).sum(0) for s in range(self.num_ranks)]
        return np.cumsum(np.array(sends), axis=0)


def worlds(seed: int, num_ranks: int, tokens: Sequence[int], topk: int, local: int) -> World:
    """Random routing with holes; weights are powers of two, so that sums of integers are exact."""
    rng = np.random.default_rng(seed)
    experts = num_ranks * local
    idx, weights = [], []
    for r in range(num_ranks):
        n = tokens[r % len(tokens)]
        chosen = np.array([rng.permutation(experts)[:topk] for _ in range(n)]).reshape(n, topk)
        chosen = chosen.astype(np.int64)
        chosen[rng.random((n, topk)) < 0.25] = -1
        idx.append(chosen)
        weights.append((2.0 ** rng.integers(-2, 2, (n, topk))).astype(np.float32))
    return World(experts, idx, weights)


def payload(seed: int, rank: int, tokens: int, hidden: int) -> Array:
    """Small integers: exact in bf16, also as sums of all ranks."""
    rng = np.random.default_rng((seed, rank))
    return rng.integers(-8, 9, (tokens, hidden)).astype(np.float32)


def gathered(xs: Sequence[Array], rows: Sequence[tuple[int, int]]) -> Array:
    """The payload of named rows."""
    width = xs[0].shape[1]
    return np.array([xs[s][t] for s, t in rows]).reshape(len(rows), width)

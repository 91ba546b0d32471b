"""Oracle: what dispatch and combine must give, computed from the inputs of all ranks at once.

Plain numpy, no communication, nothing of epcomm. Rows are named by (source rank, token), so one
answer serves every dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Received:
    """What one rank receives. Arrays over rows of the layout; padding rows have source -1."""

    source: Array  # [rows] rank that the row comes from
    token: Array  # [rows] its token there
    topk_idx: Array  # token: [rows, K]; else [rows]; local expert ids, -1 = none
    topk_weights: Array | None  # shape of topk_idx, fp32, 0 = none
    tokens_per_expert: Array  # [L]
    expert_offsets: Array | None  # [L + 1], None for token
    num_tokens: int
    row: dict[tuple[int, int, int], int]  # (source, token, local expert) -> row


def owners(num_experts: int, num_ranks: int, table: Sequence[int] | None = None) -> Array:
    """Rank that owns each expert."""
    if table is not None:
        return np.asarray(table)
    return np.arange(num_experts) // -(-num_experts // num_ranks)


def dispatch(
    topk_idx: Sequence[Array],
    topk_weights: Sequence[Array] | None,
    owner: Array,
    rank: int,
    *layout,
) -> Received:
    """What `rank` receives. layout: "token"; "expert", alignment; or "padded", rows per expert."""
    local = {int(e): i for i, e in enumerate(np.flatnonzero(owner == rank))}
    # One entry per token that comes here: (source, token, {k: local expert}).
    tokens = []
    for s, idx in enumerate(topk_idx):
        for t, experts in enumerate(idx.tolist()):
            here = {k: local[e] for k, e in enumerate(experts) if e in local}
            if here:
                tokens.append((s, t, here))
    groups = [[entry for entry in tokens if e in entry[2].values()] for e in range(len(local))]
    counts = np.array([len(group) for group in groups], dtype=np.int32)

    shape, offsets = (len(tokens), topk_idx[0].shape[1]), None
    if layout[0] == "token":
        placed = [(n, entry, None) for n, entry in enumerate(tokens)]
    else:
        size = layout[1]
        room = -(-counts // size) * size if layout[0] == "expert" else np.full_like(counts, size)
        offsets = np.concatenate([[0], np.cumsum(room)]).astype(np.int32)
        shape = (int(offsets[-1]),)
        placed = [(offsets[e] + i, x, e) for e, g in enumerate(groups) for i, x in enumerate(g)]

    source, token, row = np.full(shape[0], -1), np.full(shape[0], -1), {}
    ids, weights = np.full(shape, -1), np.zeros(shape, dtype=np.float32)
    for n, (s, t, here), expert in placed:
        source[n], token[n] = s, t
        for k, e in here.items():
            if expert in (None, e):
                at = (n, k) if expert is None else (n,)
                row[s, t, e], ids[at] = int(n), e
                weights[at] += 0.0 if topk_weights is None else topk_weights[s][t, k]
    weights = None if topk_weights is None else weights
    return Received(source, token, ids, weights, counts, offsets, len(tokens), row)


def combine(
    rows: Sequence[Array],
    received: Sequence[Received],
    topk_idx: Array,
    owner: Array,
    source: int,
    round_: Callable[[Array], Array],
    topk_weights: Array | None = None,
    bias: Array | None = None,
    cross: Callable[[Array], Array] | None = None,
    node: Array | None = None,
) -> Array:
    """y of rank `source`, bit for bit. rows[r]: fp32 values in rank r's layout, flat over rows.

    cross: what becomes of a partial row on its way, if it is not just rounded.
    node[r]: the node of rank r, whose ranks are added up first; None: nothing is.
    """
    cross = cross or round_
    y = np.zeros((len(topk_idx), rows[0].shape[-1]), dtype=np.float32)
    for t, experts in enumerate(topk_idx.tolist()):
        of_node: dict[int, Array] = {}
        for r in sorted({int(owner[e]) for e in experts if e >= 0}):
            used = {  # k -> row of rank r, k ascending
                k: received[r].row[source, t, int(np.sum(owner[:e] == r))]
                for k, e in enumerate(experts)
                if e >= 0 and owner[e] == r
            }
            partial = np.zeros_like(y[t])
            if topk_weights is None:
                for n in dict.fromkeys(used.values()):
                    partial = partial + rows[r][n]
            else:
                for k, n in used.items():
                    partial = partial + topk_weights[t, k] * rows[r][n]
            b = r if node is None else int(node[r])
            of_node[b] = of_node.get(b, np.zeros_like(y[t])) + cross(partial)
        for b in sorted(of_node):
            y[t] = y[t] + (of_node[b] if node is None else round_(of_node[b]))
        if bias is not None:
            y[t] = y[t] + bias[t]
    return round_(y)


def round_bf16(x: Array) -> Array:
    """fp32 values rounded to bfloat16, to nearest even; finite values only."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


def round_fp16(x: Array) -> Array:
    """fp32 values rounded to IEEE half, to nearest even."""
    return x.astype(np.float16).astype(np.float32)


def round_fp32(x: Array) -> Array:
    return x.astype(np.float32)


ROUND = {"bfloat16": round_bf16, "float16": round_fp16, "float32": round_fp32}

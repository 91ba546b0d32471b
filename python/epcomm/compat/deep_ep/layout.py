"""What deep_ep computes from topk_idx before a dispatch. Local."""

from __future__ import annotations

from typing import Any

import torch

from ... import native
from ...checks import INDEX_DTYPES, INT32_MAX, integer

NODE_RANKS = 8  # ranks that deep_ep takes for one node

Layout = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]
"""num_tokens_per_rank, _per_rdma_rank (None within a node), _per_expert, is_token_in_rank."""


def dispatch_layout(topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> Layout:
    """Counts of a routing: on a GPU by one kernel on the current stream, else by torch.

    A token that names an expert twice counts once. An id out of range is dispatch's to refuse: here
    it counts for no expert.
    """
    if topk_idx.dim() != 2:
        raise ValueError(
            f"topk_idx has shape {list(topk_idx.shape)}; expected [num_tokens, num_topk]"
        )
    if integer("num_experts", num_experts, 1) % num_ranks != 0:
        raise ValueError(
            f"num_experts is {num_experts}; expected a positive multiple of the {num_ranks} ranks"
        )
    if topk_idx.dtype not in INDEX_DTYPES:
        raise TypeError(f"topk_idx is {topk_idx.dtype}; expected int64 or int32")
    if topk_idx.numel() > INT32_MAX:
        raise ValueError(f"topk_idx has {topk_idx.numel()} ids; expected less than 2**31")
    cuda = native.load_cuda() if topk_idx.is_cuda else None
    if cuda is None:
        return by_torch(topk_idx, num_experts, num_ranks)
    with torch.cuda.device(topk_idx.device):
        stream = torch.cuda.current_stream().cuda_stream
        return by_kernel(cuda, topk_idx, num_experts, num_ranks, stream)


def by_kernel(
    module: Any, topk_idx: torch.Tensor, num_experts: int, num_ranks: int, stream: int
) -> Layout:
    """dispatch_layout by the kernel of an extension module, on the current device."""
    topk_idx = topk_idx.contiguous()
    num_tokens, topk = topk_idx.shape
    num_nodes = _nodes(num_ranks)

    def made(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=topk_idx.device)

    per_rank, per_expert = made(num_ranks), made(num_experts)
    per_node = made(num_nodes) if num_nodes > 1 else None
    in_rank = made(num_tokens, num_ranks, dtype=torch.bool)
    args = module.DispatchLayoutArgs()
    args.topk_idx = topk_idx.data_ptr()
    index_types = module.IndexType
    args.index_type = index_types.int64 if topk_idx.dtype == torch.int64 else index_types.int32
    args.num_tokens, args.topk = num_tokens, topk
    args.num_experts, args.num_ranks, args.num_nodes = num_experts, num_ranks, num_nodes
    args.tokens_per_rank = per_rank.data_ptr()
    args.tokens_per_node = 0 if per_node is None else per_node.data_ptr()
    args.tokens_per_expert = per_expert.data_ptr()
    args.is_token_in_rank = in_rank.data_ptr()
    args.stream = stream
    module.dispatch_layout(args)
    return per_rank, per_node, per_expert, in_rank


def by_torch(topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> Layout:
    """dispatch_layout by operations of torch."""
    num_tokens, num_nodes = topk_idx.shape[0], _nodes(num_ranks)
    # The last column takes what is no expert.
    good = (topk_idx >= 0) & (topk_idx < num_experts)
    columns = torch.where(good, topk_idx, num_experts).long()
    chosen = torch.zeros(num_tokens, num_experts + 1, dtype=torch.bool, device=topk_idx.device)
    chosen = chosen.scatter_(1, columns, True)[:, :num_experts]
    in_rank = chosen.view(num_tokens, num_ranks, num_experts // num_ranks).any(2)

    def count(choices: torch.Tensor) -> torch.Tensor:
        return choices.sum(0, dtype=torch.int32)

    per_node = None
    if num_nodes > 1:
        per_node = count(in_rank.view(num_tokens, num_nodes, num_ranks // num_nodes).any(2))
    return count(in_rank), per_node, count(chosen), in_rank


def _nodes(num_ranks: int) -> int:
    """Nodes that deep_ep takes so many ranks for."""
    return num_ranks // NODE_RANKS if num_ranks % NODE_RANKS == 0 else 1


def pseudo_topk_idx(is_token_in_rank: torch.Tensor) -> torch.Tensor:
    """[T, R] int64: one expert per rank, for a dispatch that knows the ranks of a token only."""
    ranks = torch.arange(is_token_in_rank.shape[1], device=is_token_in_rank.device)
    return torch.where(is_token_in_rank, ranks, -1)


def check_layout(
    topk_idx: torch.Tensor,
    is_token_in_rank: torch.Tensor | None,
    num_tokens_per_expert: torch.Tensor,
) -> None:
    """Refuses a layout that is not topk_idx's. On the CPU only: on a GPU it would cost a host wait.

    Rows go by topk_idx; deep_ep sends them by is_token_in_rank.
    """
    if is_token_in_rank is None or is_token_in_rank.device.type != "cpu":
        return
    _, _, per_expert, in_rank = dispatch_layout(
        topk_idx, num_tokens_per_expert.numel(), is_token_in_rank.shape[1]
    )
    if not torch.equal(in_rank, is_token_in_rank):
        raise ValueError(
            "is_token_in_rank is not that of topk_idx; expected what get_dispatch_layout returns"
        )
    if not torch.equal(per_expert, num_tokens_per_expert):
        raise ValueError(
            "num_tokens_per_expert is not that of topk_idx; expected what get_dispatch_layout "
            "returns"
        )

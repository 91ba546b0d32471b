"""What deep_ep computes from topk_idx before a dispatch. Local; plain torch."""

from __future__ import annotations

import torch

NODE_RANKS = 8  # ranks that deep_ep takes for one node


def dispatch_layout(
    topk_idx: torch.Tensor, num_experts: int, num_ranks: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """num_tokens_per_rank, _per_rdma_rank (None within a node), _per_expert, is_token_in_rank."""
    if topk_idx.dim() != 2:
        raise ValueError(
            f"topk_idx has shape {list(topk_idx.shape)}; expected [num_tokens, num_topk]"
        )
    if num_experts < 1 or num_experts % num_ranks != 0:
        raise ValueError(
            f"num_experts is {num_experts}; expected a positive multiple of the {num_ranks} ranks"
        )
    num_tokens = topk_idx.shape[0]
    # The last column takes -1, which the remainder turns into it. An id out of range is dispatch's
    # to refuse: here, where it only must not end the CUDA context, it counts for any expert.
    columns = topk_idx.remainder(num_experts + 1).long()
    chosen = torch.zeros(num_tokens, num_experts + 1, dtype=torch.bool, device=topk_idx.device)
    chosen = chosen.scatter_(1, columns, True)[:, :num_experts]
    is_token_in_rank = chosen.view(num_tokens, num_ranks, num_experts // num_ranks).any(2)

    def count(choices: torch.Tensor) -> torch.Tensor:
        return choices.sum(0, dtype=torch.int32)

    per_node = None
    if num_ranks > NODE_RANKS and num_ranks % NODE_RANKS == 0:
        nodes = num_ranks // NODE_RANKS
        per_node = count(is_token_in_rank.view(num_tokens, nodes, NODE_RANKS).any(2))
    return count(is_token_in_rank), per_node, count(chosen), is_token_in_rank


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

"""The main job in one minute: one MoE layer over four ranks, every row checked, and bandwidth.

    python bench/demo.py

Each rank routes its own random tokens with a softmax router, dispatches them to the ranks of their
experts, runs its experts, and combines the results. All inputs are then gathered, and every row
that any rank received or got back is compared, bit by bit, with what one process computes.
"""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist

import all2all
import epcomm

RANKS = 4
TOKENS = 256
HIDDEN = 2048
EXPERTS = 16
TOPK = 4


def route(x: torch.Tensor, router: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k experts of each token, and their softmax weights."""
    probabilities = (x.float() @ router).softmax(dim=-1)
    topk_weights, topk_idx = probabilities.topk(TOPK, dim=-1)
    return topk_idx, topk_weights


def expert(index: int, rows: torch.Tensor) -> torch.Tensor:
    """A toy expert. Element by element, so that its result does not depend on the rows around."""
    return rows * (1 + index / EXPERTS) - index / 8


def gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The same tensor of all ranks; bytes, since gloo does not know every dtype."""
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather([part.view(torch.uint8) for part in parts], tensor.view(torch.uint8))
    return parts


class Oracle:
    """One process's answer, from the inputs of all ranks. Written without a line of epcomm."""

    def __init__(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor):
        self.x, self.topk_idx = gather(x), gather(topk_idx)
        self.topk_weights = gather(topk_weights)
        self.ranks = len(self.x)

    def received(self, rank: int) -> tuple[list[int], list[torch.Tensor]]:
        """Local expert and row of all that a rank gets: by expert, then source rank, then token."""
        local_experts = EXPERTS // self.ranks
        experts, rows = [], []
        for local in range(local_experts):
            for x, topk_idx in zip(self.x, self.topk_idx, strict=True):
                for token in range(TOKENS):
                    if rank * local_experts + local in topk_idx[token].tolist():
                        experts.append(local)
                        rows.append(x[token])
        return experts, rows

    def combined(self, rank: int) -> torch.Tensor:
        """Sums each rank's experts in the order of the top-k and rounds; then ranks, ascending."""
        x, topk_idx, topk_weights = self.x[rank], self.topk_idx[rank], self.topk_weights[rank]
        by_expert = torch.stack([expert(index, x) for index in range(EXPERTS)]).float()
        token = torch.arange(TOKENS)
        total = torch.zeros(TOKENS, HIDDEN)
        for owner in range(self.ranks):
            partial = torch.zeros(TOKENS, HIDDEN)
            for slot in range(TOPK):
                index = topk_idx[:, slot]
                here = (index // (EXPERTS // self.ranks) == owner)[:, None]
                weighted = topk_weights[:, slot, None] * by_expert[index, token]
                partial = torch.where(here, partial + weighted, partial)
            total += partial.to(x.dtype).float()
        return total.to(x.dtype)


def count_everywhere(value: int) -> int:
    total = torch.tensor([value])
    dist.all_reduce(total)
    return int(total.item())


def run_layer(say) -> int:
    """One MoE layer over all ranks. Returns the number of wrong rows."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(1000 + rank)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    router = torch.randn(HIDDEN, EXPERTS, generator=torch.Generator().manual_seed(7)) / HIDDEN**0.5
    topk_idx, topk_weights = route(x, router)
    say(
        f"{RANKS} ranks x {TOKENS} tokens of {HIDDEN} bf16, {EXPERTS} experts, "
        f"each token to the {TOPK} that its router likes best."
    )
    with epcomm.Buffer(
        num_experts=EXPERTS, hidden=HIDDEN, topk=TOPK, max_tokens=TOKENS, transport="cpu"
    ) as buffer:
        start = time.perf_counter()
        recv = buffer.dispatch(x, topk_idx, topk_weights, layout="expert")
        dispatched = time.perf_counter()
        offsets = recv.plan.expert_offsets.tolist()
        outputs = torch.empty_like(recv.x)
        for local in range(buffer.local_experts):
            group = slice(offsets[local], offsets[local + 1])
            outputs[group] = expert(rank * buffer.local_experts + local, recv.x[group])
        computed = time.perf_counter()
        y = buffer.combine(outputs, recv.plan, topk_weights=topk_weights)
        end = time.perf_counter()
        say(
            f"rank 0: dispatch {1e3 * (dispatched - start):.1f} ms, "
            f"experts {1e3 * (computed - dispatched):.1f} ms, "
            f"combine {1e3 * (end - computed):.1f} ms (first calls)"
        )
        return check(recv, y, Oracle(x, topk_idx, topk_weights), say)


def check(recv: epcomm.Recv, y: torch.Tensor, oracle: Oracle, say) -> int:
    """Every row against the oracle, on every rank."""
    rank = dist.get_rank()
    experts, rows = oracle.received(rank)
    if recv.topk_idx.tolist() != experts:
        wrong_received = len(rows)
    else:
        wrong_received = int((recv.x != torch.stack(rows)).any(dim=1).sum())
    wrong_combined = int((y != oracle.combined(rank)).any(dim=1).sum())
    received, wrong_received = count_everywhere(len(rows)), count_everywhere(wrong_received)
    combined, wrong_combined = count_everywhere(len(y)), count_everywhere(wrong_combined)
    say(f"dispatch: {received - wrong_received} of {received} rows equal the oracle's, bit by bit")
    say(f"combine:  {combined - wrong_combined} of {combined} rows equal the oracle's, bit by bit")
    return wrong_received + wrong_combined


def start_ranks() -> None:
    """Becomes torchrun, which starts this file once per rank."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    os.execv(sys.executable, [*torchrun, f"--nproc-per-node={RANKS}", __file__])


def main() -> int:
    if "RANK" not in os.environ:
        start_ranks()
    dist.init_process_group("gloo")

    def say(text: str) -> None:
        if dist.get_rank() == 0:
            print(text, flush=True)

    try:
        say("One MoE layer through epcomm's cpu transport\n")
        wrong = run_layer(say)
        say(f"\n{'Every row is right.' if wrong == 0 else f'{wrong} rows are WRONG.'}\n")
        say("Bandwidth beside gloo and plain memcpy (columns: docs/benchmarking.md)\n")
        sizes = ["--tokens", "8,64,512", "--hidden", "4096"]
        timed = ["--operations", "dispatch,combine"]
        failed = all2all.main(["--transport", "cpu", *sizes, *timed])
        return int(wrong > 0 or failed > 0)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())

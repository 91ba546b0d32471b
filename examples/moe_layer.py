"""Trains a small mixture-of-experts layer over ranks, beside the same layer in one process.

    torchrun --standalone --nproc-per-node 3 examples/moe_layer.py

The layer has a router, experts spread over the ranks, and a shared expert that every rank has a
copy of. Rank 0 also trains a dense layer with all experts on the tokens of all ranks, from the same
start, and compares the losses of every step. Uses the GPUs if there is one for each rank.
"""

import argparse
import os
import sys
import time
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

import epcomm
from epcomm import autograd

# Both layers compute the same sums in fp32, in another order: matrix products of other heights, and
# sums over ranks. That changes a loss by a few units of 2^-24 (6e-8) per step, and Adam carries the
# differences of one step into the next.
RELATIVE_TOLERANCE = 1e-5


class FeedForward(nn.Module):
    """num_experts feed-forward networks: x @ up, SiLU, @ down."""

    def __init__(self, num_experts: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(num_experts, hidden, 2 * hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(num_experts, 2 * hidden, hidden) * hidden**-0.5)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return nn.functional.silu(x @ self.up[expert]) @ self.down[expert]


class Router(nn.Module):
    """The topk experts of each token and their weights, which add up to 1."""

    def __init__(self, num_experts: int, hidden: int, topk: int) -> None:
        super().__init__()
        self.logits = nn.Linear(hidden, num_experts, bias=False)
        self.topk = topk

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts = self.logits(x).topk(self.topk)
        return weights.softmax(dim=1), experts


class DenseLayer(nn.Module):
    """All experts in one process."""

    def __init__(self, num_experts: int, hidden: int, topk: int) -> None:
        super().__init__()
        self.router = Router(num_experts, hidden, topk)
        self.experts = FeedForward(num_experts, hidden)
        self.shared = FeedForward(1, hidden)

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.router(x)
        y = self.shared(x, 0)
        for expert in range(len(self.experts.up)):
            token, k = (experts == expert).nonzero(as_tuple=True)
            out = self.experts(x[token], expert) * weights[token, k].unsqueeze(1)
            y = y.index_add(0, token, out)
        return y


class MoeLayer(nn.Module):
    """The same layer with the experts of this rank only. They start as those of `dense`."""

    def __init__(self, buf: epcomm.Buffer, dense: DenseLayer) -> None:
        super().__init__()
        self.buf = buf
        hidden = buf.hidden
        self.router = Router(buf.num_experts, hidden, buf.topk)
        self.experts = FeedForward(buf.local_experts, hidden)
        self.shared = FeedForward(1, hidden)
        self.router.load_state_dict(dense.router.state_dict())
        self.shared.load_state_dict(dense.shared.state_dict())
        first = buf.rank * -(-buf.num_experts // buf.num_ranks)
        with torch.no_grad():
            for mine, all_of_them in zip(
                self.experts.parameters(), dense.experts.parameters(), strict=True
            ):
                mine.copy_(all_of_them[first : first + buf.local_experts])

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.router(x)
        recv = autograd.dispatch(self.buf, x, experts, weights, layout="expert", expert_alignment=8)
        assert recv.topk_weights is not None
        # Rows of one expert lie together. Padding rows are zero, so they need no special care.
        ends = recv.expert_offsets.tolist()
        groups = [
            self.experts(recv.x[begin:end], expert)
            for expert, (begin, end) in enumerate(pairwise(ends))
        ]
        out = torch.cat(groups) if groups else recv.x
        out = out * recv.topk_weights.unsqueeze(1)
        return autograd.combine(self.buf, out, recv.plan, bias=self.shared(x, 0))

    def sum_gradients(self) -> None:
        """The gradients of experts have all ranks' tokens in them; those of copies do not yet."""
        for copy in (self.router, self.shared):
            for parameter in copy.parameters():
                dist.all_reduce(parameter.grad)


def train(args: argparse.Namespace, device: torch.device) -> None:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # all ranks draw the same start and the same data
    dense = DenseLayer(args.experts, args.hidden, args.topk).to(device)
    counts = [max(0, args.tokens - 5 * r) for r in range(num_ranks)]  # they may be uneven
    x = torch.randn(sum(counts), args.hidden, device=device)
    target = torch.tanh(x.roll(1, dims=1) * 2)
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))

    with epcomm.Buffer(
        num_experts=args.experts,
        hidden=args.hidden,
        topk=args.topk,
        max_tokens=args.tokens,
        dtype=torch.float32,
    ) as buf:
        layer = MoeLayer(buf, dense).to(device)
        if rank == 0:
            print(f"{num_ranks} ranks, transport {buf.transport}, tokens {counts}")
        optimizer = torch.optim.Adam(layer.parameters(), lr=args.lr)
        dense_optimizer = torch.optim.Adam(dense.parameters(), lr=args.lr)
        losses = []
        for step in range(args.steps):
            optimizer.zero_grad()
            loss = (layer(x[mine]) - target[mine]).square().sum() / target.numel()
            loss.backward()
            layer.sum_gradients()
            optimizer.step()
            total = loss.detach()
            dist.all_reduce(total)
            losses.append(total.item())
            if rank == 0:
                dense_optimizer.zero_grad()
                dense_loss = (dense(x) - target).square().mean()
                dense_loss.backward()
                dense_optimizer.step()
                expected = dense_loss.item()
                difference = abs(losses[-1] / expected - 1)
                print(f"step {step}: loss {losses[-1]:.7f}, dense {expected:.7f}")
                if not difference <= RELATIVE_TOLERANCE:
                    sys.exit(f"the losses differ by {difference:.1e} of their size")
        if not losses[-1] < losses[0]:
            sys.exit(f"the loss went from {losses[0]} to {losses[-1]}")
        if rank == 0:
            print(f"losses equal within {RELATIVE_TOLERANCE:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64, help="on rank 0; 5 less on each next")
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--topk", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.01)
    args = parser.parse_args()
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available() and torch.cuda.device_count() >= local_size:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    train(args, device)
    # A thread of gloo lets go of a reduction's tensor a moment after the reduction; if Python ends
    # in that moment, torch aborts (seen with torch 2.13 on a busy machine).
    time.sleep(0.5)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

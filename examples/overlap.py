"""Two micro-batches: the communication of one runs beside the experts of the other.

    torchrun --standalone --nproc-per-node 4 examples/overlap.py

Each rank's experts are one feed-forward network, and the router's weights are applied by combine.
The same work is done in turn and overlapped, the results are compared, and on GPUs the times are
printed. On CPUs a call is complete when it returns, so nothing overlaps. Uses the GPUs if there is
one for each rank.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import epcomm


@dataclass
class MicroBatch:
    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor


class Layer:
    """One forward pass over two micro-batches, in two ways."""

    def __init__(self, buf: epcomm.Buffer, device: torch.device, dtype: torch.dtype) -> None:
        self.buf = buf
        hidden = buf.hidden
        self.up, self.down = (
            (torch.randn(shape) * hidden**-0.5).to(device, dtype)
            for shape in ((hidden, 2 * hidden), (2 * hidden, hidden))
        )

    def experts(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x @ self.up) @ self.down

    def in_turn(self, batches: list[MicroBatch]) -> list[Tensor]:
        results = []
        for b in batches:
            recv = self.buf.dispatch(b.x, b.topk_idx)
            out = self.experts(recv.x)
            results.append(self.buf.combine(out, recv.plan, topk_weights=b.topk_weights))
        return results

    def overlapped(self, batches: list[MicroBatch]) -> list[Tensor]:
        # Both are sent at once, on the Buffer's own stream. The second travels while the experts
        # of this stream work on the first.
        received = [self.buf.dispatch(b.x, b.topk_idx, async_op=True) for b in batches]
        combined = []
        for b, recv in zip(batches, received, strict=True):
            recv.event.wait()
            out = self.experts(recv.x)
            # Returns to its tokens while the experts work on the next.
            combined.append(
                self.buf.combine(out, recv.plan, topk_weights=b.topk_weights, async_op=True)
            )
        for c in combined:
            c.event.wait()
        return [c.y for c in combined]

    def communication(self, batches: list[MicroBatch]) -> None:
        for b in batches:
            recv = self.buf.dispatch(b.x, b.topk_idx)
            self.buf.combine(recv.x, recv.plan, topk_weights=b.topk_weights)


def milliseconds(call: Callable[[], object], iterations: int) -> float:
    """Of the slowest rank, per call; the median."""
    samples = []
    for _ in range(iterations):
        torch.cuda.synchronize()
        dist.barrier()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        slowest = torch.tensor([(time.perf_counter() - began) * 1e3])
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        samples.append(float(slowest))
    return sorted(samples)[len(samples) // 2]


def run(args: argparse.Namespace, device: torch.device) -> None:
    rank = dist.get_rank()
    torch.manual_seed(rank)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batches = []
    for _ in range(2):
        x = torch.randn(args.tokens, args.hidden).to(device, dtype)
        weights, idx = torch.rand(args.tokens, args.experts).softmax(1).topk(args.topk)
        batches.append(MicroBatch(x, idx.to(device), weights.to(device)))
    with epcomm.Buffer(
        num_experts=args.experts,
        hidden=args.hidden,
        topk=args.topk,
        max_tokens=args.tokens,
        dtype=dtype,
    ) as buf:
        layer = Layer(buf, device, dtype)
        expected, results = layer.in_turn(batches), layer.overlapped(batches)
        if not all(map(torch.equal, results, expected)):
            sys.exit(f"rank {rank}: overlapped results differ from those made in turn")
        say = print if rank == 0 else (lambda text: None)
        say(f"{buf.num_ranks} ranks, transport {buf.transport}: the same results both ways")
        if device.type != "cuda":
            say("on the CPU a call is complete when it returns: nothing was hidden")
            return
        in_turn = milliseconds(lambda: layer.in_turn(batches), args.iterations)
        overlapped = milliseconds(lambda: layer.overlapped(batches), args.iterations)
        alone = milliseconds(lambda: layer.communication(batches), args.iterations)
        hidden = in_turn - overlapped
        say(f"in turn {in_turn:.3f} ms, overlapped {overlapped:.3f} ms")
        say(f"hidden: {hidden:.3f} ms, {hidden / alone:.0%} of {alone:.3f} ms of communication")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of each micro-batch, each rank")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=20)
    args = parser.parse_args()
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available() and torch.cuda.device_count() >= local_size:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("gloo")
    run(args, device)
    # A thread of gloo lets go of a reduction's tensor a moment after the reduction; if Python ends
    # in that moment, torch aborts (seen with torch 2.13 on a busy machine).
    time.sleep(0.5)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

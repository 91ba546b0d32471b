"""Random calls on Buffers of any transport, checked by soak.Checker; shared by several tests."""

import itertools
import os
import random
from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import launcher
from soak import Call, Checker, Shape, overwrite

SEED = int(os.environ.get("EPCOMM_TEST_SEED", "0"))
CALLS_PER_WAIT = 100  # calls after which the host asks what was wrong
HELD = 3  # received batches that stay while later calls run, and are then checked again
BATCHES_HELD = 12  # of the largest, fp32 in layout "padded": what windows have room for
MIB = 1 << 20

LARGE = {"path": "large"}
SMALL = {"path": "small"}
# Rows of one piece, of no even number of vectors, and (fp32, 28 KB) of two pieces.
LARGE_SHAPES = ((256, 600), (1040, 333), (7168, 600))
SMALL_SHAPES = ((256, 256), (1040, 77), (7168, 128))


def calls(usual: int, full: int) -> int:
    """How many, by EPCOMM_TEST_CALLS; fewer where ranks share GPUs and take turns on them."""
    wanted = os.environ.get("EPCOMM_TEST_CALLS", "")
    if wanted:
        return full if wanted == "full" else int(wanted)
    shared = launcher.RANKS_PER_GPU
    return max(1, usual // (1 if shared == 1 else 8 * shared))


def ranks(least: int = 1) -> int:
    """Ranks to run on: those of the pool."""
    size = launcher.pool("cuda").size
    if size < least:
        pytest.skip(f"needs {least} ranks, this machine has {size}")
    return size


@dataclass
class Subject:
    """One Buffer and what is known of its calls."""

    buf: Any
    checker: Checker
    device: str


def make(
    group: Any,
    device: str,
    transport: str,
    options: dict[str, Any],
    hidden: int,
    most: int,
    timeout: float = launcher.TIMEOUT_S,
    ranks_per_node: int | None = None,
) -> Subject:
    import epcomm

    # What rdma's calls return does not lie in its window.
    held = 0 if transport == "rdma" else BATCHES_HELD
    shape = Shape(group.size(), most, hidden)
    buf = epcomm.Buffer(
        group,
        num_experts=shape.num_experts,
        hidden=hidden,
        topk=shape.topk,
        max_tokens=most,
        dtype=torch.float32,  # the widest that is dispatched
        transport=transport,
        timeout=timeout,
        window_bytes=held * shape.num_experts * most * hidden * 4 + 64 * MIB,
        transport_options=options,
        ranks_per_node=ranks_per_node,
    )
    return Subject(buf, Checker(buf.rank, shape, device), device)


# Random calls.


def draw(rng: random.Random, number: int, num_ranks: int) -> dict[str, Any]:
    """How one call is made, the same on all ranks. Sizes come from the number."""
    layout = rng.choice(("token", "expert", "padded"))
    return {
        "number": number,
        "layout": layout,
        "alignment": rng.choice((1, 8, 128)) if layout == "expert" else 1,
        "dtype": rng.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)),
        "fp8": rng.random() < 0.3,
        "host_sync": rng.random() < 0.5,
        "how": rng.choice(({}, {}, {"async_op": True}, {"return_recv_hook": True})),
        "weighted": rng.random() < 0.5,
        "replays": rng.choice((0, 0, 1)),
        "in_window": [rng.random() < 0.7 for _ in range(num_ranks)],  # by rank: where outputs lie
        "num_sms": rng.choice((None, None, 1, 5, 24)),
    }


def round_trip(subject: Subject, call: Call, how: dict[str, Any]) -> Any:
    """A dispatch, its replays, and a combine, all checked; returns the last batch received."""
    buf, layout, alignment = subject.buf, how["layout"], how["alignment"]
    sms = {"num_sms": how["num_sms"]}
    batch = call.batch(how["dtype"])
    recv = buf.dispatch(
        batch.rows,
        batch.topk_idx,
        batch.topk_weights,
        layout=layout,
        expert_alignment=alignment,
        host_sync=how["host_sync"],
        **how["how"],
        **sms,
    )
    if recv.hook is not None:
        recv.hook()
    recv.event.wait()
    for _ in range(how["replays"]):
        call.check_received(recv, layout, alignment)
        overwrite(recv)
        recv = buf.dispatch(batch.rows, topk_weights=batch.topk_weights, plan=recv.plan, **sms)
    call.check_received(recv, layout, alignment)
    out = buf.combine_input(recv.plan, how["dtype"])
    if not how["in_window"][buf.rank]:
        out = torch.empty_like(out)
    call.outputs(layout, alignment, out)
    y = torch.full_like(out.view(-1, out.shape[-1])[:1], float("nan"))
    y = y.repeat(len(batch.topk_idx), 1)
    combined = buf.combine(
        out,
        recv.plan,
        topk_weights=batch.topk_weights if how["weighted"] else None,
        out=y,
        **how["how"],
        **sms,
    )
    if how["how"]:
        if combined.hook is not None:
            combined.hook()
        combined.event.wait()
    call.check_combined(y, layout, how["weighted"])
    return recv


def raise_if_wrong(subjects: list[Subject], made: dict[int, Any]) -> None:
    for subject in subjects:
        for number, count in subject.checker.wrong().items():
            raise AssertionError(
                f"{count} wrong elements in call {number}, a Buffer of {subject.checker.shape}: "
                f"{made.get(number)}"
            )


def run_calls(
    group: Any,
    device: str,
    transport: str,
    options: list[dict[str, Any]],
    shapes: tuple[tuple[int, int], ...],
    count: int,
    seed: int = SEED,
    ranks_per_node: int | None = None,
) -> int:
    """Calls in turn on one Buffer per option and shape. Returns how many were checked."""
    subjects = [
        make(group, device, transport, o, *s, ranks_per_node=ranks_per_node)
        for o, s in itertools.product(options, shapes)
    ]
    rng = random.Random(seed)
    held: deque[tuple[Call, Any, dict[str, Any]]] = deque()
    made: dict[int, Any] = {}
    for number in range(count):
        subject = subjects[rng.randrange(len(subjects))]
        how = draw(rng, number, group.size())
        how["tokens"] = subject.checker.tokens(rng)
        made[number] = how
        call = subject.checker.call(number, how["tokens"], how["fp8"])
        held.append((call, round_trip(subject, call, how), how))
        if len(held) > HELD:
            earlier, recv, of = held.popleft()
            earlier.check_received(recv, of["layout"], of["alignment"])
            overwrite(recv)
            del recv
        if number % CALLS_PER_WAIT == CALLS_PER_WAIT - 1 or number == count - 1:
            raise_if_wrong(subjects, made)
            made = {n: made[n] for n in list(made)[-2 * HELD :]}
    held.clear()
    for subject in subjects:
        subject.buf.destroy()
    return count

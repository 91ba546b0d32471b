"""What only the nccl transport has: its ways to move rows."""

from typing import Any

import pytest
import torch

import launcher
from cases import CASES, FORMATS
from checks import Layout
from launcher import TIMEOUT_S
from trial import Trial, buffer_arguments

pytestmark = pytest.mark.gpu

WAYS = (
    {"algorithm": "exact", "schedule": "grouped", "chunks": 1},
    {"algorithm": "exact", "schedule": "shifted", "chunks": 8},
    {"algorithm": "exact", "chunks": 2, "ctas": 32},
    {"algorithm": "exact", "chunks": 3},
    {"algorithm": "static", "schedule": "grouped"},
    {"algorithm": "static", "schedule": "shifted"},
    {"algorithm": "static", "schedule": "gathered"},
    {"algorithm": "small"},
    {"algorithm": "small", "schedule": "grouped"},
    {"algorithm": "window"},
    {"algorithm": "allgather"},
)


LAYOUTS = (Layout("token"), Layout("expert", 8), Layout("padded"))


def run_way(group: Any, way: dict[str, Any]) -> None:
    import epcomm

    for fmt in (FORMATS["bf16"], FORMATS["fp8"]):
        for name in ("uneven_tokens", "duplicates", "without_weights"):
            case = CASES[name]
            arguments = buffer_arguments(case, group.size(), fmt)
            # To make a communicator takes seconds: one for all layouts.
            with epcomm.Buffer(
                group, transport="nccl", timeout=TIMEOUT_S, transport_options=way, **arguments
            ) as buf:
                for layout in LAYOUTS:
                    trial = Trial(buf, case, layout, fmt, "cuda")
                    if way["algorithm"] != "exact":
                        trial.run()
                        continue
                    recv = trial.dispatch(0)
                    again = trial.dispatch(1, plan=recv.plan)
                    trial.combine(recv, 2, bias=True, out=True)
                    trial.combine_topk_weights(again, 4)
                    if trial.topk_weights is not None:
                        trial.combine(again, 3, weighted=True, out=True)
                    trial.check_held()


@pytest.mark.parametrize("way", WAYS, ids=lambda w: "-".join(map(str, w.values())))
def test_way(way: dict[str, Any]) -> None:
    pool = launcher.pool("cuda")
    if "gathered" in way.values() and pool.size < 2:
        pytest.skip("needs 2 ranks")
    num_ranks = 2 if "gathered" in way.values() else pool.size
    pool.run(num_ranks, run_way, way)


CHUNKS = (
    {"chunks": 1},
    {"chunks": 2},
    {"chunks": 3},
    {"chunks": 4, "schedule": "shifted"},
    {"chunks": 2, "ctas": 32},
)


def run_chunks(group: Any, device: str, options: dict[str, Any], layout: str) -> None:
    """Batches that are cut into chunks, with tokens in each; the plan is replayed twice."""
    import epcomm

    rank, num_ranks, topk, hidden, local_experts = group.rank(), group.size(), 4, 64, 4
    num_experts = local_experts * num_ranks
    tokens = [1500 - 400 * (r % 3) for r in range(num_ranks)]
    rng = torch.Generator().manual_seed(1)  # the same on all ranks, which so know all batches
    ids = [torch.rand(n, num_experts, generator=rng).topk(topk).indices for n in tokens]
    # Token t of rank r comes here, to the row or rows of these experts.
    mine = [one.sub(rank * local_experts) for one in ids]
    here = [((one >= 0) & (one < local_experts)) for one in mine]
    with epcomm.Buffer(
        group,
        num_experts=num_experts,
        hidden=hidden,
        topk=topk,
        max_tokens=max(tokens),
        dtype=torch.float32,
        transport="nccl",
        timeout=TIMEOUT_S,
        transport_options={"algorithm": "exact", **options},
    ) as buf:
        plan = None
        for call in range(3):
            x = [torch.randint(-8, 9, (n, hidden), generator=rng).float() for n in tokens]
            weights = [2.0 ** torch.randint(-2, 2, (n, topk), generator=rng) for n in tokens]
            given = weights[rank].to(device) if call != 1 else None
            own = {"topk_idx": ids[rank].to(device), "layout": layout} if plan is None else {}
            recv = buf.dispatch(x[rank].to(device), topk_weights=given, plan=plan, **own)
            plan = recv.plan
            if layout == "token":
                rows = torch.cat([a[h.any(1)] for a, h in zip(x, here, strict=True)])
            else:
                rows = torch.cat(
                    [
                        a[(m == e).any(1)]
                        for e in range(local_experts)
                        for a, m in zip(x, mine, strict=True)
                    ]
                )
            assert torch.equal(recv.x.cpu(), rows), f"rows of call {call}"
            if given is not None and layout == "token":
                sent = torch.cat([(w * h)[h.any(1)] for w, h in zip(weights, here, strict=True)])
                assert torch.equal(recv.topk_weights.cpu(), sent), f"weights of call {call}"
            for w in (None, weights[rank]):
                out = torch.full((tokens[rank], hidden), float("nan"), device=device)
                buf.combine(recv.x, plan, topk_weights=None if w is None else w.to(device), out=out)
                factor = torch.full((tokens[rank],), float(topk))
                if w is not None:
                    factor = w.sum(1)
                elif layout == "token":  # once from every rank that the token went to
                    owners = ids[rank].div(local_experts, rounding_mode="floor")
                    factor = torch.tensor([float(len(set(o))) for o in owners.tolist()])
                assert torch.equal(out.cpu(), x[rank] * factor[:, None]), f"sums of call {call}"


@pytest.mark.parametrize("layout", ["token", "expert"])
@pytest.mark.parametrize("options", CHUNKS, ids=lambda o: "-".join(map(str, o.values())))
def test_chunks(options: dict[str, Any], layout: str) -> None:
    pool = launcher.pool("cuda")
    pool.run(pool.size, run_chunks, "cuda", options, layout)

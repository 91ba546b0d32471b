"""epcomm.autograd against a dense layer in one process; every gradient compared with ==."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import checks
import dense_layer
import launcher
import reference
from cases import CASES, Case
from checks import Layout
from dense_layer import HIDDEN, MODES, Tensors, expert

NAMES = (
    *("uniform", "duplicates", "holes", "uneven_tokens", "every_second_rank_empty"),
    *("all_ranks_empty", "no_expert", "table_with_idle_rank", "int32", "topk_1"),
)


def make(group: Any, case: Case, **changes: Any) -> Any:
    import epcomm

    arguments = {
        "num_experts": case.experts(group.size()),
        "hidden": HIDDEN,
        "topk": case.buffer_topk,
        "max_tokens": case.max_tokens,
        "dtype": torch.float32,
        "expert_to_rank": case.table(group.size()),
        "transport": "cpu",
        "timeout": launcher.TIMEOUT_S,
    }
    return epcomm.Buffer(group, **{**arguments, **changes})


def poison(buf: Any) -> None:
    """Leaves NaN in the memory that the next calls get, where nobody writes to it."""
    device = "cuda" if buf.caps.cuda else "cpu"
    rows = torch.full((buf.max_tokens, HIDDEN), float("nan"), device=device)
    idx = torch.arange(buf.max_tokens, device=device).unsqueeze(1) % buf.num_experts
    held = [buf.dispatch(rows, idx, layout="padded") for _ in range(3)]
    for recv in held:
        recv.x.fill_(float("nan"))


def run_experts(recv: Any, layout: str, params: torch.Tensor, weighted: bool) -> torch.Tensor:
    """Every row of the layout, padding too, through this rank's experts."""
    if layout == "padded":
        out = expert(recv.x, params)
    elif layout == "expert":
        ends = recv.expert_offsets.tolist()
        parts = [
            expert(recv.x[a:b], m) for a, b, m in zip(ends[:-1], ends[1:], params, strict=True)
        ]
        # With host_sync=False rows follow the last group.
        out = torch.cat([*parts, recv.x[ends[-1] :]])
    else:
        rows = [expert(recv.x, m) for m in params]
        if not rows:
            return recv.x * 0
        if not weighted:
            return rows[0]  # combine sums them by rank: one function
        out = torch.zeros_like(recv.x)
        for e, row in enumerate(rows):
            weight = (recv.topk_weights * (recv.topk_idx == e)).sum(1, keepdim=True)
            out = out + weight * row
        return out
    return out * recv.topk_weights.unsqueeze(-1) if weighted else out


def layer(
    buf: Any, topk_idx: torch.Tensor, t: Tensors, params: torch.Tensor, mode: str, **how: Any
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """The result, what was received, and the experts' outputs."""
    from epcomm import autograd

    delivered = t.weights if mode == "delivered" else None
    recv = autograd.dispatch(buf, t.x, topk_idx, delivered, **how)
    out = run_experts(recv, how["layout"], params, delivered is not None)
    if out.requires_grad:
        out.retain_grad()
    weights = t.weights if mode == "combined" else None
    y = autograd.combine(buf, out, recv.plan, topk_weights=weights, bias=t.bias)
    return y, recv, out


def padding_of(recv: Any, layout: str) -> torch.Tensor:
    if layout == "expert":
        return recv.topk_idx < 0
    count = recv.num_tokens if layout == "token" else recv.tokens_per_expert.unsqueeze(1)
    return torch.arange(recv.x.shape[-2], device=count.device) >= count


def run_gradients(
    group: Any, layout: Layout, host_sync: bool, transport: str = "cpu", device: str = "cpu"
) -> int:
    ranks, rank, compared = group.size(), group.rank(), 0
    by_rank = layout.name == "token"
    for name in NAMES:
        case = CASES[name]
        owner = reference.owners(case.experts(ranks), ranks, case.table(ranks))
        idx = [case.topk_idx(ranks, r) for r in range(ranks)]
        mine = torch.from_numpy(idx[rank]).to(device, case.index_dtype)
        with make(group, case, transport=transport) as buf:
            for mode in MODES:
                dense = by_rank and mode != "delivered"
                ys, grads, grad_params = dense_layer.gradients(case, idx, owner, mode, dense)
                t = dense_layer.tensors(case, ranks, rank, torch.float32, device)
                experts = [rank] if dense else np.flatnonzero(owner == rank)
                matrices = dense_layer.matrices(case, ranks, torch.float32)
                params = matrices[experts].to(device).requires_grad_()
                poison(buf)
                how = {"host_sync": host_sync, **layout.arguments()}
                y, recv, out = layer(buf, mine, t, params, mode, **how)
                (y * t.grad_y).sum().backward()
                what = f"{name}, {mode}: "
                checks.equal(y.detach(), ys[rank].float().numpy(), what + "y")
                for leaf, grad, of in zip(t.leaves(), grads[rank], ("x", "w", "bias"), strict=True):
                    if of == "w" and mode == "none":
                        assert leaf.grad is None
                        continue
                    checks.equal(leaf.grad, grad.float().numpy(), f"{what}gradient of {of}")
                    compared += 1
                if len(params):
                    expected = grad_params[experts].float().numpy()
                    checks.equal(params.grad, expected, what + "gradient of the experts")
                padding = padding_of(recv, layout.name)
                assert (recv.x[padding] == 0).all() and (out.grad[padding] == 0).all(), what
    return compared


COMPARED = len(NAMES) * (3 + 3 + 2)
WAYS = pytest.mark.parametrize("host_sync", [True, False], ids=["host_sync", "no_host_sync"])
LAYOUTS = pytest.mark.parametrize(
    "layout",
    [Layout("token"), Layout("expert"), Layout("expert", 8), Layout("padded")],
    ids=lambda layout: layout.id,
)


@WAYS
@LAYOUTS
def test_gradients(layout: Layout, host_sync: bool) -> None:
    compared = launcher.pool().run(3, run_gradients, layout, host_sync)
    assert compared == [COMPARED] * 3


@pytest.mark.gpu
@WAYS
@LAYOUTS
def test_gradients_on_gpus(layout: Layout, host_sync: bool) -> None:
    pool = launcher.pool("cuda")
    compared = pool.run(pool.size, run_gradients, layout, host_sync, "nccl", "cuda", timeout=300.0)
    assert compared == [COMPARED] * pool.size


def run_replay(group: Any) -> None:
    """Two layers with one routing, a checkpoint around them, saved tensors moved elsewhere."""
    from epcomm import autograd

    case = CASES["duplicates"]
    ranks, rank = group.size(), group.rank()
    idx = torch.from_numpy(case.topk_idx(ranks, rank))
    t = dense_layer.tensors(case, ranks, rank, torch.float32)
    with make(group, case) as buf:
        for layout in ("token", "expert", "padded"):

            def two(x: torch.Tensor, w: torch.Tensor, layout: str = layout) -> torch.Tensor:
                first = autograd.dispatch(buf, x, idx, layout=layout)
                y = autograd.combine(buf, first.x, first.plan, topk_weights=w)
                again = autograd.dispatch(buf, y, None, w, plan=first.plan)
                assert again.plan is first.plan and again.topk_weights is not None
                scale = again.topk_weights.sum(1) if layout == "token" else again.topk_weights
                return autograd.combine(buf, again.x * scale.unsqueeze(-1), first.plan)

            # A row is its token's x, so y = x * the sum of the weights of the slots that exist.
            total = (t.weights * (idx >= 0)).sum(1, keepdim=True)
            expected = torch.autograd.grad(t.x * total.square(), t.leaves()[:2], t.grad_y)
            copied = torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone)
            for run in (
                two,
                lambda *a, two=two: checkpoint(two, *a, use_reentrant=False),
            ):
                with copied:
                    y = run(t.x, t.weights)
                got = torch.autograd.grad(y, t.leaves()[:2], t.grad_y)
                assert all(map(torch.equal, got, expected)), layout
            # Of gradients: x, and what multiplies it, through a backward that is differentiated.
            grad_y = t.grad_y.clone().requires_grad_()
            (grad_x,) = torch.autograd.grad(two(t.x, t.weights), t.x, grad_y, create_graph=True)
            (second,) = torch.autograd.grad(grad_x.sum(), grad_y)
            assert torch.equal(second, total.square().expand_as(second)), layout


def test_replay_checkpoint_and_second_derivative() -> None:
    launcher.pool().run(3, run_replay)


def run_random(group: Any, layout: str) -> None:
    """Real numbers: the slope of the loss along a direction, by differences and by gradients."""
    from epcomm import autograd

    case = CASES["random"]
    ranks, rank = group.size(), group.rank()
    rng = torch.Generator().manual_seed(rank)
    idx = torch.from_numpy(CASES["duplicates"].topk_idx(ranks, rank))
    shapes = [(len(idx), HIDDEN), tuple(idx.shape)]
    leaves = [torch.randn(s, generator=rng).requires_grad_() for s in shapes]
    directions = [torch.randn(s, generator=rng) for s in shapes]
    with make(group, case) as buf:

        def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            recv = autograd.dispatch(buf, x, idx, w.sigmoid(), layout=layout)
            scale = recv.topk_weights.sum(1) if layout == "token" else recv.topk_weights
            out = torch.nn.functional.silu(recv.x) * scale.unsqueeze(-1)
            return autograd.combine(buf, out, recv.plan, topk_weights=w).square().mean()

        def of_all(value: torch.Tensor) -> float:
            total = value.detach().double().reshape(1)
            dist.all_reduce(total, group=group)
            return float(total)

        grads = torch.autograd.grad(loss(*leaves), leaves)
        slope = of_all(sum((g * d).sum() for g, d in zip(grads, directions, strict=True)))
        step = 1e-2
        ends = [
            of_all(loss(*(a + s * d for a, d in zip(leaves, directions, strict=True))))
            for s in (-step, step)
        ]
        # Central differences: an error of the order of step squared, and of float32's rounding.
        assert abs((ends[1] - ends[0]) / (2 * step) - slope) < 2e-3 * max(1.0, abs(slope))
        assert abs(slope) > 0.01


@pytest.mark.parametrize("layout", ["token", "expert", "padded"])
def test_slope_of_a_random_layer(layout: str) -> None:
    launcher.pool().run(3, run_random, layout)


def run_bfloat16(group: Any) -> None:
    """Gradients have the dtypes of their inputs and take any strides."""
    from epcomm import autograd

    idx = torch.tensor([[0, 1], [2, -1], [1, 1]])
    with make(group, CASES["uniform"], hidden=8, dtype=torch.bfloat16) as buf:
        for layout in ("token", "expert", "padded"):
            x = torch.arange(24.0).view(3, 8).bfloat16().requires_grad_()
            w = torch.tensor([[1.0, 2.0], [4.0, 8.0], [0.5, 0.25]]).requires_grad_()
            recv = autograd.dispatch(buf, x, idx, layout=layout)
            y = autograd.combine(buf, recv.x, recv.plan, topk_weights=w)
            y.sum().backward()  # its gradient is one number, expanded
            total = (w * (idx >= 0)).sum(1, keepdim=True)
            assert x.grad is not None and x.grad.dtype == torch.bfloat16
            assert torch.equal(x.grad, total.expand(3, 8).bfloat16())
            assert w.grad is not None and w.grad.dtype == torch.float32
            assert torch.equal(w.grad, x.detach().float().sum(1, keepdim=True) * (idx >= 0))


def test_bfloat16() -> None:
    launcher.pool().run(2, run_bfloat16)


def run_misuse(group: Any) -> list[str]:
    import epcomm
    from epcomm import autograd

    case, texts = CASES["uniform"], []
    idx = torch.zeros(3, 1, dtype=torch.int64)
    x = torch.ones(3, HIDDEN, requires_grad=True)
    w = torch.ones(3, 1, requires_grad=True)
    buf = make(group, case)
    recv = autograd.dispatch(buf, x, idx)
    for arguments in ({}, {"topk_idx": idx, "plan": recv.plan}):
        with pytest.raises(ValueError) as error:
            autograd.dispatch(buf, x, **arguments)
        texts.append(str(error.value))
    block = recv.plan._replace(send_block=recv.plan.send_block[:-4])
    state = recv.plan._replace(state=recv.plan.state[:-1])
    with make(group, case) as other:
        for plan, of in ((block, buf), (state, buf), (recv.plan, other)):
            with pytest.raises(ValueError) as error:
                autograd.combine(of, recv.x, plan)
            texts.append(str(error.value))
    y = autograd.combine(buf, recv.x, recv.plan, topk_weights=w)
    (grad,) = torch.autograd.grad(y.sum(), w, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()
    y = autograd.combine(buf, recv.x, recv.plan)
    dist.barrier(group)
    buf.destroy()
    with pytest.raises(epcomm.BufferUnusable):
        y.sum().backward(retain_graph=True)
    del buf, recv
    with pytest.raises(ValueError) as error:
        y.sum().backward()
    return [*texts, str(error.value)]


def test_misuse() -> None:
    for missing, both, block, state, other, gone in launcher.pool().run(2, run_misuse):
        assert "missing" in missing and "given" in both
        assert "send_block" in block and "state" in state
        assert "another Buffer" in other
        assert "no Buffer of that name" in gone

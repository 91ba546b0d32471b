"""The custom ops under torch.library.opcheck and torch.compile."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import launcher
from cases import CASES
from test_autograd import HIDDEN, make

LAYOUTS = ("token", "expert", "padded")


class Alone:
    rank, size = 0, 1

    def all_gather(self, data: bytes) -> list[bytes]:
        return [data]


@pytest.fixture
def buf() -> Iterator[Any]:
    import epcomm

    with epcomm.Buffer(
        Alone(), num_experts=4, hidden=8, topk=2, max_tokens=8, transport="cpu", dtype=torch.float32
    ) as buf:
        yield buf


def inputs(num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (num_tokens, 8), generator=rng).float().requires_grad_()
    idx = torch.randint(-1, 4, (num_tokens, 2), generator=rng)
    w = torch.randint(-3, 4, (num_tokens, 2), generator=rng).float().requires_grad_()
    return x, idx, w


@pytest.mark.parametrize("host_sync", [True, False], ids=["host_sync", "no_host_sync"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(buf: Any, layout: str, host_sync: bool) -> None:
    from epcomm import autograd

    x, idx, w = inputs(5)
    recv = autograd.dispatch(buf, x.detach(), idx, w.detach(), layout=layout, host_sync=host_sync)
    plan = recv.plan
    blocks = (plan.send_block, plan.recv_block, plan.state, buf.name)
    rows = recv.x.clone().requires_grad_()
    routing = (plan.send_block, plan.state, buf.name, layout, plan.num_recv_rows)
    calls: dict[str, list[tuple[Any, ...]]] = {
        "dispatch": [(x, idx, weights, buf.name, layout, 1, host_sync) for weights in (w, None)],
        "replay": [(x, weights, *routing, plan.recv_block.shape[0]) for weights in (w, None)],
        "combine": [(rows, w, x, *blocks, layout, 5), (rows, None, None, *blocks, layout, 5)],
        "combine_topk_weights": [(recv.topk_weights, *blocks, 5, 2)],
    }
    for name, arguments in calls.items():
        # A plan differs from call to call, in its epoch and in bytes that nobody writes: here only
        # shapes, dtypes and aliases of what dispatch gives are checked, its values in all others.
        loose = {"atol": 1e3, "rtol": 1.0} if name in ("dispatch", "replay") else {}
        for args in arguments:
            done = torch.library.opcheck(getattr(torch.ops.epcomm, name), args, **loose)
            assert set(done.values()) == {"SUCCESS"}, (name, done)


def same(compiled: Any, eager: Any, *args: torch.Tensor) -> None:
    """Values and gradients of both, with ==."""
    y, expected = compiled(*args), eager(*args)
    assert torch.equal(y, expected)
    leaves = [a for a in args if a.requires_grad]
    grad_y = torch.arange(float(y.numel())).view_as(y) % 5 - 2
    grads, wanted = (torch.autograd.grad(z, leaves, grad_y) for z in (y, expected))
    assert all(map(torch.equal, grads, wanted))


def run_compiled(group: Any) -> int:
    """One graph of a layer with weights on both sides, in every layout."""
    from epcomm import autograd

    ranks, rank, case = group.size(), group.rank(), CASES["duplicates"]
    idx = torch.from_numpy(case.topk_idx(ranks, rank))
    rng = torch.Generator().manual_seed(rank)
    graphs = 0
    with (
        make(group, case) as buf,
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
    ):
        for layout in LAYOUTS:
            for host_sync in (True, False):

                def layer(
                    x: torch.Tensor,
                    w: torch.Tensor,
                    bias: torch.Tensor,
                    how: tuple[str, bool] = (layout, host_sync),
                ) -> torch.Tensor:
                    recv = autograd.dispatch(buf, x, idx, w, layout=how[0], host_sync=how[1])
                    assert recv.topk_weights is not None
                    per_row = recv.topk_weights
                    scale = per_row.sum(1) if how[0] == "token" else per_row
                    out = recv.x.square() * scale.unsqueeze(-1)
                    y = autograd.combine(buf, out, recv.plan, topk_weights=w, bias=bias)
                    again = autograd.dispatch(buf, y, plan=recv.plan)
                    return autograd.combine(buf, again.x, recv.plan)

                torch._dynamo.reset()
                counter = CompileCounterWithBackend("aot_eager")
                compiled = torch.compile(layer, backend=counter, fullgraph=True)
                for seed in range(2):
                    x, w, bias = (
                        torch.randint(-2, 3, (len(idx), n), generator=rng).float().requires_grad_()
                        for n in (HIDDEN, idx.shape[1], HIDDEN)
                    )
                    del seed
                    same(compiled, layer, x, w, bias)
                assert counter.frame_count == 1
                graphs += 1
    return graphs


def test_compiled_layer() -> None:
    assert launcher.pool().run(2, run_compiled, timeout=300.0) == [6, 6]


def test_number_of_tokens_is_dynamic(buf: Any) -> None:
    from epcomm import autograd

    def layer(x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        recv = autograd.dispatch(buf, x, idx, layout="expert")
        return autograd.combine(buf, recv.x * 2, recv.plan, topk_weights=w)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for n in (5, 3, 8, 4, 7):
            same(compiled, layer, *inputs(n, n))
        assert counter.frame_count == 1
        for n in (0, 1):  # which torch.compile takes for sizes of their own
            same(compiled, layer, *inputs(n, n))


def test_graph_breaks_without_dynamic_outputs(buf: Any) -> None:
    """The default of torch.compile: host_sync=True leaves the graph, and all is right still."""
    from epcomm import autograd

    def layer(x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        recv = autograd.dispatch(buf, x + 1, idx)
        return autograd.combine(buf, recv.x * 2, recv.plan, topk_weights=w)

    torch._dynamo.reset()
    same(torch.compile(layer, backend="aot_eager"), layer, *inputs(6))


def test_a_buffer_is_left_alone(buf: Any) -> None:
    """Its own methods, which work on addresses, are called from compiled code as they are."""

    def round_trip(x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        recv = buf.dispatch(x + 1, idx)
        return buf.combine(recv.x * 2, recv.plan, topk_weights=w)

    torch._dynamo.reset()
    args = [t.detach() for t in inputs(6)]
    assert torch.equal(torch.compile(round_trip, backend="aot_eager")(*args), round_trip(*args))


@pytest.mark.slow
def test_inductor(buf: Any) -> None:
    from epcomm import autograd

    def layer(x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        recv = autograd.dispatch(buf, x + 1, idx, layout="expert")
        return autograd.combine(buf, recv.x.square() * 2, recv.plan, topk_weights=w * 2)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        same(torch.compile(layer, fullgraph=True), layer, *inputs(6))

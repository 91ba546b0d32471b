"""torchtitan's DeepEPTokenDispatcher, which calls deep_ep's ElasticBuffer, against a dense layer.

The dispatcher is torchtitan's own, from its published package. Router and experts are written here,
with small integers and scores that are powers of two: every sum is exact, and results are compared
with ==.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import engine

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="torchtitan needs Python 3.11")

EXPERTS = 8
TOPK = 3
HIDDEN = 64
MAX_TOKENS = 40


@dataclass(frozen=True)
class Batch:
    """tokens: of every rank, as torchtitan pads them. dropped: of 8 scores how many are 0."""

    tokens: int
    experts: int = EXPERTS  # only the first ones are chosen
    dropped: int = 0


BATCHES = [
    Batch(17),
    Batch(1),
    Batch(12, experts=TOPK),
    Batch(MAX_TOKENS, dropped=3),
    Batch(6, dropped=8),
    Batch(17),
]


@dataclass
class Inputs:
    """Of one rank. ids [T, TOPK]; scores [T, TOPK], 0 where a token is dropped."""

    x: torch.Tensor
    ids: torch.Tensor
    scores: torch.Tensor
    gradient: torch.Tensor


def inputs(batch: Batch, seed: int, rank: int) -> Inputs:
    rng = torch.Generator().manual_seed(1000 * seed + rank)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=rng).to(torch.bfloat16)

    slots = (batch.tokens, TOPK)
    ids = torch.rand(batch.tokens, batch.experts, generator=rng).argsort(1)[:, :TOPK]
    scores = 2.0 ** -torch.randint(0, 4, slots, generator=rng).float()
    scores *= torch.randint(0, 8, slots, generator=rng) >= batch.dropped
    rows = (batch.tokens, HIDDEN)
    return Inputs(integers(*rows), ids, scores, integers(*rows))


def weights() -> torch.Tensor:
    """[expert, HIDDEN, HIDDEN], of each one +1 or -1 in each row and in each column."""
    rng = torch.Generator().manual_seed(5)
    w = torch.zeros(EXPERTS, HIDDEN, HIDDEN)
    for one in w:
        signs = 2.0 * torch.randint(0, 2, (HIDDEN,), generator=rng) - 1
        one[torch.arange(HIDDEN), torch.randperm(HIDDEN, generator=rng)] = signs
    return w


@dataclass
class Results:
    y: torch.Tensor
    grad_x: torch.Tensor
    grad_scores: torch.Tensor


def dense(given: Inputs, w: torch.Tensor) -> Results:
    """Every token through its experts in float64. Adds to w.grad."""
    x, scores = given.x.double().requires_grad_(), given.scores.double().requires_grad_()
    used = scores * (given.scores > 0)
    y = torch.einsum("tk,th,tkhf->tf", used, x, w[given.ids])
    y.backward(given.gradient.double())
    assert x.grad is not None and scores.grad is not None
    return Results(y.detach(), x.grad, scores.grad)


def grouped_experts(x: torch.Tensor, counts: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x: rows of one local expert after another; NaN for rows past them. No host wait."""
    expert = torch.searchsorted(counts.cumsum(0), torch.arange(len(x), device=x.device), right=True)
    there = (expert < len(w)).unsqueeze(1)
    rows = torch.where(there, x.float(), float("nan"))
    return torch.einsum("rh,rhf->rf", rows, w[expert.clamp(max=len(w) - 1)]).to(x.dtype)


def make_dispatcher(group: dist.ProcessGroup, cudagraphable: bool) -> Any:
    engine.load("torchtitan", asks=(), placeholders=("triton", "tyro"))
    import deep_ep

    deepep = importlib.import_module("torchtitan.distributed.deepep.deepep")
    module = importlib.import_module("torchtitan.models.common.token_dispatcher")
    assert deepep.ElasticBuffer is deep_ep.ElasticBuffer
    if not torch._C._dispatch_has_kernel_for_dispatch_key("deepep::dispatch", "CPU"):
        # torchtitan names its two operations for CUDA only; these are the same functions.
        deepep._lib.impl("dispatch", deepep._dispatch_op_impl, "CPU")
        deepep._lib.impl("combine", deepep._combine_op_impl, "CPU")
    config = module.DeepEPTokenDispatcher.Config(
        num_experts=EXPERTS,
        top_k=TOPK,
        hidden_dim=HIDDEN,
        num_max_tokens_per_rank=MAX_TOKENS,
        cudagraphable=cudagraphable,
    )
    dispatcher = module.DeepEPTokenDispatcher(config)
    dispatcher.wire_meshes(ep_mesh=SimpleNamespace(get_group=lambda: group))
    return dispatcher


class Layer:
    """One batch in one MoE layer, with the calls that torchtitan's makes. Forward."""

    def __init__(self, dispatcher: Any, given: Inputs, w: torch.Tensor, device: torch.device):
        self.given = given
        self.x = given.x.to(device).requires_grad_()
        self.scores = given.scores.to(device).requires_grad_()
        self.w = w.to(device, copy=True).requires_grad_()
        unused = torch.empty(0, device=device)  # counts of this rank, which DeepEP needs not
        rows, self.counts, state = dispatcher.dispatch(
            self.x, self.scores, given.ids.to(device), unused
        )
        self.y = dispatcher.combine(grouped_experts(rows, self.counts, self.w), state, self.x)

    def backward(self) -> Results:
        self.y.backward(self.given.gradient.to(self.y.device))
        assert self.x.grad is not None and self.scores.grad is not None
        return Results(self.y.detach(), self.x.grad, self.scores.grad)


def equal(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    wrong = actual.cpu().double() != expected.double()
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} values are wrong"


def on_rank(group: dist.ProcessGroup, training: bool, device_type: str) -> int:
    """All batches, two micro-batches at a time; how many rows were compared."""
    dispatcher = make_dispatcher(group, cudagraphable=not training)
    device = engine.ranks_device(device_type)
    num_local = EXPERTS // group.size()
    local = slice(group.rank() * num_local, (group.rank() + 1) * num_local)
    compared = 0
    for seed in range(0, len(BATCHES), 2):
        layers = {}
        with torch.set_grad_enabled(training):
            for s in (seed, seed + 1):
                given = inputs(BATCHES[s], s, group.rank())
                layers[s] = Layer(dispatcher, given, weights()[local], device)
        for s in (seed + 1, seed):
            check(layers[s], s, group, local, training)
            compared += len(layers[s].y)
    return compared


def check(layer: Layer, seed: int, group: dist.ProcessGroup, local: slice, training: bool) -> None:
    """Against a dense layer over the tokens of all ranks."""
    truth = weights().double().requires_grad_()
    sent = [inputs(BATCHES[seed], seed, r) for r in range(group.size())]
    expected = [dense(one, truth) for one in sent]
    mine, what = expected[group.rank()], f"batch {seed}, rank {group.rank()}"
    used = torch.cat([one.ids[one.scores > 0] for one in sent])
    equal(layer.counts, torch.bincount(used, minlength=EXPERTS)[local], f"{what}: counts")
    if not training:
        equal(layer.y, mine.y, f"{what}: y")
        return
    actual = layer.backward()
    for name in ("y", "grad_x", "grad_scores"):
        equal(getattr(actual, name), getattr(mine, name), f"{what}: {name}")
    assert truth.grad is not None and layer.w.grad is not None
    equal(layer.w.grad, truth.grad[local], f"{what}: grad of the experts")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_dispatcher(training: bool, device: str, ranks_of: Callable) -> None:
    pool = ranks_of("torchtitan", device)
    rows = pool.run(pool.size, on_rank, training, device, timeout=engine.TIMEOUT_S)
    assert rows == [sum(batch.tokens for batch in BATCHES)] * pool.size

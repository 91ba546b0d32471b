"""Megatron-Core's MoEFlexTokenDispatcher on epcomm, forward and backward, against a dense layer.

The dispatcher is Megatron's own, from its published package, and so are the process groups around
it. What a Megatron layer has before and after it, a router and experts, is written here, with small
integers and probabilities that are powers of two: every sum is exact, and results are compared
with ==.
"""

import unittest
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

import engine

VERSIONS = ["megatron-core-0.16.1", "megatron-core-0.19.2"]
EXPERTS = 8
TOPK = 3
HIDDEN = 64


@dataclass(frozen=True)
class Parallel:
    """How Megatron divides all ranks. Two expert-parallel groups work side by side if they can."""

    id: str
    ranks_per_group: int | None = None  # None: all
    expert_tensor_parallel: int = 1


PARALLEL = [Parallel("ep"), Parallel("two_ep", 2), Parallel("ep_and_etp", None, 2)]


@dataclass(frozen=True)
class Batch:
    """tokens: of each rank, repeated. dropped: how many of 8 chosen experts have no room left."""

    tokens: tuple[int, ...]
    experts: int = EXPERTS  # only the first ones are chosen
    dropped: int = 0
    hidden: int = HIDDEN


BATCHES = [
    Batch((1, 17, 4, 9)),
    Batch((0, 5, 0, 3)),
    Batch((0,)),
    Batch((0, 0, 0, 1)),
    Batch((12, 7), experts=TOPK),
    Batch((33, 20, 0, 6), dropped=3),
    Batch((6, 1, 3, 2), dropped=8),
    Batch((1, 300, 2, 40)),
    Batch((5, 2, 0, 8), hidden=2 * HIDDEN),  # Megatron replaces its buffer by a larger one
    Batch((16,)),
]


@dataclass
class Inputs:
    """Of one rank. probs [T, EXPERTS]: 0 where an expert is not chosen or has no room."""

    x: torch.Tensor
    probs: torch.Tensor
    gradient: torch.Tensor


def inputs(batch: Batch, seed: int, rank: int) -> Inputs:
    rng = torch.Generator().manual_seed(1000 * seed + rank)
    num_tokens = batch.tokens[rank % len(batch.tokens)]

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=rng).to(torch.bfloat16)

    probs = torch.zeros(num_tokens, EXPERTS)
    for row in probs:
        chosen = torch.randperm(batch.experts, generator=rng)[:TOPK]
        row[chosen] = 2.0 ** -torch.randint(0, 4, (TOPK,), generator=rng).float()
        row[chosen] *= torch.randint(0, 8, (TOPK,), generator=rng) >= batch.dropped
    shape = (num_tokens, 1, batch.hidden)
    return Inputs(integers(*shape), probs, integers(*shape))


def weights(hidden: int) -> torch.Tensor:
    """[expert, half, hidden, hidden]; a half has one +1 or -1 in each row and in each column."""
    rng = torch.Generator().manual_seed(5)
    w = torch.zeros(EXPERTS, 2, hidden, hidden)
    for half in w.view(-1, hidden, hidden):
        half[torch.arange(hidden), torch.randperm(hidden, generator=rng)] = (
            2.0 * torch.randint(0, 2, (hidden,), generator=rng) - 1
        )
    return w


@dataclass
class Results:
    y: torch.Tensor
    grad_x: torch.Tensor
    grad_probs: torch.Tensor


def dense(given: Inputs, w: torch.Tensor) -> Results:
    """Every token through every expert in float64, weighted by its probability. Adds to w.grad."""
    x = given.x.flatten(0, 1).double().requires_grad_()
    probs = given.probs.double().requires_grad_()
    y = torch.einsum("te,th,ehf->tf", probs * (given.probs > 0), x, w.sum(dim=1))
    y.backward(given.gradient.flatten(0, 1).double())
    assert x.grad is not None and probs.grad is not None
    return Results(y.detach().view(given.x.shape), x.grad.view(given.x.shape), probs.grad)


def grouped_experts(
    x: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor, w: torch.Tensor
) -> torch.Tensor:
    """w: [local expert, hidden, hidden], this rank's part. Weighted here, like Megatron's."""
    assert x.shape[0] == int(tokens_per_expert.sum()), (x.shape, tokens_per_expert)
    parts = x.float().split(tokens_per_expert.tolist())
    out = torch.cat([part @ w[e] for e, part in enumerate(parts)])
    return (out * probs.unsqueeze(-1)).to(x.dtype)


def make_dispatcher(parallel: Parallel, hidden: int, capacity: bool) -> Any:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher
    from megatron.core.transformer.transformer_config import TransformerConfig

    groups = get_default_pg_collection()
    num_local_experts = EXPERTS // groups.ep.size()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=4,
        bf16=True,
        params_dtype=torch.bfloat16,
        add_bias_linear=False,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_router_dtype="fp32",
        moe_expert_capacity_factor=1.0 if capacity else None,
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend="deepep",
        expert_model_parallel_size=groups.ep.size(),
        expert_tensor_parallel_size=parallel.expert_tensor_parallel,
    )
    first = groups.ep.rank() * num_local_experts
    return MoEFlexTokenDispatcher(
        num_local_experts, list(range(first, first + num_local_experts)), config, groups
    )


class Layer:
    """One batch in one MoE layer, with the calls that Megatron's MoELayer makes."""

    def __init__(self, dispatcher: Any, batch: Inputs, w: torch.Tensor, device: torch.device):
        """Forward."""
        self.batch = batch
        self.x = batch.x.to(device).requires_grad_()
        self.probs = batch.probs.to(device).requires_grad_()
        self.w = w.to(device, copy=True).requires_grad_()
        rows, probs = dispatcher.dispatch_preprocess(self.x, self.probs > 0, self.probs)
        rows, probs = dispatcher.token_dispatch(rows, probs)
        rows, tokens_per_expert, probs = dispatcher.dispatch_postprocess(rows, probs)
        rows = grouped_experts(rows, tokens_per_expert, probs, self.w)
        rows = dispatcher.combine_preprocess(rows)
        rows = dispatcher.token_combine(rows)
        self.y = dispatcher.combine_postprocess(rows)

    def backward(self) -> Results:
        self.y.backward(self.batch.gradient.to(self.y.device))
        assert self.x.grad is not None and self.probs.grad is not None
        return Results(self.y.detach(), self.x.grad, self.probs.grad)


def equal(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    wrong = actual.cpu().double() != expected.double()
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} values are wrong"


def on_rank(_: dist.ProcessGroup, version: str, parallel: Parallel, device_type: str) -> int:
    engine.load(version, asks=(), placeholders=("triton",))
    import deep_ep
    import megatron.core
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import fused_a2a

    # Megatron appends the commit of the git repository that it finds itself in: this one's.
    assert version.endswith(megatron.core.__version__.partition("+")[0]), megatron.core.__version__
    assert fused_a2a.HAVE_DEEP_EP and fused_a2a.Buffer is deep_ep.Buffer
    assert not fused_a2a.HAVE_HYBRIDEP
    num_ranks = dist.get_world_size()
    per_group = parallel.ranks_per_group or num_ranks
    if num_ranks % per_group or per_group <= parallel.expert_tensor_parallel:
        raise unittest.SkipTest(f"{parallel.id} does not divide {num_ranks} ranks")
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=per_group // parallel.expert_tensor_parallel,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel,
        create_gloo_process_groups=False,
    )
    try:
        return run_batches(parallel, engine.ranks_device(device_type))
    finally:
        fused_a2a._buffer = None
        parallel_state.destroy_model_parallel()


def run_batches(parallel: Parallel, device: torch.device) -> int:
    """All batches, two micro-batches at a time; how many rows were compared."""
    from megatron.core import parallel_state

    members = dist.get_process_group_ranks(
        parallel_state.get_expert_tensor_and_model_parallel_group()
    )
    parts, rank = parallel.expert_tensor_parallel, dist.get_rank()
    num_local = EXPERTS * parts // len(members)
    first = parallel_state.get_expert_model_parallel_rank() * num_local
    local = slice(first, first + num_local)
    mine = parallel_state.get_expert_tensor_parallel_rank() if parts > 1 else slice(2)
    dispatchers: dict[tuple[int, bool], Any] = {}
    compared = 0
    for seed in range(0, len(BATCHES), 2):
        layers = {}
        for s in (seed, seed + 1):
            batch = BATCHES[s]
            key = (batch.hidden, batch.dropped > 0)
            if key not in dispatchers:
                dispatchers[key] = make_dispatcher(parallel, *key)
            w = weights(batch.hidden)[local, mine].view(num_local, -1, *2 * [batch.hidden]).sum(1)
            layers[s] = Layer(dispatchers[key], inputs(batch, s, rank), w, device)
        for s in (seed + 1, seed):
            check(layers[s], s, members, local)
            compared += layers[s].y.shape[0]
    return compared


def check(layer: Layer, seed: int, members: list[int], local: slice) -> None:
    """Backward, then all results against those of a dense layer over the tokens of all members."""
    batch, rank = BATCHES[seed], dist.get_rank()
    actual = layer.backward()
    truth = weights(batch.hidden).double().requires_grad_()
    expected = {r: dense(inputs(batch, seed, r), truth) for r in members}
    what = f"batch {seed}, rank {rank}"
    for name in ("y", "grad_x", "grad_probs"):
        equal(getattr(actual, name), getattr(expected[rank], name), f"{what}: {name}")
    assert truth.grad is not None and layer.w.grad is not None
    # The gradient of a half is that of the sum of both.
    equal(layer.w.grad, truth.grad[local, 0], f"{what}: grad of the experts")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("parallel", PARALLEL, ids=lambda p: p.id)
@pytest.mark.parametrize("version", VERSIONS)
def test_flex_dispatcher(version: str, parallel: Parallel, device: str, ranks_of: Callable) -> None:
    pool = ranks_of(version, device)
    rows = pool.run(pool.size, on_rank, version, parallel, device, timeout=engine.TIMEOUT_S)
    for rank, compared in enumerate(rows):
        assert compared == sum(b.tokens[rank % len(b.tokens)] for b in BATCHES)

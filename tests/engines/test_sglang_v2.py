"""SGLang's DeepEPv2Dispatcher, which calls deep_ep's ElasticBuffer, against a dense layer."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

import engine
import sglang_batches
from sglang_batches import ALIGNMENT, HIDDEN, LOCAL_EXPERTS, MAX_TOKENS, SHAPES, TOPK, Batch, Inputs


@dataclass(frozen=True)
class Case:
    """expand: whether rows of a prefill come grouped by expert, as those of a decode always do."""

    id: str
    fp8: bool
    expand: bool


CASES = [
    Case("expanded-bf16", False, True),
    Case("expanded-fp8", True, True),
    Case("rows_per_rank-bf16", False, False),
    Case("rows_per_rank-fp8", True, False),
]
BATCHES = [Batch(prefill=prefill, **shape) for shape in SHAPES for prefill in (True, False)]


def as_sent(batch: Batch, given: Inputs) -> Inputs:
    """SGLang sends a token of weight 0 from a rank that has none in a prefill."""
    if not batch.prefill or len(given.x) > 0:
        return given
    return Inputs(torch.zeros(1, HIDDEN), torch.arange(TOPK).unsqueeze(0), torch.zeros(1, TOPK))


def run_experts(received: Any, first: int, sent: Sequence[Inputs]) -> Any:
    """What SGLang's runner of the experts does between dispatch and combine."""
    from sglang.srt.layers.moe.token_dispatcher.deepep_v2 import DeepEPv2CombineInput

    counts = sglang_batches.counts(sent, first)
    x = sglang_batches.dequantised(received.hidden_states, received.hidden_states_scale)
    weights = received.topk_weights
    if not received.is_expanded:
        y = torch.zeros_like(x)
        for e, count in enumerate(counts):
            chosen = received.topk_ids == e
            assert int(chosen.sum()) == count
            weight = (weights * chosen).sum(dim=1, keepdim=True).to(x.dtype)
            y += weight * sglang_batches.expert(x, first + e)
        return DeepEPv2CombineInput(y, weights)
    y, begin = torch.full_like(x, float("nan")), 0
    for e, end in enumerate(received.psum_num_recv_tokens_per_expert.tolist()):
        assert end - begin == counts[e], (received.psum_num_recv_tokens_per_expert, counts)
        rows = slice(begin, end)
        answer = sglang_batches.expert(x[rows], first + e)
        y[rows] = (answer * weights[rows].unsqueeze(-1)).to(y.dtype)
        begin = -(-end // ALIGNMENT) * ALIGNMENT
    return DeepEPv2CombineInput(y, None)


def on_rank(group: dist.ProcessGroup, case: Case, device_type: str) -> int:
    deepep_v2 = sglang_batches.load("deepep_v2")
    import deep_ep
    from sglang.srt.environ import envs
    from sglang.srt.layers.dp_attention import set_is_extend_in_batch
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    assert deepep_v2.use_deepep_v2 and deepep_v2.ElasticBuffer is deep_ep.ElasticBuffer
    sglang_batches.configure(deepep_v2, moe_a2a_backend="deepep")
    os.environ["SGLANG_DEEPEP_V2_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] = str(MAX_TOKENS)
    os.environ["SGLANG_DEEPEP_V2_ENABLE_PREFILL_EXPAND"] = str(int(case.expand))
    # SGLang 0.5.21 cannot: there these cases differ in nothing but their name.
    expand = case.expand and hasattr(envs, "SGLANG_DEEPEP_V2_ENABLE_PREFILL_EXPAND")
    dispatcher = deepep_v2.DeepEPv2Dispatcher(
        group=group,
        router_topk=TOPK,
        num_experts=LOCAL_EXPERTS * group.size(),
        num_local_experts=LOCAL_EXPERTS,
        hidden_size=HIDDEN,
        params_dtype=torch.bfloat16,
        use_fp8_dispatch=case.fp8,
    )
    device = engine.ranks_device(device_type)
    returned = 0
    for seed, batch in enumerate(BATCHES):
        set_is_extend_in_batch(batch.prefill)
        given = sglang_batches.inputs_of_ranks(batch, group.size(), seed)
        mine = given[group.rank()]
        x, ids, weights = (t.to(device) for t in (mine.x, mine.topk_idx, mine.topk_weights))
        received = dispatcher.dispatch(x, StandardTopKOutput(weights, ids, torch.empty(0)))
        assert received.is_expanded == (expand or not batch.prefill)
        sent = [as_sent(batch, one) for one in given]
        y = dispatcher.combine(run_experts(received, group.rank() * LOCAL_EXPERTS, sent))
        returned += sglang_batches.check(y, mine, f"batch {seed}, {batch}, rank {group.rank()}")
    return returned


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_dispatcher(case: Case, device: str, ranks_of: Callable) -> None:
    pool = ranks_of("sglang", device)
    returned = pool.run(pool.size, on_rank, case, device, timeout=engine.TIMEOUT_S)
    for rank, tokens in enumerate(returned):
        assert tokens == sum(b.tokens[rank % len(b.tokens)] for b in BATCHES)

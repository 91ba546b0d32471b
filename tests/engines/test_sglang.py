"""SGLang's DeepEPDispatcher on epcomm, normal and low-latency, against a dense layer.

The dispatcher is SGLang's own, from its published package; results are compared with ==.

SGLang refuses to combine in normal mode unless DeepGEMM is there to run the experts. Where it is
not, as on any machine without a GPU, it is said to be, and the kernel that quantises for it before
a normal dispatch is replaced. Without a GPU the number of its SMs is made up, too.
"""

import json
import os
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

import engine
import launcher
import sglang_batches
from sglang_batches import (
    ALIGNMENT,
    HIDDEN,
    LOCAL_EXPERTS,
    LOW_LATENCY,
    MAX_TOKENS,
    NORMAL,
    SHAPES,
    TOPK,
    Batch,
    Inputs,
)

LARGE = Batch((1, 300, 2, 40), NORMAL)
PREFILLS = [*(Batch(prefill=NORMAL, **shape) for shape in SHAPES), LARGE, Batch((3, 9), NORMAL)]
DECODES = [Batch(prefill=LOW_LATENCY, **shape) for shape in SHAPES]
MIXED = [batch for pair in zip(PREFILLS, DECODES, strict=False) for batch in pair]


@dataclass(frozen=True)
class Case:
    """How a server was started, and what its dispatchers do."""

    id: str
    mode: str
    batches: Sequence[Batch]
    dtype: str = "bf16"
    asynchronous: bool = True  # normal mode returns events, low-latency mode hooks
    config: dict[str, Any] = field(default_factory=dict, hash=False)


CHUNKS = {
    "num_sms": 24,
    "num_max_nvl_chunked_send_tokens": 16,
    "num_max_nvl_chunked_recv_tokens": 512,
    "num_max_rdma_chunked_send_tokens": 16,
    "num_max_rdma_chunked_recv_tokens": 512,
}
CASES = [
    Case("normal-bf16", "normal", PREFILLS),
    Case("normal-fp8", "normal", PREFILLS, "fp8"),
    Case("normal-synchronous", "normal", PREFILLS, asynchronous=False),
    Case(
        "normal-deepep_config",
        "normal",
        PREFILLS,
        config={"normal_dispatch": CHUNKS, "normal_combine": CHUNKS},
    ),
    Case("low_latency-bf16", "low_latency", DECODES),
    Case("low_latency-fp8", "low_latency", DECODES, "fp8"),
    Case("low_latency-without_hook", "low_latency", DECODES, "fp8", asynchronous=False),
    Case("auto-bf16", "auto", MIXED),
    Case("auto-fp8", "auto", MIXED, "fp8"),
]


def run_experts(received: Any, first: int, sent: Sequence[Inputs]) -> Any:
    """What SGLang's runner of the experts does between dispatch and combine, for either mode."""
    from sglang.srt.layers.moe.token_dispatcher import deepep

    counts = sglang_batches.counts(sent, first)
    x = sglang_batches.dequantised(received.hidden_states, received.hidden_states_scale)
    if isinstance(received, deepep.DeepEPLLDispatchOutput):
        num_rows = len(sent) * MAX_TOKENS
        assert x.shape == (LOCAL_EXPERTS, num_rows, HIDDEN), x.shape
        assert received.masked_m.tolist() == counts, (received.masked_m, counts)
        y = torch.full_like(x, float("nan"))  # nobody may look at the rows beyond
        for e, count in enumerate(counts):
            y[e, :count] = sglang_batches.expert(x[e, :count], first + e)
        return deepep.DeepEPLLCombineInput(y, received.topk_ids, received.topk_weights)
    aligned = [-(-count // ALIGNMENT) * ALIGNMENT for count in counts]
    assert received.num_recv_tokens_per_expert == aligned, (received, aligned)
    y = torch.zeros_like(x)
    for e, count in enumerate(counts):
        chosen = received.topk_ids == e
        assert int(chosen.sum()) == count
        weights = (received.topk_weights * chosen).sum(dim=1, keepdim=True)
        y += weights.to(x.dtype) * sglang_batches.expert(x, first + e)
    return deepep.DeepEPNormalCombineInput(y, received.topk_ids, received.topk_weights)


def start(case: Case, device: str) -> None:
    from sglang.srt.layers.moe.token_dispatcher import deepep
    from sglang.srt.runtime_context import get_resources

    sglang_batches.configure(
        deepep,
        moe_a2a_backend="deepep",
        deepep_mode=case.mode,
        deepep_dispatcher_output_dtype=case.dtype,
        deepep_config=json.dumps(case.config) if case.config else None,
    )
    os.environ["SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] = str(MAX_TOKENS)
    # A server lives as long as its process; here the next one follows in the same.
    get_resources().buffers.pop("deepep_ep_state", None)
    deepep.DeepEPConfig._instance = None
    if device == "cpu":
        gpu = types.SimpleNamespace(multi_processor_count=132)
        torch.cuda.get_device_properties = lambda device=None: gpu


def make_dispatcher(case: Case, group: dist.ProcessGroup) -> Any:
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPDispatcher
    from sglang.srt.layers.moe.utils import DeepEPMode

    return DeepEPDispatcher(
        group=group,
        router_topk=TOPK,
        permute_fusion=True,
        num_experts=LOCAL_EXPERTS * group.size(),
        num_local_experts=LOCAL_EXPERTS,
        hidden_size=HIDDEN,
        params_dtype=torch.bfloat16,
        deepep_mode=DeepEPMode(case.mode),
        async_finish=case.asynchronous,
        return_recv_hook=case.asynchronous,
    )


class Layer:
    """A dispatcher with its experts, and one batch on its way through them."""

    def __init__(self, case: Case, group: dist.ProcessGroup, device: torch.device):
        self.dispatcher = make_dispatcher(case, group)
        self.rank, self.num_ranks, self.device = group.rank(), group.size(), device

    def dispatch_a(self, batch: Batch, seed: int) -> None:
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        self.what = f"batch {seed}, {batch}, rank {self.rank}"
        self.sent = sglang_batches.inputs_of_ranks(batch, self.num_ranks, seed)
        mine = self.sent[self.rank]
        x, ids, weights = (t.to(self.device) for t in (mine.x, mine.topk_idx, mine.topk_weights))
        self.dispatcher.dispatch_a(x, StandardTopKOutput(weights, ids, torch.empty(0)))

    def dispatch_b_and_combine_a(self) -> None:
        received = self.dispatcher.dispatch_b()
        answer = run_experts(received, self.rank * LOCAL_EXPERTS, self.sent)
        self.dispatcher.combine_a(answer)

    def combine_b(self) -> int:
        """How many tokens came back right."""
        return sglang_batches.check(self.dispatcher.combine_b(), self.sent[self.rank], self.what)


def on_rank(group: dist.ProcessGroup, case: Case, device_type: str) -> int:
    deepep = sglang_batches.load("deepep")
    import deep_ep

    assert deepep.use_deepep and deepep.Buffer is deep_ep.Buffer
    return run_batches(group, case, device_type)


def run_batches(group: dist.ProcessGroup, case: Case, device_type: str) -> int:
    """How many tokens came back right."""
    from sglang.srt.layers.dp_attention import set_is_extend_in_batch

    start(case, device_type)
    layers = [Layer(case, group, engine.ranks_device(device_type)) for _ in range(2)]
    returned = 0
    for seed, batch in enumerate(case.batches):
        set_is_extend_in_batch(batch.prefill)
        layer = layers[seed % 2]
        layer.dispatch_a(batch, seed)
        layer.dispatch_b_and_combine_a()
        returned += layer.combine_b()
    for seed, batch in enumerate(case.batches):
        # Two batches in flight, as with SGLang's two-batch overlap.
        set_is_extend_in_batch(batch.prefill)
        for i, layer in enumerate(layers):
            layer.dispatch_a(batch, 100 + 2 * seed + i)
        for layer in layers:
            layer.dispatch_b_and_combine_a()
        returned += sum(layer.combine_b() for layer in layers)
    return returned


def tokens_of(case: Case, rank: int) -> int:
    """What run_batches must return: every batch once alone, and twice with two in flight."""
    return 3 * sum(batch.tokens[rank % len(batch.tokens)] for batch in case.batches)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_dispatcher(case: Case, device: str, ranks_of: Callable) -> None:
    pool = ranks_of("sglang", device)
    returned = pool.run(pool.size, on_rank, case, device, timeout=engine.TIMEOUT_S)
    assert returned == [tokens_of(case, rank) for rank in range(pool.size)]


def with_the_plugin(group: dist.ProcessGroup, _: launcher.Parent) -> int:
    deepep = sglang_batches.load("deepep", install=False)
    # The case that the plugin is for: SGLang has looked for deep_ep, and not found it.
    assert not deepep.use_deepep
    os.environ["EPCOMM_DEEP_EP"] = "1"
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from epcomm.compat import deep_ep

    assert deepep.use_deepep and deepep.Buffer is deep_ep.Buffer
    return run_batches(group, CASES[-1], "cpu")


def test_plugin() -> None:
    """EPCOMM_DEEP_EP=1 and SGLang's own loader of plugins put epcomm in the place of deep_ep."""
    with launcher.spawn(2, with_the_plugin) as ranks:
        returned = ranks.results(timeout=engine.TIMEOUT_S)
    assert returned == [tokens_of(CASES[-1], rank) for rank in range(2)]

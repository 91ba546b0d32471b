"""What the tests of SGLang's dispatchers send, and what must come back.

Values are chosen so that sums are exact and so that FP8 with a scale per 128 values holds them
exactly.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import engine

LOCAL_EXPERTS = 5
TOPK = 4
HIDDEN = 256
MAX_TOKENS = 40  # of a rank, where SGLang bounds them
ALIGNMENT = 128  # of the groups that DeepGEMM takes
NORMAL, LOW_LATENCY = True, False


@dataclass(frozen=True)
class Batch:
    """tokens: of each rank, repeated. prefill: normal mode, where the dispatcher chooses itself."""

    tokens: tuple[int, ...]
    prefill: bool = LOW_LATENCY
    experts: int | None = None  # only the first ones are chosen; None: all
    holes: float = 0.0  # share of the slots that choose no expert
    padding: int = 0  # last tokens choose no expert, as in SGLang's padded batches


SHAPES = [
    {"tokens": (1, 17, 4, 9)},
    {"tokens": (0, 5, 0, 3)},
    {"tokens": (0,)},
    {"tokens": (0, 0, 0, 1)},
    {"tokens": (12, 7), "experts": TOPK},
    {"tokens": (33, 20, 0, 6), "holes": 0.5},
    {"tokens": (8,), "padding": 3},
    {"tokens": (4, 2), "holes": 1.0},
    {"tokens": (MAX_TOKENS,)},
]


@dataclass
class Inputs:
    """Of one rank. x [T, HIDDEN], topk_idx [T, TOPK] with -1 where a slot chooses no expert."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


def inputs(batch: Batch, num_experts: int, seed: int, rank: int) -> Inputs:
    rng = torch.Generator().manual_seed(1000 * seed + rank)
    num_tokens = batch.tokens[rank % len(batch.tokens)]
    # Multiples of 1/2 up to 7/2, with 7/2 in each 128: the FP8 scale, 3.5 / 448, is a power of two.
    x = torch.randint(-7, 8, (num_tokens, HIDDEN), generator=rng) / 2
    x[:, ::128] = 3.5
    chosen = torch.rand(num_tokens, batch.experts or num_experts, generator=rng)
    topk_idx = chosen.topk(TOPK, dim=1).indices.int()
    topk_idx[torch.rand(topk_idx.shape, generator=rng) < batch.holes] = -1
    topk_idx[num_tokens - batch.padding :] = -1
    topk_weights = 2.0 ** -torch.randint(0, 3, topk_idx.shape, generator=rng).float()
    return Inputs(x.bfloat16(), topk_idx, topk_weights)


def inputs_of_ranks(batch: Batch, num_ranks: int, seed: int) -> list[Inputs]:
    return [inputs(batch, LOCAL_EXPERTS * num_ranks, seed, rank) for rank in range(num_ranks)]


def expert(x: torch.Tensor, e: int) -> torch.Tensor:
    """Expert e: exchanges the columns and changes signs. Another for each e, exact in any dtype."""
    return x.roll(7 * e + 1, dims=-1) * (1 if e % 2 else -1)


def dense(given: Inputs) -> torch.Tensor:
    y = torch.zeros(given.x.shape, dtype=torch.float64)
    for token, (ids, weights) in enumerate(zip(given.topk_idx, given.topk_weights, strict=True)):
        for e, weight in zip(ids.tolist(), weights.tolist(), strict=True):
            if e >= 0:
                y[token] += weight * expert(given.x[token].double(), e)
    return y


def quantise(x: torch.Tensor, group_size: int, **_: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of SGLang's kernel: FP8 and a scale for each group of a row."""
    groups = x.float().unflatten(-1, (-1, group_size))
    scales = groups.abs().amax(dim=-1).clamp(min=1e-10) / 448
    return (groups / scales.unsqueeze(-1)).flatten(1).to(torch.float8_e4m3fn), scales


def dequantised(x: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    if scales is None:
        assert x.dtype == torch.bfloat16
        return x
    assert x.dtype == torch.float8_e4m3fn and scales.shape == (*x.shape[:-1], HIDDEN // 128)
    values = x.float().unflatten(-1, (-1, 128)) * scales.float().unsqueeze(-1)
    return values.flatten(-2).bfloat16()


def counts(sent: Sequence[Inputs], first: int) -> list[int]:
    """Of the local experts of one rank."""
    return [sum(int((s.topk_idx == first + e).sum()) for s in sent) for e in range(LOCAL_EXPERTS)]


def check(y: torch.Tensor, given: Inputs, what: str) -> int:
    """Against the dense layer; how many tokens came back right."""
    expected = dense(given)
    assert y.dtype == torch.bfloat16 and y.shape == expected.shape, (what, y.shape)
    wrong = y.cpu().double() != expected
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} values are wrong"
    return y.shape[0]


def load(dispatcher: str, install: bool = True) -> Any:
    """A module of SGLang's dispatchers.

    install: put epcomm in the place of deep_ep, before the module looks for it.
    """
    engine.load(
        "sglang",
        asks=("transformers.models.auto.image_processing_auto", "transformers.processing_utils"),
        placeholders=("triton", "torchvision", "sgl_kernel"),
        install=install,
    )
    return importlib.import_module(f"sglang.srt.layers.moe.token_dispatcher.{dispatcher}")


def configure(module: Any, **server_args: Any) -> None:
    """What SGLang's scheduler does before it makes a model. module: of the dispatchers."""
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.runtime_context import get_context

    get_context().override_server_args(**server_args).install()
    initialize_moe_config()
    if importlib.util.find_spec("deep_gemm") is None:
        deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM = True
        module.sglang_per_token_group_quant_fp8 = quantise

"""Wrong arguments raise before any peer can block, and say what is wrong.

In most tests the last rank makes the mistake while its peers already wait in the right call; then
it makes the right call too, and everybody must be served.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import launcher

HIDDEN, TOPK, EXPERTS, MAX_TOKENS, T = 64, 4, 6, 8, 5


class Setup:
    """A Buffer and arguments that it takes."""

    def __init__(self, group: Any, **changes: Any):
        import epcomm

        self.group = group
        self.arguments: dict[str, Any] = {
            "num_experts": EXPERTS,
            "hidden": HIDDEN,
            "topk": TOPK,
            "max_tokens": MAX_TOKENS,
            "transport": "cpu",
            "timeout": launcher.TIMEOUT_S,
        } | changes
        self.buf = epcomm.Buffer(group, **self.arguments)
        self.x = torch.ones(T, self.arguments["hidden"], dtype=torch.bfloat16)
        self.idx = torch.arange(T * TOPK).reshape(T, TOPK) % EXPERTS
        self.w = torch.ones(T, TOPK)
        self.recv = self.dispatch()
        self.other_plan: Any = None

    def dispatch(self, **changes: Any) -> Any:
        arguments = {"x": self.x, "topk_idx": self.idx, "topk_weights": self.w} | changes
        return self.buf.dispatch(arguments.pop("x"), **arguments)

    def replay(self, **changes: Any) -> Any:
        return self.dispatch(**{"topk_idx": None, "plan": self.recv.plan} | changes)

    def combine(self, **changes: Any) -> torch.Tensor:
        arguments = {"x": self.recv.x, "plan": self.recv.plan} | changes
        return self.buf.combine(arguments.pop("x"), arguments.pop("plan"), **arguments)

    def with_id(self, token: int, slot: int, value: int) -> torch.Tensor:
        idx = self.idx.clone()
        idx[token, slot] = value
        return idx


FP8 = torch.float8_e4m3fn


def _fp8(rows: int = T, width: int = HIDDEN) -> torch.Tensor:
    return torch.zeros(rows, width).to(FP8)


# id, the mistake, the words that its message must have: argument, value, expectation.
Mistake = tuple[str, Callable[[Setup], Any], tuple[str, ...]]
DISPATCH_MISTAKES: list[Mistake] = [
    ("dtype", lambda s: s.dispatch(x=s.x.to(torch.int16)), ("x", "int16", "bfloat16")),
    ("dtype_float64", lambda s: s.dispatch(x=s.x.double()), ("x", "float64", "bfloat16")),
    (
        "dtype_wider_than_the_buffer",
        lambda s: s.dispatch(x=s.x.float()),
        ("x", "float32", "bfloat16"),
    ),
    ("device", lambda s: s.dispatch(x=s.x.to("meta")), ("x", "meta", "cpu")),
    ("not_contiguous", lambda s: s.dispatch(x=s.x.repeat(1, 2)[:, ::2]), ("x", "contiguous")),
    (
        "rows_apart",
        lambda s: s.dispatch(x=s.x.repeat(1, 2)[:, :HIDDEN]),
        ("x", str(2 * HIDDEN), "contiguous"),
    ),
    ("hidden", lambda s: s.dispatch(x=s.x[:, :32].contiguous()), ("x", "32", str(HIDDEN))),
    ("one_dimension", lambda s: s.dispatch(x=s.x[0]), ("x", f"[{HIDDEN}]", "num_tokens")),
    (
        "three_dimensions",
        lambda s: s.dispatch(x=s.x[None]),
        ("x", f"[1, {T}, {HIDDEN}]", "num_tokens"),
    ),
    (
        "too_many_tokens",
        lambda s: s.dispatch(
            x=s.x[:1].repeat(9, 1),
            topk_idx=s.idx[:1].repeat(9, 1),
            topk_weights=s.w[:1].repeat(9, 1),
        ),
        ("9", "max_tokens", "8"),
    ),
    ("idx_dtype", lambda s: s.dispatch(topk_idx=s.idx.float()), ("topk_idx", "float32", "int64")),
    ("idx_int16", lambda s: s.dispatch(topk_idx=s.idx.short()), ("topk_idx", "int16", "int32")),
    ("idx_device", lambda s: s.dispatch(topk_idx=s.idx.to("meta")), ("topk_idx", "meta", "cpu")),
    ("idx_tokens", lambda s: s.dispatch(topk_idx=s.idx[:3]), ("topk_idx", "3", str(T))),
    (
        "idx_topk",
        lambda s: s.dispatch(topk_idx=s.idx.repeat(1, 2), topk_weights=s.w.repeat(1, 2)),
        ("topk", "8", str(TOPK)),
    ),
    ("idx_one_dimension", lambda s: s.dispatch(topk_idx=s.idx[0]), ("topk_idx", "topk")),
    (
        "idx_stride",
        lambda s: s.dispatch(topk_idx=s.idx.repeat(1, 2)[:, ::2]),
        ("topk_idx", "contiguous"),
    ),
    (
        "expert_too_large",
        lambda s: s.dispatch(topk_idx=s.with_id(3, 2, EXPERTS)),
        ("rank 1", "token 3", "slot 2", "6", "[0, 6)"),
    ),
    (
        "expert_negative",
        lambda s: s.dispatch(topk_idx=s.with_id(0, 1, -2)),
        ("rank 1", "token 0", "slot 1", "-2", "-1"),
    ),
    (
        "expert_of_more_than_32_bits",
        lambda s: s.dispatch(topk_idx=s.with_id(4, 3, 2**32 + 1)),
        ("rank 1", "token 4", "slot 3", str(2**32 + 1)),
    ),
    (
        "weights_dtype",
        lambda s: s.dispatch(topk_weights=s.w.double()),
        ("topk_weights", "float64", "float32"),
    ),
    ("weights_shape", lambda s: s.dispatch(topk_weights=s.w[:, :2]), ("topk_weights", "2", "4")),
    (
        "weights_stride",
        lambda s: s.dispatch(topk_weights=s.w.repeat(1, 2)[:, ::2]),
        ("topk_weights", "contiguous"),
    ),
    (
        "weights_device",
        lambda s: s.dispatch(topk_weights=s.w.to("meta")),
        ("topk_weights", "meta", "cpu"),
    ),
    (
        "async_and_hook",
        lambda s: s.dispatch(async_op=True, return_recv_hook=True),
        ("async_op", "return_recv_hook"),
    ),
    ("num_sms_0", lambda s: s.dispatch(num_sms=0), ("num_sms", "0", "1")),
    ("x_three_parts", lambda s: s.dispatch(x=(s.x, s.x, s.x)), ("x", "3", "pair")),
    (
        "layout",
        lambda s: s.dispatch(layout="rows"),
        ("layout", "rows", "token", "expert", "padded"),
    ),
    ("quant", lambda s: s.dispatch(quant="int3"), ("quant", "int3", "fp8")),
    (
        "alignment_0",
        lambda s: s.dispatch(layout="expert", expert_alignment=0),
        ("expert_alignment", "0", "1"),
    ),
    (
        "alignment_negative",
        lambda s: s.dispatch(layout="expert", expert_alignment=-8),
        ("expert_alignment", "-8", "1"),
    ),
    ("idx_and_plan", lambda s: s.dispatch(plan=s.recv.plan), ("topk_idx", "plan")),
    ("neither_idx_nor_plan", lambda s: s.dispatch(topk_idx=None), ("topk_idx", "plan")),
    ("plan_of_another_buffer", lambda s: s.replay(plan=s.other_plan), ("plan", "another Buffer")),
    ("replay_tokens", lambda s: s.replay(x=s.x[:2], topk_weights=None), ("x", "2", str(T))),
    (
        "replay_weights_shape",
        lambda s: s.replay(topk_weights=s.w[:, :2].contiguous()),
        ("topk_weights", "2", "4"),
    ),
    ("fp8_without_scales", lambda s: s.dispatch(x=_fp8()), ("x", "float8_e4m3fn", "bfloat16")),
    (
        "scales_dtype",
        lambda s: s.dispatch(x=(_fp8(), torch.ones(T, 1, dtype=torch.float64))),
        ("x[1]", "float64", "float32"),
    ),
    ("scales_tokens", lambda s: s.dispatch(x=(_fp8(), torch.ones(3, 1))), ("x[1]", "3", str(T))),
    (
        "scales_shape",
        lambda s: s.dispatch(x=(_fp8(), torch.ones(T))),
        ("x[1]", f"[{T}]", "num_scales"),
    ),
    (
        "scales_stride",
        lambda s: s.dispatch(x=(_fp8(), torch.ones(T, 4)[:, ::2])),
        ("x[1]", "contiguous"),
    ),
    ("fp8_hidden", lambda s: s.dispatch(x=(_fp8(T, 48), torch.ones(T, 1))), ("48", str(HIDDEN))),
    (
        "packed_row_bytes",
        lambda s: s.dispatch(x=(torch.zeros(T, 24, dtype=torch.uint8), torch.ones(T, 1))),
        ("24", "16"),
    ),
    (
        "quant_of_quantised",
        lambda s: s.dispatch(x=(_fp8(), torch.ones(T, 1)), quant="fp8"),
        ("quant", "fp8"),
    ),
    ("quant_hidden", lambda s: s.dispatch(quant="fp8"), ("hidden", str(HIDDEN), "128")),
    (
        "quant_scale_without_nvfp4",
        lambda s: s.dispatch(quant_scale=1.0),
        ("quant_scale", "None", "nvfp4"),
    ),
    (
        "quant_scale_0",
        lambda s: s.dispatch(quant="nvfp4", quant_scale=0.0),
        ("quant_scale", "0.0", "2**-117"),
    ),
    (
        "quant_scale_shape",
        lambda s: s.dispatch(quant="nvfp4", quant_scale=torch.ones(2)),
        ("quant_scale", "[2]", "one element"),
    ),
    ("scale_layout", lambda s: s.dispatch(scale_layout="swizzled"), ("scale_layout", "swizzled")),
    (
        "column_major_scales_of_nothing",
        lambda s: s.dispatch(scale_layout="column"),
        ("scale_layout", "no scales"),
    ),
]
COMBINE_MISTAKES: list[Mistake] = [
    ("quant", lambda s: s.combine(quant="nvfp4"), ("quant", "cpu", "nvfp4", "fp8")),
    ("quant_hidden", lambda s: s.combine(quant="fp8"), ("hidden", str(HIDDEN), "128")),
    ("x_rows", lambda s: s.combine(x=s.recv.x[:-1]), ("x", str(HIDDEN))),
    (
        "x_hidden",
        lambda s: s.combine(x=s.recv.x[:, :32].contiguous()),
        ("x", "32", str(HIDDEN)),
    ),
    ("x_dimensions", lambda s: s.combine(x=s.recv.x[None]), ("x", "[1, ", str(HIDDEN))),
    ("x_dtype", lambda s: s.combine(x=s.recv.x.double()), ("x", "float64", "bfloat16")),
    ("x_device", lambda s: s.combine(x=s.recv.x.to("meta")), ("x", "meta", "cpu")),
    (
        "x_stride",
        lambda s: s.combine(x=s.recv.x.repeat(1, 2)[:, ::2]),
        ("x", "contiguous"),
    ),
    (
        "values_shape",
        lambda s: s.buf.combine_topk_weights(s.recv.topk_weights[:, :3], s.recv.plan),
        ("values", "3", str(TOPK)),
    ),
    (
        "values_dtype",
        lambda s: s.buf.combine_topk_weights(s.recv.topk_weights.double(), s.recv.plan),
        ("values", "float64", "float32"),
    ),
    (
        "values_stride",
        lambda s: s.buf.combine_topk_weights(s.recv.topk_weights.repeat(1, 2)[:, ::2], s.recv.plan),
        ("values", "contiguous"),
    ),
    (
        "every_slot_of_another_layout",
        lambda s: s.buf.combine_topk_weights(
            s.recv.topk_weights, dataclasses.replace(s.recv.plan, layout="expert"), every_slot=True
        ),
        ("every_slot", "expert", "token"),
    ),
    (
        "values_of_another_plan",
        lambda s: s.buf.combine_topk_weights(s.recv.topk_weights, s.other_plan),
        ("plan", "another Buffer"),
    ),
    ("plan_of_another_buffer", lambda s: s.combine(plan=s.other_plan), ("plan", "another Buffer")),
    (
        "weights_dtype",
        lambda s: s.combine(topk_weights=s.w.to(torch.bfloat16)),
        ("topk_weights", "bfloat16", "float32"),
    ),
    ("weights_shape", lambda s: s.combine(topk_weights=s.w[:3]), ("topk_weights", "3", str(T))),
    ("bias_dtype", lambda s: s.combine(bias=s.x.float()), ("bias", "float32", "bfloat16")),
    ("bias_shape", lambda s: s.combine(bias=s.x[:3]), ("bias", "3", str(T))),
    ("bias_stride", lambda s: s.combine(bias=s.x.repeat(1, 2)[:, ::2]), ("bias", "contiguous")),
    ("out_dtype", lambda s: s.combine(out=s.x.float()), ("out", "float32", "bfloat16")),
    ("out_shape", lambda s: s.combine(out=s.x[:, :32].contiguous()), ("out", "32", str(HIDDEN))),
    ("out_stride", lambda s: s.combine(out=s.x.repeat(1, 2)[:, ::2]), ("out", "contiguous")),
    ("out_device", lambda s: s.combine(out=s.x.to("meta")), ("out", "meta", "cpu")),
]
WRONG_TYPES: list[Mistake] = [
    ("x_number", lambda s: s.dispatch(x=1.0), ("x", "float", "Tensor")),
    ("x_pair_of_lists", lambda s: s.dispatch(x=([1.0], [1.0])), ("x[0]", "list", "Tensor")),
    ("x_none", lambda s: s.dispatch(x=None), ("x", "None")),
    ("idx_list", lambda s: s.dispatch(topk_idx=s.idx.tolist()), ("topk_idx", "list")),
    ("weights_list", lambda s: s.dispatch(topk_weights=s.w.tolist()), ("topk_weights", "list")),
    ("plan_is_recv", lambda s: s.replay(plan=s.recv), ("plan", "Recv")),
    ("combine_recv", lambda s: s.combine(x=s.recv), ("x", "Recv")),
    ("combine_plan_none", lambda s: s.combine(plan=None), ("plan", "None")),
    ("alignment_text", lambda s: s.dispatch(expert_alignment="8"), ("expert_alignment", "str")),
]


def run_mistake(group: Any, table: str, name: str) -> str | None:
    """The message of the mistake on the last rank; fails unless the right call works after it."""
    setup = Setup(group)
    other = Setup(group)
    setup.other_plan = other.recv.plan
    _, mistake, _ = next(m for m in globals()[table] if m[0] == name)
    expected = TypeError if table == "WRONG_TYPES" else ValueError
    right = setup.combine if table == "COMBINE_MISTAKES" else setup.dispatch
    text = None
    if group.rank() == group.size() - 1:
        # The peers are in the right call by now, or soon.
        time.sleep(0.05)
        try:
            mistake(setup)
        except expected as error:
            text = str(error)
        else:
            raise AssertionError("the mistake went through")
    answer = right()
    if table == "COMBINE_MISTAKES":
        assert answer.shape == setup.x.shape
    else:
        assert torch.equal(answer.x.float(), torch.ones_like(answer.x.float()))
    for s in (setup, other):
        s.buf.destroy()
    return text


def _check(table: str, name: str, words: tuple[str, ...]) -> None:
    text = launcher.pool().run(2, run_mistake, table, name)[1]
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {text}"


def _ids(table: list[Mistake]) -> Any:
    params = [pytest.param(name, words, id=name) for name, _, words in table]
    return pytest.mark.parametrize(("name", "words"), params)


@_ids(DISPATCH_MISTAKES)
def test_dispatch_mistake(name: str, words: tuple[str, ...]) -> None:
    _check("DISPATCH_MISTAKES", name, words)


@_ids(COMBINE_MISTAKES)
def test_combine_mistake(name: str, words: tuple[str, ...]) -> None:
    _check("COMBINE_MISTAKES", name, words)


@_ids(WRONG_TYPES)
def test_wrong_type(name: str, words: tuple[str, ...]) -> None:
    _check("WRONG_TYPES", name, words)


def run_after_destroy(group: Any) -> list[str]:
    import epcomm

    setup = Setup(group)
    setup.buf.destroy()
    setup.buf.destroy()
    texts = []
    for call in (setup.dispatch, setup.replay, setup.combine):
        try:
            call()
        except epcomm.BufferUnusable as error:
            texts.append(str(error))
    return texts


def test_use_after_destroy() -> None:
    for texts in launcher.pool().run(2, run_after_destroy):
        assert len(texts) == 3
        assert all("destroy" in text for text in texts)


def run_fork(group: Any) -> list[str]:
    """What a forked child is told by each call; then the parent and its peers carry on."""
    import epcomm

    setup = Setup(group)
    texts: list[str] = []
    if group.rank() == 0:
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            for call in (setup.dispatch, setup.combine):
                try:
                    call()
                except epcomm.BufferUnusable as error:
                    os.write(theirs, f"{error}\n".encode())
            setup.buf.destroy()
            os._exit(0)
        os.close(theirs)
        with os.fdopen(ours) as pipe:
            texts = pipe.read().splitlines()
        assert os.waitpid(child, 0)[1] == 0
    recv = setup.dispatch()
    assert torch.equal(recv.x.float(), torch.ones_like(recv.x.float()))
    assert torch.equal(setup.combine(), setup.combine())
    setup.buf.destroy()
    return texts


def test_use_after_fork() -> None:
    texts = launcher.pool().run(3, run_fork)[0]
    assert len(texts) == 2
    assert all("fork" in text for text in texts)


# id, arguments of the constructor, words of the message.
CONSTRUCTOR_MISTAKES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("num_experts_0", {"num_experts": 0}, ("num_experts", "0", "at least 1")),
    ("hidden_0", {"hidden": 0}, ("hidden", "0")),
    ("hidden_not_16_bytes", {"hidden": 65}, ("hidden", "65", "16 bytes")),
    ("hidden_negative", {"hidden": -64}, ("hidden", "-64")),
    ("topk_0", {"topk": 0}, ("topk", "0", "1")),
    ("topk_33", {"topk": 33}, ("topk", "33", "32")),
    ("max_tokens_0", {"max_tokens": 0}, ("max_tokens", "0", "at least 1")),
    ("max_tokens_huge", {"max_tokens": 2**30}, ("max_tokens", str(2**30))),
    ("dtype_int", {"dtype": torch.int32}, ("dtype", "int32", "bfloat16")),
    ("dtype_fp8", {"dtype": FP8}, ("dtype", "float8_e4m3fn", "bfloat16")),
    ("transport", {"transport": "pigeon"}, ("transport", "pigeon", "cpu")),
    ("table_length", {"expert_to_rank": [0, 1]}, ("expert_to_rank", "2", "6")),
    ("table_rank", {"expert_to_rank": [0, 1, 2, 0, 1, 0]}, ("expert_to_rank", "2", "[0, 2)")),
    ("table_negative", {"expert_to_rank": [0, -1, 1, 0, 1, 0]}, ("expert_to_rank", "-1")),
    ("table_huge", {"expert_to_rank": [0, 2**40, 1, 0, 1, 0]}, ("expert_to_rank", str(2**40))),
    ("timeout_0", {"timeout": 0.0}, ("timeout", "0", "more than 0")),
    ("timeout_negative", {"timeout": -1.0}, ("timeout", "-1")),
    ("timeout_nan", {"timeout": float("nan")}, ("timeout", "nan")),
    ("window_negative", {"window_bytes": -4096}, ("window_bytes", "-4096")),
]


def run_constructor_mistake(group: Any, changes: dict[str, Any], ranks: list[int]) -> Any:
    """Type, text and seconds of the error on every rank; then a right Buffer must work."""
    began = time.monotonic()
    try:
        Setup(group, **(changes if group.rank() in ranks else {}))
    except Exception as error:
        told = type(error).__name__, str(error), time.monotonic() - began
    else:
        raise AssertionError("the mistake went through")
    Setup(group).buf.destroy()
    return told


@pytest.mark.parametrize(
    ("changes", "words"), [pytest.param(c, w, id=i) for i, c, w in CONSTRUCTOR_MISTAKES]
)
@pytest.mark.parametrize("who", ["all", "one"])
def test_constructor_mistake(changes: dict[str, Any], words: tuple[str, ...], who: str) -> None:
    """Where it is made: ValueError with all details. The other ranks must not be left waiting."""
    ranks = [0, 1] if who == "all" else [1]
    told = launcher.pool().run(2, run_constructor_mistake, changes, ranks)
    for rank, (kind, text, seconds) in enumerate(told):
        assert seconds < 5.0
        if rank in ranks:
            assert kind == "ValueError", text
            missing = [word for word in words if word not in text]
            assert not missing, f"{missing} not in: {text}"
        else:
            assert kind in ("ValueError", "ConfigMismatch"), text
            assert "1" in text


def test_group_of_a_wrong_type() -> None:
    import epcomm

    with pytest.raises(TypeError, match="group"):
        epcomm.Buffer("world", num_experts=4, hidden=64, topk=2, max_tokens=4)  # type: ignore[arg-type]

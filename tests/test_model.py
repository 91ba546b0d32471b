"""The cost model against published tables, our own runs, and rows that were counted."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import launcher
from epcomm import model
from epcomm.model import Batch, estimate, rows_per_token

# H800, "~160 GB/s NVLink maximum bandwidth", "CX7 InfiniBand 400 Gb/s (~50 GB/s maximum)".
H800 = {"nvlink_gbps": 160.0, "nic_gbps": 50.0}

# DeepEP V1, low-latency kernels: 128 tokens, hidden 7168, top-8, FP8 dispatch, BF16 combine. EP:
# µs of dispatch, of combine. https://github.com/deepseek-ai/DeepEP, docs/legacy.md (the README of
# V1), commit 0297fc8. Rows go once per (token, expert); a dispatched row has hidden + hidden / 128
# * 4 + 16 bytes (tests/test_low_latency.py there, commit 058d696). 256 experts.
LOW_LATENCY = {
    8: (77, 114),
    16: (118, 195),
    32: (155, 273),
    64: (173, 314),
    128: (192, 369),
    256: (194, 360),
}

# The same document, normal kernels: 4096 tokens, hidden 7168, top-8 on at most 4 nodes. EP: GB/s of
# dispatch, of combine. EP8 counts rows that a rank receives, also from itself; the others rows to
# all nodes, also to the own one (tests/test_internode.py there, commit 058d696), so the time is
# known, but these are not rates of a link.
NORMAL = {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50)}


def within(modelled: float, expected: float, share: float) -> bool:
    return abs(modelled - expected) <= share * expected


def low_latency_batch(ep: int) -> Batch:
    return Batch(nodes=ep // 8, gpus=8, tokens=128)


@pytest.mark.parametrize("ep", LOW_LATENCY)
@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_low_latency_table_within_10_percent(ep: int, operation: str) -> None:
    row_bytes = 7168 + 7168 // 128 * 4 + 16 if operation == "dispatch" else 2 * 7168
    published = LOW_LATENCY[ep][operation == "combine"]
    modelled = estimate(low_latency_batch(ep), "per_expert", row_bytes, **H800)
    assert within(modelled.time_us, published, 0.10), (modelled, published)
    assert modelled.bound == ("node" if ep == 8 else "rail")


def normal_time_us(ep: int, operation: str) -> float:
    """What the published rate stands for."""
    batch = Batch(nodes=ep // 8, gpus=8, max_nodes=min(4, ep // 8))
    counted = batch.reached(8) if ep == 8 else batch.reached(batch.nodes)
    row_bytes = model.row_bytes_of(7168, "fp8" if operation == "dispatch" else "bf16")
    return counted * 4096 * row_bytes / (NORMAL[ep][operation == "combine"] * 1e3)


@pytest.mark.parametrize("ep", NORMAL)
@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_normal_table_within_10_percent(ep: int, operation: str) -> None:
    batch = Batch(nodes=ep // 8, gpus=8, max_nodes=min(4, ep // 8))
    row_bytes = model.row_bytes_of(7168, "fp8" if operation == "dispatch" else "bf16")
    modelled = estimate(batch, "two_stage", row_bytes, **H800)
    assert within(modelled.time_us, normal_time_us(ep, operation), 0.10), modelled
    assert modelled.bound == ("node" if ep <= 16 else "rail")


def test_no_other_rail_fits_the_low_latency_table_much_better() -> None:
    """The least worst relative error over the points that cross nodes, by trying all."""
    points = []
    for ep, times in LOW_LATENCY.items():
        rail = rows_per_token(low_latency_batch(ep), "per_expert").rail
        if rail:
            points += [(rail * 128 * b, us) for b, us in zip((7408, 14336), times, strict=True)]
    moved, us = np.array(points).T

    def worst(alpha: float, share: float) -> float:
        return float(np.max(np.abs(alpha + moved / (share * 50e3) - us) / us))

    best = min(worst(a, s / 100) for a in range(10, 70) for s in range(70, 111))
    rail = model.LINKS["per_expert"][1]
    assert worst(rail.alpha_us, rail.share) <= best + 0.01
    assert worst(rail.alpha_us, rail.share) <= 0.06


RESULTS = Path(__file__).parents[1] / "bench" / "results" / "nccl-2xh200-sizes.jsonl"


def test_nccl_on_one_node_is_our_own_run() -> None:
    """torch's all_to_all of packed rows on 2 x H200, against the raw link of the same run."""
    runs = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    raw = max(run["link_gbps"] for run in runs if run["adapter"] == "raw" and run["tokens"] == 4096)
    seen = 0
    for run in runs:
        if run["adapter"] != "torch" or run["mode"] != "packed/separate" or run["tokens"] < 64:
            continue
        batch = Batch(1, 2, run["tokens"])
        modelled = estimate(batch, "nccl", 14336, nic_gbps=1.0, nvlink_gbps=raw)
        assert within(modelled.node_bytes, run["bytes"], 0.02), run
        assert within(modelled.time_us, run["p50_us"], 0.10), (modelled, run)
        seen += 1
    assert seen >= 6


GRID = list(itertools.product((1, 2, 4, 8), (25.0, 50.0, 100.0), model.ALGORITHMS))


@pytest.mark.parametrize(("nodes", "nic", "algorithm"), GRID)
def test_more_work_takes_longer_and_faster_links_do_not(
    nodes: int, nic: float, algorithm: str
) -> None:
    def time_us(
        tokens: int = 1024, row: float = 7392, nic: float = nic, nvlink: float = 160
    ) -> float:
        batch = Batch(nodes, 8, tokens)
        return estimate(batch, algorithm, row, nic_gbps=nic, nvlink_gbps=nvlink).time_us

    assert time_us() < time_us(tokens=2048)
    assert time_us() < time_us(row=14336)
    assert time_us() >= time_us(nic=2 * nic)
    assert time_us() >= time_us(nvlink=320)
    assert time_us(nic=nic / 100) > time_us() or nodes == 1
    assert time_us(nvlink=1) > time_us()


@pytest.mark.parametrize("max_nodes", [0, 1, 4])
@pytest.mark.parametrize("nodes", [1, 4, 8])
def test_two_stages_never_send_more_over_the_rail(nodes: int, max_nodes: int) -> None:
    batch = Batch(nodes, 8, max_nodes=min(max_nodes, nodes))
    rows = {a: rows_per_token(batch, a) for a in model.ALGORITHMS}
    assert rows["two_stage"].rail <= rows["flat"].rail <= rows["per_expert"].rail
    assert rows["flat"] == rows["nccl"]
    for algorithm in ("flat", "two_stage"):  # what arrives in the end is the same
        arrives = rows[algorithm].local + rows[algorithm].node
        arrives += rows[algorithm].rail if algorithm == "flat" else 0
        assert arrives == pytest.approx(batch.reached(batch.ranks))
    if nodes == 1:
        assert rows["two_stage"] == rows["flat"] and rows["flat"].rail == 0


def test_reached_is_what_drawing_gives() -> None:
    rng = np.random.default_rng(3)
    for nodes, gpus, topk, max_nodes in ((4, 2, 4, 0), (4, 2, 4, 2), (8, 1, 6, 3)):
        batch = Batch(nodes, gpus, experts=64, topk=topk, max_nodes=max_nodes)
        per_node, per_rank = 64 // nodes, 64 // (nodes * gpus)
        ranks, on_nodes = [], []
        for _ in range(4000):
            chosen = rng.permutation(nodes)[: max_nodes or nodes]
            pool = np.concatenate([np.arange(n * per_node, (n + 1) * per_node) for n in chosen])
            experts = rng.permutation(pool)[:topk]
            ranks.append(len(set(experts // per_rank)))
            on_nodes.append(len(set(experts // per_node)))
        assert batch.reached(nodes * gpus) == pytest.approx(np.mean(ranks), rel=0.02)
        assert batch.reached(nodes) == pytest.approx(np.mean(on_nodes), rel=0.02)


def run_counted(group: Any, transport: str, ranks_per_node: int, experts: int) -> Any:
    import epcomm

    tokens, topk = 1500, 4
    with epcomm.Buffer(
        group,
        num_experts=experts,
        hidden=8,
        topk=topk,
        max_tokens=tokens,
        transport=transport,
        ranks_per_node=ranks_per_node,
    ) as buf:
        rng = np.random.default_rng(group.rank())
        idx = np.stack([rng.permutation(experts)[:topk] for _ in range(tokens)])
        recv = buf.dispatch(torch.ones(tokens, 8, dtype=torch.bfloat16), torch.from_numpy(idx))
        buf.combine(recv.x, recv.plan)
        counters = buf.link_counters()
    return [[[link.rows / tokens for link in op] for op in counters], counters.dispatch.rail.bytes]


@pytest.mark.parametrize(
    ("transport", "algorithm"), [("hierarchical", "two_stage"), ("cpu", "flat")]
)
def test_rows_are_those_that_a_transport_counts(transport: str, algorithm: str) -> None:
    batch = Batch(nodes=3, gpus=2, tokens=1500, hidden=8, experts=24, topk=4)
    expected = rows_per_token(batch, algorithm)
    answers = launcher.pool().run(6, run_counted, transport, 2, 24)
    counted = np.mean([rows for rows, _ in answers], axis=0)  # [operation, link]
    for of_operation in counted:
        np.testing.assert_allclose(
            of_operation, [expected.local, expected.node, expected.rail], rtol=0.03
        )
    modelled = estimate(batch, algorithm, 16, nic_gbps=50, nvlink_gbps=160)
    assert np.mean([moved for _, moved in answers]) == pytest.approx(modelled.rail_bytes, rel=0.03)


def test_command_prints_a_line_for_each_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main(["--nodes", "2,8", "--gpus", "8", "--nic", "50,100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * 2 * len(model.ALGORITHMS)
    assert all(f" {name} " in lines[1 + i] for i, name in enumerate(model.ALGORITHMS))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "0"], ("nodes", "0")),
        (["--nodes", "3"], ("experts", "256", "24")),
        (["--topk", "257"], ("topk", "257")),
        (["--nic", "0"], ("nic", "0")),
        (["--max-nodes", "-1"], ("max_nodes", "-1")),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        model.main(arguments)
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert all(word in text for word in words), text


def test_model_needs_neither_torch_nor_numpy_and_is_not_imported() -> None:
    code = "import sys, epcomm; assert 'epcomm.model' not in sys.modules; import epcomm.model; "
    code += "print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "False"], done.stderr

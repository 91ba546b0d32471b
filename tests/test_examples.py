"""The examples run as their first lines say, and check themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def torchrun(num_ranks: int, name: str, *arguments: str) -> str:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    done = subprocess.run(
        [sys.executable, *launch, str(EXAMPLES / name), *arguments],
        env={"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **os.environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_moe_layer() -> None:
    printed = torchrun(3, "moe_layer.py", "--steps=6")
    assert printed.count("step ") == 6 and "transport cpu" in printed
    assert "losses equal within 1e-05" in printed


def test_moe_layer_with_ranks_that_own_nothing() -> None:
    """No tokens on ranks 1 and 2, no expert on rank 2."""
    printed = torchrun(3, "moe_layer.py", "--steps=2", "--tokens=4", "--experts=2")
    assert "tokens [4, 0, 0]" in printed and "losses equal" in printed


def test_overlap() -> None:
    printed = torchrun(2, "overlap.py", "--tokens=32", "--hidden=64")
    assert "the same results both ways" in printed and "nothing was hidden" in printed


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["moe_layer.py", "overlap.py"])
def test_on_gpus(name: str) -> None:
    printed = torchrun(torch.cuda.device_count(), name)
    assert "transport cpu" not in printed
    assert ("losses equal" if name == "moe_layer.py" else "hidden: ") in printed

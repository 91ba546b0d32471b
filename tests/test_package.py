"""The installed package: what importing it does, what it contains, what it leaves alone."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import epcomm

PACKAGE = Path(epcomm.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_import_loads_no_torch() -> None:
    done = run_python("import sys, epcomm; print('torch' in sys.modules, 'numpy' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr
    assert done.stderr == ""


def test_errors_can_be_caught_without_torch() -> None:
    code = "import sys, epcomm; print(issubclass(epcomm.PeerLost, epcomm.Error))"
    done = run_python(code + "; print('torch' in sys.modules)")
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_every_public_name_is_there() -> None:
    names = {
        "autograd",
        "Buffer",
        "Bootstrap",
        "TorchBootstrap",
        "Event",
        "Recv",
        "Plan",
        "show_config",
    }
    names |= {"Error", "PeerLost", "Evicted", "ConfigMismatch", "WindowFull", "BufferUnusable"}
    assert names <= set(epcomm.__all__)
    for name in epcomm.__all__:
        assert getattr(epcomm, name) is not None
        assert name in dir(epcomm)
    with pytest.raises(AttributeError, match="dispatchh"):
        epcomm.dispatchh  # noqa: B018


def test_error_tree() -> None:
    for name in ("PeerLost", "Evicted", "ConfigMismatch", "WindowFull", "BufferUnusable"):
        error = getattr(epcomm, name)
        assert issubclass(error, epcomm.Error) and issubclass(error, RuntimeError)
        assert not issubclass(error, ValueError)


def _imported(source: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_nothing_is_pickled(source: Path) -> None:
    roots = {name.partition(".")[0] for name in _imported(source)}
    assert not roots & {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"}
    # torch's object collectives and torch.load pickle behind the scenes.
    called = set(
        re.findall(r"\b(\w+_object(?:_list|s)?|torch\.load|torch\.save)\(", source.read_text())
    )
    assert not called


def test_the_checks_see_the_sources() -> None:
    assert {"__init__.py", "buffer.py", "bootstrap.py"} <= {source.name for source in SOURCES}


def test_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert (PACKAGE / "_core.pyi").exists()


def _stub_names(body: list[ast.stmt]) -> set[str]:
    names: set[str] = set()
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_stubs_name_what_the_extension_has() -> None:
    from epcomm import _core

    stub = ast.parse((PACKAGE / "_core.pyi").read_text())
    there = {name for name in dir(_core) if not name.startswith("_")}
    assert _stub_names(stub.body) == there
    for node in stub.body:
        if not isinstance(node, ast.ClassDef):
            continue
        members = {n for n in vars(getattr(_core, node.name)) if not n.startswith("_")}
        members -= {"name", "value"}  # pybind11 gives these to every enum
        assert _stub_names(node.body) - {"name", "value"} == members, node.name


def test_version() -> None:
    from importlib.metadata import version

    assert epcomm.__version__ == version("epcomm")


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    config = epcomm.show_config()
    printed = capsys.readouterr().out
    assert config["epcomm"] == epcomm.__version__
    assert "cpu" in config["transports"]
    for key, value in config.items():
        assert key in printed and value in printed


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("EPCOMM_TRANSPROT", "EPCOMM_TRANSPORT"), ("EPCOMM_TIMEOUTS", "EPCOMM_TIMEOUT")],
)
def test_unknown_variable_is_named(wrong: str, near: str) -> None:
    done = run_python("import epcomm", **{wrong: "1"})
    assert done.returncode == 0
    assert wrong in done.stderr and re.search(rf"\b{near}\b", done.stderr)


def test_known_variables_draw_no_warning() -> None:
    done = run_python("import epcomm", EPCOMM_TRANSPORT="cpu", EPCOMM_TIMEOUT="5")
    assert done.returncode == 0 and done.stderr == ""


def test_variables_of_the_tests_are_known() -> None:
    # Also those of the simulator, which is a Python module too.
    folder = Path(__file__).parent
    reads = re.compile(r"""environ(?:\.get\(|\[)"(EPCOMM_\w+)|getenv\("(EPCOMM_SIM_\w+)""")
    text = "".join(p.read_text() for p in [*folder.rglob("*.py"), *(folder / "sim").glob("*.cc")])
    names = {python or simulator for python, simulator in reads.findall(text)}
    assert {"EPCOMM_TEST_RANKS", "EPCOMM_SIM_SEED"} <= names
    done = run_python("import epcomm", **dict.fromkeys(names, "1"))
    assert done.returncode == 0 and done.stderr == ""


def test_environment_is_left_alone() -> None:
    code = """
import os
before = dict(os.environ)
import epcomm, torch
epcomm.Buffer, epcomm.TorchBootstrap, epcomm.Recv
class Alone:
    rank, size = 0, 1
    def all_gather(self, data): return [data]
    def barrier(self): pass
with epcomm.Buffer(Alone(), num_experts=2, hidden=64, topk=1, max_tokens=4) as buf:
    x = torch.ones(4, 64, dtype=torch.bfloat16)
    recv = buf.dispatch(x, torch.zeros(4, 1, dtype=torch.int64))
    assert torch.equal(buf.combine(recv.x, recv.plan), x)
assert dict(os.environ) == before
print('unchanged')
"""
    done = run_python(code)
    assert done.stdout.strip() == "unchanged", done.stderr
    assert done.stderr == ""

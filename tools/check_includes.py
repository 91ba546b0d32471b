"""Checks the layering rules of docs/design.md over the sources, without a compiler.

    python tools/check_includes.py              check the tree that this file is in
    python tools/check_includes.py --self-test  check that the checker sees what it should

Prints one line per violation, `file:line: what`, and exits with 1 if there is any.
"""

from __future__ import annotations

import ast
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

CUDA = ("cuda*.h", "cooperative_groups.h", "cooperative_groups/*", "cuda/*")
RUNTIME = ("cuda_runtime_api.h",)
# error.h for the functions that launch: a launch that fails throws. quant.h and dispatch_layout.h:
# what these kernels do is public.
KERNELS = (
    *("epcomm/types.h", "epcomm/error.h"),
    *("epcomm/quant.h", "epcomm/dispatch_layout.h"),
    "kernels/*",
)
# POSIX and Linux headers; the standard library's own have neither a slash nor a ".h".
SYSTEM = ("*/*.h", "*.h")


@dataclass(frozen=True)
class Layer:
    """What the files that match `files` may include, beside the standard library."""

    files: str
    ours: tuple[str, ...]
    others: tuple[str, ...]


# The first layer whose pattern matches a file is its layer. {own} is the transport that a file
# belongs to: the part of its name before the first "_" or "."; transport/gpu_* serves all of those
# that use a GPU, transport/host_* those between processes of one machine.
LAYERS = (
    Layer("include/epcomm/*", ("epcomm/*",), RUNTIME),
    Layer("csrc/kernels/*", KERNELS, CUDA),
    Layer(
        "csrc/core/*",
        (
            *("epcomm/*", "core/*", "transport/transport.h"),
            *("kernels/*_layout.h", "kernels/quant.h"),
        ),
        (*RUNTIME, *SYSTEM),
    ),
    Layer("csrc/transport/transport.h", ("epcomm/*", "core/*"), ()),
    Layer("csrc/transport/registry*", ("epcomm/*", "core/*", "transport/*"), ()),
    Layer(
        "csrc/transport/*",
        (
            *("epcomm/*", "core/*", "kernels/*", "transport/transport.h"),
            *("transport/{own}.*", "transport/{own}_*", "transport/gpu_*", "transport/host_*"),
        ),
        SYSTEM,
    ),
    Layer("csrc/bindings/*", ("epcomm/*", "bindings/*"), (*RUNTIME, "pybind11/*")),
    Layer(
        "tests/sim/*",
        (
            *("epcomm/*", "core/*", "kernels/*", "transport/*.h", "bindings/*"),
            *("tests/cpp/*", "tests/sim/*"),
        ),
        (*CUDA, *SYSTEM),
    ),
    Layer(
        "tests/cpp/*",
        (
            *("epcomm/*", "core/*", "kernels/*.h", "transport/*.h"),
            *("tests/cpp/*", "tests/softnic/card_queue.h"),
        ),
        (*RUNTIME, *SYSTEM),
    ),
)
# One vendor, one family of transports: no other file may include these.
VENDOR_HEADERS = {
    "nccl*.h": ("csrc/transport/nccl*",),
    "nvshmem*.h": ("csrc/kernels/link_nvshmem.cuh",),
    "host/nvshmem*.h": ("csrc/transport/gpu_nvshmem.cc", "tests/sim/nvshmem_job_test.cc"),
    "pybind11/*": ("csrc/bindings/*",),
}
# The core is one build for every torch.
NOWHERE = ("torch/*", "ATen/*", "c10/*")

# Pattern in C++ code without comments and strings -> where it is allowed, and why not elsewhere.
CPP_RULES = (
    (
        r"\b(?:secure_)?getenv\s*\(",
        ("tests/sim/*",),
        "getenv: only python/epcomm/env.py reads the environment",
    ),
    (r"\b(?:__asm__|asm)\b", ("csrc/kernels/device.cuh",), "assembly outside kernels/device.cuh"),
    (
        # Without a qualifier, abort and terminate are names that a class of ours may use.
        r"\b(?:assert|exit|__trap|printf|puts)\s*\("
        r"|(?<!\w)(?:std)?::(?:abort|terminate)\s*\(|\bstd::(?:cout|cerr)\b",
        ("tests/cpp/*", "tests/sim/*"),
        "a library raises; it does not assert, exit or print",
    ),
)
MAX_MACRO_LINES = 5
MACRO_FILES = ("include/epcomm/error.h",)

TORCH_FILES = (
    *("buffer.py", "endpoint.py", "plans.py", "dispatch.py", "combine.py"),
    *("native.py", "checks.py", "results.py", "events.py", "streams.py"),
    *("bootstrap.py", "slots.py", "statistics.py", "symmetric.py", "tracing.py", "quant.py"),
    *("autograd.py", "ops.py", "ops/*"),
    "compat/deep_ep/*",
)
ENVIRONMENT_FILES = ("env.py",)
# Unpickling what a peer sent runs the peer's code.
FORBIDDEN_MODULES = ("pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal")
FORBIDDEN_CALLS = (
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
)


@dataclass(frozen=True)
class Violation:
    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def strip_comments(text: str) -> str:
    """C++ text with comments blanked and strings emptied; line numbers stay."""

    def blank(match: re.Match[str]) -> str:
        found = match.group(0)
        if found.startswith("/"):
            return "\n" * found.count("\n")
        return '""' if found.startswith('"') else "' '"

    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F])\'(?:\\.|[^\'\\\n])+\''
    return re.sub(pattern, blank, text, flags=re.DOTALL)


def check_include(file: str, target: str, quoted: bool) -> str | None:
    """Why this file may not include target, or None."""
    if matches(target, NOWHERE):
        return f"includes {target}: no C++ file may know torch"
    for pattern, users in VENDOR_HEADERS.items():
        if fnmatch(target, pattern):
            return (
                None if matches(file, users) else f"includes {target}: only {', '.join(users)} may"
            )
    layer = next((layer for layer in LAYERS if fnmatch(file, layer.files)), None)
    if layer is None:
        return f"includes {target}, but is in no layer that this checker knows"
    own = re.split(r"[_.]", Path(file).name)[0]
    ours = tuple(pattern.replace("{own}", own) for pattern in layer.ours)
    if quoted:
        return None if matches(target, ours) else f'includes "{target}": {layer.files} may not'
    if "/" not in target and "." not in target:
        return None
    return None if matches(target, layer.others) else f"includes <{target}>: {layer.files} may not"


def check_cpp(file: str, text: str) -> Iterator[Violation]:
    for number, line in enumerate(text.splitlines(), 1):
        include = re.match(r'\s*#\s*include\s*(["<])([^">]+)[">]', line)
        if include:
            why = check_include(file, include[2], include[1] == '"')
            if why:
                yield Violation(file, number, why)

    code = strip_comments(text)
    for pattern, allowed, why in CPP_RULES:
        if matches(file, allowed):
            continue
        for match in re.finditer(pattern, code):
            yield Violation(file, code.count("\n", 0, match.start()) + 1, why)

    if not matches(file, MACRO_FILES):
        for match in re.finditer(
            r"^[ \t]*#[ \t]*define[ \t]+\w+\((?:.*\\\n)*.*$", code, re.MULTILINE
        ):
            lines = match.group(0).count("\n") + 1
            if lines > MAX_MACRO_LINES:
                first = code.count("\n", 0, match.start()) + 1
                yield Violation(
                    file, first, f"function-like macro of {lines} lines: make it a function"
                )


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def walk(node: ast.AST, into_functions: bool) -> Iterator[ast.AST]:
    """All nodes that run, without those that only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if not into_functions and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        yield child
        yield from walk(child, into_functions)


def imported(node: ast.AST, package: list[str]) -> list[str]:
    """Absolute names of the modules that an import statement may load, submodules included."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        name = ".".join([*base, *([node.module] if node.module else [])])
        return [name, *(f"{name}.{alias.name}" for alias in node.names)]
    return []


def check_python(
    file: str, tree: ast.Module, inside: str, package: list[str]
) -> Iterator[Violation]:
    """inside: path relative to the package's folder; package: the package that the module is in."""
    for node in walk(tree, into_functions=True):
        line = getattr(node, "lineno", 0)
        for name in imported(node, package):
            top = name.split(".")[0]
            if top == "torch" and not matches(inside, TORCH_FILES):
                yield Violation(file, line, f"imports torch: only {', '.join(TORCH_FILES)} may")
                break
            if top in FORBIDDEN_MODULES:
                yield Violation(file, line, f"imports {top}: bytes from a peer are never unpickled")
                break
        if (
            isinstance(node, ast.Attribute)
            and node.attr in ("environ", "getenv", "putenv")
            and not matches(inside, ENVIRONMENT_FILES)
        ):
            yield Violation(file, line, f"uses os.{node.attr} outside env.py")
        if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_CALLS:
            yield Violation(file, line, f"uses {node.attr}, which unpickles what a peer sent")


def check_lazy_torch(modules: dict[str, tuple[str, ast.Module, list[str]]]) -> Iterator[Violation]:
    """`import epcomm` alone must not import torch: that takes seconds."""
    pending, seen = ["epcomm"], set()
    while pending:
        name = pending.pop()
        if name in seen or name not in modules:
            continue
        seen.add(name)
        file, tree, package = modules[name]
        for node in walk(tree, into_functions=False):
            names = imported(node, package)
            if any(n.split(".")[0] == "torch" for n in names):
                line = getattr(node, "lineno", 0)
                yield Violation(
                    file, line, "imports torch when `import epcomm` runs: import it on use"
                )
            pending += names


def check_tree(root: Path) -> list[Violation]:
    violations: list[Violation] = []
    for folder in ("include", "csrc", "tests/cpp", "tests/sim"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".h", ".cc", ".cu", ".cuh"):
                violations += check_cpp(str(path.relative_to(root)), path.read_text())

    modules = {}
    home = root / "python" / "epcomm"
    for path in sorted(home.rglob("*.py")):
        file = str(path.relative_to(root))
        tree = ast.parse(path.read_text(), file)
        parts = list(path.relative_to(home.parent).with_suffix("").parts)
        package = parts[:-1]
        violations += check_python(file, tree, str(path.relative_to(home)), package)
        modules[".".join(package if parts[-1] == "__init__" else parts)] = (file, tree, package)
    violations += check_lazy_torch(modules)
    return violations


# What the checker must say about a tree of one or two files: {file: text} -> part of the only
# violation, or "" for none.
SELF_TEST: tuple[tuple[dict[str, str], str], ...] = (
    ({"include/epcomm/a.h": "#include <vector>\n#include <cuda_runtime_api.h>\n"}, ""),
    ({"include/epcomm/a.h": '#include "core/arena.h"\n'}, "a.h:1: includes"),
    ({"include/epcomm/a.h": "#include <sys/mman.h>\n"}, "includes <sys/mman.h>"),
    ({"csrc/core/a.cc": '#include "transport/transport.h"\n#include <sys/mman.h>\n'}, ""),
    ({"csrc/core/a.cc": '\n#include "transport/cpu.h"\n'}, "a.cc:2: includes"),
    ({"csrc/core/a.cc": '#include "kernels/link.cuh"\n'}, "includes"),
    ({"csrc/core/a.cc": "#include <torch/extension.h>\n"}, "torch"),
    ({"csrc/kernels/a.cuh": '#include "epcomm/types.h"\n#include <cuda_fp8.h>\n'}, ""),
    ({"csrc/kernels/a.cuh": '#include "epcomm/buffer.h"\n'}, "includes"),
    ({"csrc/transport/cpu_x.cc": '#include "transport/cpu.h"\n#include <unistd.h>\n'}, ""),
    ({"csrc/transport/cpu.cc": '#include "transport/host_channel.h"\n'}, ""),
    ({"csrc/transport/host_channel.cc": '#include "transport/cpu.h"\n'}, "includes"),
    ({"csrc/transport/cpu.cc": '#include "transport/nccl.h"\n'}, "includes"),
    ({"csrc/transport/nccl_api.cc": "#include <nccl.h>\n"}, ""),
    ({"csrc/transport/nvlink.cc": "#include <nccl.h>\n"}, "only csrc/transport/nccl* may"),
    ({"csrc/transport/nccl.cc": '#include "transport/gpu_memory.h"\n'}, ""),
    ({"csrc/kernels/link_nvshmem.cuh": "#include <nvshmem.h>\n#include <nvshmemx.h>\n"}, ""),
    ({"csrc/kernels/small.cuh": "#include <nvshmem.h>\n"}, "only csrc/kernels/link_nvshmem.cuh"),
    ({"csrc/transport/gpu_nvshmem.cc": "#include <host/nvshmemx_api.h>\n"}, ""),
    ({"csrc/transport/rdma.cc": "#include <nvshmem_host.h>\n"}, "includes nvshmem_host.h"),
    ({"csrc/transport/rdma.cc": "#include <host/nvshmem_api.h>\n"}, "only csrc/transport/gpu_"),
    ({"csrc/transport/registry_core.cc": '#include "transport/cpu.h"\n'}, ""),
    ({"csrc/bindings/module.cc": '#include <pybind11/stl.h>\n#include "epcomm/plan.h"\n'}, ""),
    ({"csrc/bindings/module.cc": '#include "core/arena.h"\n'}, "includes"),
    ({"csrc/other/a.cc": "#include <vector>\n"}, "in no layer"),
    ({"csrc/core/a.cc": '\nauto x = std::getenv("X");\n'}, "a.cc:2: getenv"),
    ({"csrc/core/a.cc": '// getenv("X")\n/* exit(1) */ auto s = "abort()";\n'}, ""),
    ({"csrc/core/a.cc": "static_assert(true); ::_exit(0); int n = 1'000'000;\n"}, ""),
    ({"csrc/core/a.cc": "Comm::~Comm() { abort(); }\nvoid Comm::abort() { other.abort(); }\n"}, ""),
    ({"csrc/core/a.cc": "void f() { std::abort(); }\n"}, "does not assert"),
    ({"csrc/core/a.cc": "void f() { assert(true); }\n"}, "does not assert"),
    ({"csrc/core/a.cc": "std::cout << 1;\n"}, "print"),
    ({"csrc/kernels/device.cuh": 'asm volatile("fence;");\n'}, ""),
    ({"csrc/kernels/link.cuh": 'asm volatile("fence;");\n'}, "assembly"),
    ({"csrc/core/a.h": "#define F(x) \\\n 1 \\\n 2 \\\n 3 \\\n 4\n"}, ""),
    ({"csrc/core/a.h": "#define F(x) \\\n 1 \\\n 2 \\\n 3 \\\n 4 \\\n 5\n"}, "macro of 6 lines"),
    ({"include/epcomm/error.h": "#define F(x) \\\n 1 \\\n 2 \\\n 3 \\\n 4 \\\n 5\n"}, ""),
    ({"python/epcomm/buffer.py": "import torch\n"}, ""),
    ({"python/epcomm/ops/a.py": "from torch import Tensor\n"}, ""),
    ({"python/epcomm/config.py": "import torch.distributed as dist\n"}, "imports torch"),
    (
        {
            "python/epcomm/config.py": "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    import torch\n"
        },
        "",
    ),
    ({"python/epcomm/config.py": "def f():\n    import pickle\n"}, "config.py:2: imports pickle"),
    ({"python/epcomm/buffer.py": "dist.all_gather_object(a, b)\n"}, "unpickles"),
    ({"python/epcomm/env.py": "import os\nx = os.environ['X']\n"}, ""),
    ({"python/epcomm/config.py": "import os\nx = os.getenv('X')\n"}, "config.py:2: uses os.getenv"),
    (
        {
            "python/epcomm/__init__.py": "from .buffer import Buffer\n",
            "python/epcomm/buffer.py": "import torch\n",
        },
        "when `import epcomm` runs",
    ),
    (
        {
            "python/epcomm/__init__.py": "def __getattr__(name):\n    from .buffer import Buffer\n",
            "python/epcomm/buffer.py": "import torch\n",
        },
        "",
    ),
)


def self_test() -> list[str]:
    wrong = []
    for files, expected in SELF_TEST:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            found = [str(violation) for violation in check_tree(Path(folder))]
        if len(found) != bool(expected) or (expected and expected not in found[0]):
            wrong.append(f"{files}: expected {expected or 'nothing'!r}, found {found}")
    return wrong


def main() -> int:
    if "--self-test" in sys.argv[1:]:
        lines = self_test()
    else:
        lines = [str(violation) for violation in check_tree(Path(__file__).resolve().parents[1])]
    for line in lines:
        print(line)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())

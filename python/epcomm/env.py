"""Environment variables that epcomm reads. It never writes any.

EPCOMM_TRANSPORT: the transport that `transport="auto"` takes.
EPCOMM_TIMEOUT: seconds that a wait for a peer may take, where `timeout=` is not given.
EPCOMM_WINDOW_BYTES: bytes of a Buffer's window, where `window_bytes=` is not given.
EPCOMM_NVSHMEM_LIB: NVSHMEM's host library (libnvshmem_host.so.3) or its folder, where that of the
    pip package shall not be taken.
EPCOMM_RANKS_PER_NODE: ranks that form a node, where `ranks_per_node=` is not given.
EPCOMM_STATISTICS: 1 = Buffers count (`Buffer.statistics`), where `statistics=` is not given.
EPCOMM_MAX_TOKENS: tokens per rank that `epcomm.compat.deep_ep` makes room for at once, where the
    call does not say.
EPCOMM_DEEP_EP: 1 = the plugins for vLLM and SGLang put `epcomm.compat.deep_ep` in the place of
    `deep_ep`; 0 or unset = they do nothing.
NCCL_P2P_DISABLE, NCCL_P2P_LEVEL, NCCL_HOSTID: NCCL's own; whether the transport "nccl" may use the
    memory of peers' GPUs without it (docs/nccl.md).
"""

from __future__ import annotations

import difflib
import os
import warnings

# Names that the build and the tests read are known too, so that they draw no warning.
_KNOWN = (
    "EPCOMM_TRANSPORT",
    "EPCOMM_TIMEOUT",
    "EPCOMM_WINDOW_BYTES",
    "EPCOMM_NVSHMEM_LIB",
    "EPCOMM_RANKS_PER_NODE",
    "EPCOMM_STATISTICS",
    "EPCOMM_MAX_TOKENS",
    "EPCOMM_DEEP_EP",
    "EPCOMM_CUDA",
    "EPCOMM_CUDA_ARCHS",
    "EPCOMM_CUDA_FAST_COMPILE",
    "EPCOMM_NVSHMEM",
    "EPCOMM_NVSHMEM_DIR",
    "EPCOMM_SIM_GPU",
    "EPCOMM_SIM_MAPPED",
    "EPCOMM_SIM_SEED",
    "EPCOMM_TEST_HOSTS",
    "EPCOMM_TEST_ENGINES",
    "EPCOMM_TEST_RANKS",
    "EPCOMM_TEST_RANKS_PER_GPU",
    "EPCOMM_TEST_NVSHMEM",
    "EPCOMM_TEST_CALLS",
    "EPCOMM_TEST_PATIENCE",
    "EPCOMM_TEST_SEED",
)


def warn_unknown() -> None:
    """Warns of EPCOMM_* variables that nothing reads, naming the nearest known one."""
    for name in sorted(os.environ):
        if name.startswith("EPCOMM_") and name not in _KNOWN:
            near = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.0)[0]
            warnings.warn(
                f"environment variable {name} is not one of epcomm's; did you mean {near}?",
                stacklevel=3,
            )


def text(name: str) -> str | None:
    """Value of a variable, None if unset or empty."""
    return os.environ.get(name) or None


def switch(name: str) -> bool:
    """Value of a switch, 1 or 0; off if unset or empty. ValueError names the variable."""
    value = text(name)
    if value not in (None, "0", "1"):
        raise ValueError(f"environment variable {name} is {value!r}; expected 0 or 1")
    return value == "1"


def nccl_refusal() -> str:
    """What keeps NCCL from the memory of peers' GPUs; "" = nothing.

    NCCL_P2P_DISABLE does if it is 1. NCCL_P2P_LEVEL does for GPUs farther apart than it says; SYS,
    or 4 and more of its older numbers, is any distance inside a host
    (https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html). How far apart GPUs are is
    not known here, so any nearer level counts.
    """
    if text("NCCL_P2P_DISABLE") == "1":
        return "NCCL_P2P_DISABLE is 1"
    level = text("NCCL_P2P_LEVEL")
    if level is None or level == "SYS" or (level.isdecimal() and int(level) >= 4):
        return ""
    return f"NCCL_P2P_LEVEL is {level!r} (it may be 'SYS')"


def number(name: str, default: float) -> float:
    """Value of a numeric variable, default if unset or empty. ValueError names the variable."""
    value = text(name)
    if value is None:
        return default
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"environment variable {name} is {value!r}; expected a number") from None


def integer(name: str) -> int | None:
    """Value of a variable that holds a whole number, None if unset or empty."""
    value = text(name)
    if value is None:
        return None
    try:
        return int(value)
    except ValueError:
        raise ValueError(
            f"environment variable {name} is {value!r}; expected a whole number"
        ) from None

"""How NVSHMEM moves bytes between the ranks of the GPU tests: see tests/softnic/README.md."""

import ctypes
import os
import socket
from pathlib import Path

import torch.distributed as dist

SOFTNIC = Path(__file__).parents[1] / "build" / "softnic" / "nvshmem_transport_ucx.so.3"
MODE = os.environ.get("EPCOMM_TEST_NVSHMEM", "peer")

# Multicast stays off, and so does what looks for other machines.
_ALWAYS = {
    "NVSHMEM_DISABLE_NVLS": "1",
    "NVSHMEM_DISABLE_MNNVL": "1",
    "NVSHMEM_IB_ENABLE_IBGDA": "0",
}
# The plugin is found as "ucx", and shares the heap by CUDA IPC. Nothing that arrives needs a flush,
# which the proxy would ask CUDA for (tests/softnic/README.md says why it must not).
_SOFTNIC = {
    "NVSHMEM_BYPASS_FLUSH": "1",
    "NVSHMEM_REMOTE_TRANSPORT": "ucx",
    "NVSHMEM_DISABLE_CUDA_VMM": "1",
    "CUDA_MODULE_LOADING": "EAGER",
    "SOFTNIC_CHAOS_US": os.environ.get("SOFTNIC_CHAOS_US", "200"),
}
MODES = {
    "peer": {"NVSHMEM_REMOTE_TRANSPORT": "none"},
    "card": {**_SOFTNIC, "NVSHMEM_DISABLE_P2P": "1"},
    "nodes": _SOFTNIC,
}
_CLONE_NEWUTS = 0x04000000
_plugin: ctypes.CDLL | None = None


def prepare(rank: int, num_ranks: int) -> None:
    """In the process of a rank, before it initialises CUDA."""
    global _plugin
    os.environ.update({**_ALWAYS, **MODES[MODE]})
    if MODE == "nodes":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWUTS) != 0:
            raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWUTS): needs root")
        socket.sethostname(f"node{rank * 2 // num_ranks}")
    if MODE != "peer":
        _plugin = ctypes.CDLL(str(SOFTNIC))


def take_memory() -> None:
    """Initialises NVSHMEM over all ranks, with memory for Buffers over some of them. Collective."""
    import epcomm

    arguments = {"num_experts": 8, "hidden": 64, "topk": 1, "max_tokens": 1, "transport": "rdma"}
    epcomm.Buffer(dist.group.WORLD, window_bytes=256 << 20, **arguments).destroy()


def card_counts() -> list[int]:
    """Puts and gets, atomics, fences and quiets that softnic has carried out for this rank."""
    counts = (ctypes.c_uint64 * 4)()
    if _plugin is not None:
        _plugin.softnic_counts(counts)
    return list(counts)

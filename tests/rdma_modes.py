"""How NVSHMEM moves bytes between the ranks of the GPU tests: see tests/softnic/README.md."""

import ctypes
import faulthandler
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

SOFTNIC = Path(__file__).parents[1] / "build" / "softnic" / "nvshmem_transport_ucx.so.3"
MODE = os.environ.get("EPCOMM_TEST_NVSHMEM", "peer")
# What a Buffer must be asked for in this mode.
OPTIONS = () if MODE == "peer" else (("network", "unproven"),)

# Multicast stays off, and so does what looks for other machines.
_ALWAYS = {
    "NVSHMEM_DISABLE_NVLS": "1",
    "NVSHMEM_DISABLE_MNNVL": "1",
    "NVSHMEM_IB_ENABLE_IBGDA": "0",
}
# The plugin is found as "ucx", and shares the heap by CUDA IPC. Where its lanes have no hardware
# queues of their own, they can wait for what waits for a kernel of epcomm.
_SOFTNIC = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
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
        faulthandler.register(signal.SIGUSR1)  # softnic sends it when it is stuck
        _plugin = ctypes.CDLL(str(SOFTNIC))
        if os.environ.get("EPCOMM_TEST_SOFTNIC_WAITS", "1") == "1":
            be_patient()


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


GPU = "cuda"
PATIENCE_S = 60.0


class Patience(TorchDispatchMode):
    """Before an operation that makes the host wait for the current stream, waits for it by polling.

    NVSHMEM's proxy thread calls CUDA where softnic is the card, and makes no progress while another
    thread of the process is inside of a CUDA call that keeps the context to itself, as a copy to
    pageable memory can until it is done. If that copy waits for a kernel, and the kernel for the
    card, it never is.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if makes_host_wait(func, args, kwargs):
            wait_for_stream()
        return func(*args, **kwargs)


def makes_host_wait(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the operation reads values of a GPU's tensor, or copies between it and the host."""
    devices = {t.device.type for t in _tensors(args)} | {t.device.type for t in _tensors(kwargs)}
    if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]).type)
    if GPU not in devices:
        return False
    reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return len(devices) > 1 or not reads.isdisjoint(func.tags)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def wait_for_stream() -> None:
    if not torch.cuda.is_initialized() or torch.cuda.is_current_stream_capturing():
        return
    event = torch.cuda.Event()
    event.record()
    deadline = time.monotonic() + PATIENCE_S
    while not event.query():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the current stream has not got to its end in {PATIENCE_S} s")
        time.sleep(20e-6)


def be_patient() -> None:
    """From now on, in this thread."""
    Patience().__enter__()
    synchronize = torch.cuda.synchronize

    def patiently(device: Any = None) -> None:
        wait_for_stream()
        synchronize(device)

    torch.cuda.synchronize = patiently  # type: ignore[assignment]

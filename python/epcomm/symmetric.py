"""Where the tensors lie that a Buffer returns: in memory that its peers can write.

On the CPU a tensor's storage owns a piece of the window, which returns when the tensor goes.

On a GPU that is not enough: Python drops a tensor while kernels that use it are still queued, and
the piece may be used again only when they are done. Two ways were weighed, by the source of torch's
caching allocator (c10/cuda/CUDACachingAllocator.cpp):

- Tensors over foreign memory (DLPack, __cuda_array_interface__), whose release records events.
  `Tensor.record_stream` does nothing on such tensors, so the release cannot know the streams that
  the user's kernels ran on; waiting for all streams (cuCtxRecordEvent) makes a call wait for work
  that it has nothing to do with, and breaks graph captures of other threads.
- A `torch.cuda.MemPool` whose segments are pieces of the window. The tensors are torch's own:
  record_stream works, memory is used again at once on the stream that it was made on, and
  `expandable_segments` does not touch pools with an allocator of their own. This is what we take.
  Its price: the pool keeps segments that no tensor uses, by stream. When the window is full, they
  are given back (the pool is replaced, which waits for the GPU), and the call is tried again.

During a graph capture torch allocates in the graph's own pool, whatever pool is asked for (the
first of its open pools that fits wins, and the capture's is older). There a tensor is a piece of
the window over which `__cuda_array_interface__` makes a tensor, and which the graph itself holds
(cudaGraphRetainUserObject), so it stays reserved for as long as the graph may be replayed. Each
call in a capture takes memory of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from .errors import Error

Wanted = Sequence[tuple[torch.dtype, tuple[int, ...]]]
"""The dtype and the shape of each tensor of a call."""


class Tensors(Protocol):
    """Makes the tensors that a Buffer returns."""

    def make(self, wanted: Wanted) -> list[torch.Tensor] | None:
        """Uninitialised tensors, on the current stream; None if there is no room for all."""

    def close(self) -> None:
        """The Buffer is destroyed: gives back what no tensor uses. Tensors stay valid."""


def tensors_of(native: Any, module: ModuleType, device: torch.device) -> Tensors:
    """What makes the tensors of a native Buffer of this extension module."""
    if not native.caps.symmetric_outputs:
        return OrdinaryTensors(device)
    if device.type == "cpu":
        return HostTensors(native)
    return PoolTensors(native, module, device)


class OrdinaryTensors:
    """Memory of torch's allocator, for transports that need no other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def make(self, wanted: Wanted) -> list[torch.Tensor] | None:
        return [torch.empty(shape, dtype=dtype, device=self._device) for dtype, shape in wanted]

    def close(self) -> None:
        pass


class HostTensors:
    """Pieces of a window in host memory."""

    def __init__(self, native: Any) -> None:
        self._native = native

    def make(self, wanted: Wanted) -> list[torch.Tensor] | None:
        tensors = []
        for dtype, shape in wanted:
            if math.prod(shape) == 0:  # takes no room, so it never fails for want of it
                tensors.append(torch.empty(shape, dtype=dtype))
                continue
            piece = self._native.allocate(math.prod(shape) * dtype.itemsize)
            if piece is None:
                return None
            # The tensor's storage holds the piece, which returns to the window with it.
            tensors.append(torch.frombuffer(piece, dtype=dtype).view(shape))
        return tensors

    def close(self) -> None:
        pass


class PoolTensors:
    """A memory pool of torch over a window in device memory; see the module's docstring.

    A tensor that lives longer than the Buffer keeps its segment, and the segment the whole window.
    Once it is dropped as well, `torch.cuda.empty_cache()` frees them.

    An address may be told to the peers only in the order of the stream that was current in `make`:
    earlier work on that stream may still use the memory.
    """

    def __init__(self, native: Any, module: ModuleType, device: torch.device) -> None:
        self._native = native
        self._module = module
        self._device = device
        self._pool = self._new_pool()

    def make(self, wanted: Wanted) -> list[torch.Tensor] | None:
        if torch.cuda.is_current_stream_capturing():
            return self._captured(wanted)
        self._module.release_uncaptured()
        tensors = self._pooled(wanted)
        if tensors is None:
            full, self._pool = self._pool, self._new_pool()
            _retire(full)  # gives back the segments that are unused
            del full
            tensors = self._pooled(wanted)
        if tensors is None:
            # Segments that were in use when their pool was replaced went to torch's own cache.
            torch.cuda.empty_cache()
            tensors = self._pooled(wanted)
        return tensors

    def close(self) -> None:
        pool, self._pool = self._pool, None
        _retire(pool)

    def __del__(self) -> None:
        try:
            if self._pool is not None:
                self.close()
        except Exception:  # while Python exits, what close() needs may be gone, and all memory goes
            pass

    def _new_pool(self) -> Any:
        with torch.cuda.device(self._device):
            return torch.cuda.MemPool(_allocator(self._module).allocator())

    def _pooled(self, wanted: Wanted) -> list[torch.Tensor] | None:
        self._module.set_pool_source(self._native)
        try:
            with torch.cuda.use_mem_pool(self._pool, self._device):
                return [torch.empty(shape, dtype=d, device=self._device) for d, shape in wanted]
        except torch.cuda.OutOfMemoryError:
            return None
        finally:
            self._module.set_pool_source(None)

    def _captured(self, wanted: Wanted) -> list[torch.Tensor] | None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        tensors = []
        for dtype, shape in wanted:
            bytes_ = math.prod(shape) * dtype.itemsize
            if bytes_ == 0:
                tensors.append(torch.empty(shape, dtype=dtype, device=self._device))
                continue
            piece = self._native.allocate(bytes_)
            if piece is None:
                return None
            if not self._module.retain_in_capture(piece, stream):
                raise Error("the current stream stopped capturing during the call")
            flat = torch.as_tensor(_DevicePiece(piece), device=self._device)
            tensors.append(flat.view(dtype).view(shape))
        return tensors


class _DevicePiece:
    """A piece of a window as torch.as_tensor takes it; the tensor's storage keeps it.

    Format: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 2, which
    leaves the order of streams to the caller.
    """

    def __init__(self, piece: Any) -> None:
        self._piece = piece
        self.__cuda_array_interface__ = {
            "shape": (piece.bytes,),
            "typestr": "|u1",
            "data": (piece.address, False),
            "version": 2,
        }


_retired: list[Any] = []


def _retire(pool: Any) -> None:
    """Ends a memory pool, which synchronises. While this thread captures a graph, torch would end
    the process at that, so the pool waits for the next one that is retired."""
    _retired.append(pool)
    del pool
    if not torch.cuda.is_current_stream_capturing():
        _retired.clear()


_allocators: dict[str, Any] = {}


def _allocator(module: ModuleType) -> Any:
    """The allocator whose functions lie in the extension module. Kept for good: pools point to it.

    Raises Error if this torch has no memory pools.
    """
    if not hasattr(torch.cuda, "MemPool") or not hasattr(torch.cuda, "use_mem_pool"):
        raise Error(
            f"torch {torch.__version__} has no torch.cuda.MemPool, which this transport makes its "
            "tensors with; install torch 2.6 or later, or use transport='nccl'"
        )
    path = str(Path(str(module.__file__)).resolve())
    if path not in _allocators:
        _allocators[path] = torch.cuda.memory.CUDAPluggableAllocator(
            path, "epcomm_pool_alloc", "epcomm_pool_free"
        )
    return _allocators[path]

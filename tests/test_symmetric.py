"""Which memory a Buffer's tensors come from; the GPU's part over stand-ins for torch.cuda."""

import contextlib
import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epcomm import _core, native, symmetric

WANTED = [(torch.bfloat16, (3, 8)), (torch.float32, (0, 4)), (torch.uint8, (16,))]
CPU = torch.device("cpu")


class Machine:
    """torch.cuda and the extension module, without a GPU. Memory comes from `room` allocations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: list[int]) -> None:
        self.room = room  # how many tensors fit, at each try
        self.log: list[str] = []
        self.source: Any = None
        self.capturing = False
        self.retained: list[Any] = []
        self.caps = SimpleNamespace(symmetric_outputs=True)
        self.pieces = 10
        self.__file__ = "/nowhere/_cuda.so"
        self.tries = 0
        cuda = torch.cuda
        empty = torch.empty

        class MemPool:
            def __init__(pool, allocator: object) -> None:
                self.log.append("pool")

            def __del__(pool) -> None:
                self.log.append("pool gone")

        @contextlib.contextmanager
        def use_mem_pool(pool: object, device: object) -> Iterator[None]:
            assert isinstance(pool, MemPool) and self.source is self
            self.left = self.room[self.tries]
            self.tries += 1
            self.inside = True
            try:
                yield
            finally:
                self.inside = False

        def allocate(shape: Any, **options: Any) -> torch.Tensor:
            if getattr(self, "inside", False) and 0 not in shape:
                self.left -= 1
                if self.left < 0:
                    raise cuda.OutOfMemoryError("CUDA out of memory")
            return empty(shape, **options)

        monkeypatch.setattr(cuda, "MemPool", MemPool, raising=False)
        monkeypatch.setattr(cuda, "use_mem_pool", use_mem_pool, raising=False)
        monkeypatch.setattr(cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(cuda, "current_stream", lambda d: SimpleNamespace(cuda_stream=7))
        monkeypatch.setattr(cuda, "empty_cache", lambda: self.log.append("empty_cache"))
        monkeypatch.setattr(torch, "empty", allocate)
        monkeypatch.setattr(
            symmetric, "_allocator", lambda module: SimpleNamespace(allocator=lambda: None)
        )
        # A piece of host memory stands for one on the device.
        monkeypatch.setattr(
            torch,
            "as_tensor",
            lambda piece, device: torch.frombuffer(piece._piece.memory, dtype=torch.uint8),
        )
        self.tensors = symmetric.PoolTensors(self, self, CPU)  # type: ignore[arg-type]

    def set_pool_source(self, source: Any) -> None:
        self.source = source

    def release_uncaptured(self) -> None:
        self.log.append("release")

    def retain_in_capture(self, piece: Any, stream: int) -> bool:
        assert stream == 7
        self.retained.append(piece)
        return self.capturing

    def allocate(self, bytes_: int) -> Any:
        self.pieces -= 1
        if self.pieces < 0:
            return None
        return SimpleNamespace(bytes=bytes_, address=4096, memory=bytearray(bytes_))


@pytest.fixture
def machine_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[int]], Machine]]:
    machines = []

    def make(room: list[int]) -> Machine:
        machines.append(Machine(monkeypatch, room))
        return machines[-1]

    yield make
    for machine in machines:
        machine.capturing = False
        machine.tensors.close()


def check_made(tensors: list[torch.Tensor] | None) -> None:
    assert tensors is not None
    assert [(t.dtype, tuple(t.shape)) for t in tensors] == WANTED


def test_pool_with_room(machine_with: Callable[[list[int]], Machine]) -> None:
    machine = machine_with([2])
    check_made(machine.tensors.make(WANTED))
    assert machine.log == ["pool", "release"]
    assert machine.source is None  # other allocations of this thread do not end in the window


def test_full_pool_gives_back_what_is_unused(machine_with: Callable[[list[int]], Machine]) -> None:
    machine = machine_with([1, 2])
    check_made(machine.tensors.make(WANTED))
    assert machine.log == ["pool", "release", "pool", "pool gone"]


def test_full_pool_asks_torch_last(machine_with: Callable[[list[int]], Machine]) -> None:
    machine = machine_with([0, 1, 2])
    check_made(machine.tensors.make(WANTED))
    assert machine.log[2:] == ["pool", "pool gone", "empty_cache"]


def test_full_window(machine_with: Callable[[list[int]], Machine]) -> None:
    machine = machine_with([1, 1, 1])
    assert machine.tensors.make(WANTED) is None
    assert machine.source is None


def test_close_gives_the_pool_back(machine_with: Callable[[list[int]], Machine]) -> None:
    machine = machine_with([])
    machine.tensors.close()
    assert machine.log == ["pool", "pool gone"]


def test_a_pool_is_not_ended_during_a_capture(machine_with: Callable[[list[int]], Machine]) -> None:
    machine = machine_with([])
    machine.capturing = True
    machine.tensors.close()
    assert machine.log == ["pool"]
    machine.capturing = False
    machine_with([]).tensors.close()
    assert machine.log == ["pool", "pool gone"]


def test_captured_tensors_are_held_by_the_graph(
    machine_with: Callable[[list[int]], Machine],
) -> None:
    machine = machine_with([])
    machine.capturing = True
    check_made(machine.tensors.make(WANTED))
    assert [piece.bytes for piece in machine.retained] == [48, 16]
    machine.pieces = 1
    assert machine.tensors.make(WANTED) is None


def test_interface_of_a_captured_piece() -> None:
    piece = SimpleNamespace(bytes=64, address=0x7F0000000000)
    interface = symmetric._DevicePiece(piece).__cuda_array_interface__
    assert interface["data"] == (0x7F0000000000, False)
    assert (interface["shape"], interface["typestr"], interface["version"]) == ((64,), "|u1", 2)


def test_torch_without_memory_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "MemPool", raising=False)
    with pytest.raises(symmetric.Error, match=r"torch.cuda.MemPool.*2\.6"):
        symmetric._allocator(SimpleNamespace(__file__="x"))  # type: ignore[arg-type]


@pytest.mark.skipif(
    importlib.util.find_spec("epcomm._cuda") is None, reason=f"_cuda is {_core.cuda_status}"
)
def test_functions_that_torch_calls() -> None:
    """They are exported, and have no memory where no Buffer's call is under way."""
    cuda = native.load_cuda()
    assert cuda is not None
    library = ctypes.CDLL(str(cuda.__file__))
    library.epcomm_pool_alloc.restype = ctypes.c_void_p
    library.epcomm_pool_alloc.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    library.epcomm_pool_free.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    assert library.epcomm_pool_alloc(512, 0, None) is None
    library.epcomm_pool_free(4096, 512, 0, None)  # not ours: nothing happens
    cuda.set_pool_source(None)
    cuda.release_uncaptured()
    if not torch.cuda.is_available():
        with pytest.raises(symmetric.Error, match="looking at the GPU"):
            cuda.SymmetricMemory(_Alone(), 1 << 20, 1.0)
        assert "rank 0" in cuda.check_peer_access(_Alone(), 1.0).failure


class _Alone:
    rank, size = 0, 1

    def all_gather(self, data: bytes) -> list[bytes]:
        return [data]

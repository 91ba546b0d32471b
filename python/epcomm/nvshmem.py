"""NVSHMEM's host library: found, checked and opened before the module that needs it is imported.

The library comes with the pip package nvidia-nvshmem-cu12 or nvidia-nvshmem-cu13, which torch
installs beside itself. It is opened by its path, so that neither LD_LIBRARY_PATH nor an rpath
matters; where it is loaded already (torch may have), that copy is taken. The device library is
linked into `_nvshmem` when epcomm is built.

epcomm sets no environment variable, so those that NVSHMEM reads are the caller's: docs/rdma.md.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import os
from pathlib import Path
from types import ModuleType

from . import _core, env

_logger = logging.getLogger("epcomm")

SONAME = "libnvshmem_host.so.3"
# Versions of NVSHMEM that the code is written for: docs/rdma.md.
OLDEST = (3, 4, 5)
TOO_NEW = (3, 9, 0)

TRANSPORTS = ("hierarchical", "rdma")

Version = tuple[int, int, int]


def load() -> ModuleType:
    """The module with the transports over NVSHMEM.

    Raises:
        ValueError: this build has no such module, there is no host library, or one of a version
            that the module does not go with; or NVSHMEM's use of NVLink multicast is undecided.
    """
    if not built_transports():
        raise ValueError(f"this build has no transport over NVSHMEM: {_core.nvshmem_status}")
    check_multicast()
    library, path = open_library()
    version = version_of(library)
    check_version(version, path, device_library())
    module = importlib.import_module("._nvshmem", __package__)
    _logger.debug("NVSHMEM %s: %s", _text(version), path)
    return module


def device_library() -> Version:
    """Version of the device library that this build was linked with."""
    major, minor, patch = map(int, _core.nvshmem_status.rsplit(" ", 1)[1].split("."))
    return major, minor, patch


def built_transports() -> list[str]:
    """Names of the transports over NVSHMEM in this build."""
    return list(TRANSPORTS) if _core.nvshmem_status.startswith("built") else []


def find_library() -> Path | None:
    """The host library that would be opened, unless one is loaded already; None if there is none.

    EPCOMM_NVSHMEM_LIB names it, or a folder that holds it; else it is the pip package's.
    """
    named = env.text("EPCOMM_NVSHMEM_LIB")
    if named is not None:
        path = Path(named)
        path = path / SONAME if path.is_dir() else path
        if not path.is_file():
            raise ValueError(
                f"environment variable EPCOMM_NVSHMEM_LIB is {named!r}, but there is no file "
                f"{path}; expected {SONAME} or its folder"
            )
        return path
    for folder in _package_folders():
        path = Path(folder) / "lib" / SONAME
        if path.is_file():
            return path
    return None


def _package_folders() -> list[str]:
    """Of the pip package nvidia.nvshmem: a namespace package, found without importing it."""
    try:
        spec = importlib.util.find_spec("nvidia.nvshmem")
    except ModuleNotFoundError:
        return []
    return list(spec.submodule_search_locations or []) if spec is not None else []


def open_library() -> tuple[ctypes.CDLL, str]:
    """The host library, for all modules of this process, and where it is."""
    try:
        loaded = ctypes.CDLL(SONAME, mode=os.RTLD_NOLOAD | os.RTLD_NOW | os.RTLD_GLOBAL)
        return loaded, f"{SONAME} (loaded already)"
    except OSError:
        pass
    path = find_library()
    if path is None:
        raise ValueError(
            f"there is no {SONAME}; install epcomm[cu12] or epcomm[cu13] (nvidia-nvshmem-cu12, "
            "nvidia-nvshmem-cu13), or set EPCOMM_NVSHMEM_LIB to its path"
        )
    try:
        return ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_GLOBAL), str(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be opened: {error}") from error


def version_of(library: ctypes.CDLL) -> Version:
    """What the library says of itself (nvshmemx_vendor_get_version_info, public API)."""
    parts = [ctypes.c_int(0) for _ in range(3)]
    library.nvshmemx_vendor_get_version_info(*(ctypes.byref(part) for part in parts))
    return parts[0].value, parts[1].value, parts[2].value


def check_version(host: Version, path: str, device: Version | None = None) -> None:
    """Raises ValueError unless the host library serves device code of this version.

    A host library serves older device libraries of its major version
    (https://docs.nvidia.com/nvshmem/release-notes-install-guide/prior-releases/release-3006.html),
    but not where a GPU drives the network card and the minor versions are on two sides of 3.5.19
    (known issues of .../release-notes/release-3521.html). So the minor versions must be the same.
    """
    if not OLDEST <= host < TOO_NEW:
        raise ValueError(
            f"{path} is NVSHMEM {_text(host)}; expected {_text(OLDEST)} or newer, below "
            f"{_text(TOO_NEW)}: no other version was tried with epcomm. Install one with pip, or "
            "name one with EPCOMM_NVSHMEM_LIB"
        )
    if device is not None and (host[:2] != device[:2] or host < device):
        raise ValueError(
            f"{path} is NVSHMEM {_text(host)}, and this epcomm was built with the device library "
            f"{_text(device)}; expected that version, or a newer {device[0]}.{device[1]}. Install "
            "one, name one with EPCOMM_NVSHMEM_LIB, or rebuild epcomm with the version that is "
            "installed"
        )


def check_multicast() -> None:
    """Raises ValueError unless the caller has decided about NVLink multicast.

    NVSHMEM sets multicast memory up when it is initialised unless NVSHMEM_DISABLE_NVLS is set;
    nothing else keeps it from that, and epcomm does not write to the environment.
    """
    if env.text("NVSHMEM_DISABLE_NVLS") is None:
        raise ValueError(
            "NVSHMEM_DISABLE_NVLS is not set: set it to 1 before the first Buffer over NVSHMEM is "
            "made, so that NVSHMEM leaves NVLink multicast alone, which epcomm does not use; or to "
            "0 to let NVSHMEM set it up"
        )


def describe() -> str:
    """For show_config: what is built, and the host library that it would open."""
    if not built_transports():
        return str(_core.nvshmem_status)
    try:
        found: object = find_library() or "not found"
    except ValueError as error:
        found = error
    return f"{_core.nvshmem_status}; host library: {found}"


def _text(version: Version) -> str:
    return ".".join(map(str, version))

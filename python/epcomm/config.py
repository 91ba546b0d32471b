"""What this build of epcomm contains."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import platform

from . import _core, nvshmem


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _transports() -> list[str]:
    names: list[str] = list(_core.transports())
    with contextlib.suppress(ModuleNotFoundError):  # "cuda" says why
        names += importlib.import_module("._cuda", __package__).transports()
    return names + [name for name in nvshmem.built_transports() if name not in names]


def show_config() -> dict[str, str]:
    """Prints what this build contains and what it runs on; returns the same as a dict.

    Keys: "epcomm", "transports", "cuda" and "nvshmem" (built, or why not), "python", "torch",
    "machine".
    """
    config = {
        "epcomm": _core.version,
        "transports": ", ".join(_transports()),
        "cuda": _core.cuda_status,
        "nvshmem": nvshmem.describe(),
        "python": platform.python_version(),
        "torch": _version_of("torch"),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    width = max(map(len, config))
    print("\n".join(f"{key:<{width}}  {value}" for key, value in config.items()))
    return config

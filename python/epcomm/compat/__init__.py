"""Interfaces of other libraries on epcomm, for callers that speak those.

import epcomm.compat
epcomm.compat.install()      # from now on `import deep_ep` finds epcomm.compat.deep_ep
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import sys
from types import ModuleType

_logger = logging.getLogger("epcomm")
_NAMES = ("deep_ep", "deep_ep_cpp")


def _modules(root: ModuleType) -> list[ModuleType]:
    """A module and, if it is a package, all that is in it."""
    found = [root]
    if hasattr(root, "__path__"):
        for info in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
            found.append(importlib.import_module(info.name))
    return found


def install() -> None:
    """Makes `import deep_ep` and `import deep_ep_cpp` find epcomm, in this process.

    Call it before anything imports deep_ep. A deep_ep that is installed is left out. May be called
    again.

    Raises:
        ImportError: another deep_ep was imported already, or torch is missing.
    """
    modules = {
        module.__name__.removeprefix(__name__ + "."): module
        for name in _NAMES
        for module in _modules(importlib.import_module(f"{__name__}.{name}"))
    }
    for name, module in modules.items():
        there = sys.modules.get(name)
        if there is not None and there is not module and not _is_shim(there):
            raise ImportError(
                f"{name} was imported already, from {getattr(there, '__file__', 'elsewhere')}; "
                "call epcomm.compat.install() before anything imports deep_ep"
            )
    # Every module by its name, so that none is loaded a second time, with other classes.
    sys.modules.update(modules)
    _logger.info("deep_ep is epcomm.compat.deep_ep in this process")


def _is_shim(module: ModuleType) -> bool:
    """The distribution of packaging/deep_ep, which re-exports the same."""
    return getattr(module, "__epcomm__", False) is True

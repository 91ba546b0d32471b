"""Refuses to be one of two packages named deep_ep in an environment."""

import importlib.metadata
import os
import sys

OURS = "epcomm-deep-ep"
# Distributions that hold a package deep_ep, as far as their names tell.
_OTHERS = ("deep-ep", "deepep", "tokenspeed-deepep", "uccl-deepep")
_FILES = {"__init__.py", "__pycache__", "buffer.py", "buffers", "utils"}


def others(folder):
    """What else claims the name deep_ep. folder: where this distribution's deep_ep is."""
    found = []
    for name in _OTHERS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(f"the distribution {name} {version}")
    # Installed over each other: files that are not ours beside those that are.
    foreign = sorted(set(os.listdir(folder)) - _FILES)
    if foreign:
        found.append(f"files of another distribution in {folder}: {', '.join(foreign)}")
    parent = os.path.dirname(folder)
    extension = [
        n for n in os.listdir(parent) if n.startswith("deep_ep_cpp.") and n.endswith(".so")
    ]
    if extension:
        found.append(f"the extension module {os.path.join(parent, extension[0])}")
    for path in sys.path:
        there = os.path.join(path or os.getcwd(), "deep_ep")
        if not os.path.isfile(os.path.join(there, "__init__.py")):
            continue
        if not os.path.samefile(there, folder):
            found.append(f"the package {there}")
    return found


def check(folder):
    """ImportError if this is not the only deep_ep: engines catch no other exception."""
    found = others(folder)
    if found:
        raise ImportError(
            f"{OURS} must be the only deep_ep of its environment, but there is also "
            f"{'; '.join(found)}. To use DeepEP itself: pip uninstall {OURS}, then install DeepEP "
            f"again. To use epcomm: uninstall the other, then install {OURS} again. To choose by "
            "process: uninstall this one and call epcomm.compat.install()"
        )

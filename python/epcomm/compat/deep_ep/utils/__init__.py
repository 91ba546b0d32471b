"""`deep_ep.utils`."""

from __future__ import annotations

from typing import Any

from .event import EventHandle, EventOverlap


def check_nvlink_connections(group: Any) -> None:
    """Nothing to check: epcomm also has transports for GPUs without NVLink."""


__all__ = ["EventHandle", "EventOverlap", "check_nvlink_connections"]

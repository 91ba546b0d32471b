"""`deep_ep.buffer`, where deep_ep 1.x has its Buffer."""

from .buffers.legacy import Buffer

__all__ = ["Buffer"]

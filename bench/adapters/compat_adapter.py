"""epcomm through its deep_ep interface: what an engine that speaks deep_ep gets.

Beside the rows of `epcomm --like-deep-ep`, which do the same work, these show what the interface
itself costs.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from types import ModuleType

from adapters.base import Operation, Options, Unavailable
from adapters.deep_ep_adapter import DeepEpAdapter


class CompatAdapter(DeepEpAdapter):
    takes_transport = True

    def _library(self, options: Options) -> ModuleType:
        on_gpu = self._workload.config.device.type == "cuda"
        if options.transport_options:
            raise Unavailable("deep_ep's interface takes no transport options")
        if options.ranks_per_node is not None:
            raise Unavailable("deep_ep's interface takes no number of ranks per node")
        if not on_gpu and options.transport not in ("auto", "cpu"):
            raise Unavailable("deep_ep's interface moves CPU tensors by the transport cpu")
        try:
            from epcomm.compat import deep_ep
        except ImportError as error:
            raise Unavailable(f"import epcomm.compat.deep_ep failed: {error}") from error
        # The interface has no arguments for these. Nothing of an earlier transport stays.
        os.environ["EPCOMM_TRANSPORT"] = "" if options.transport == "auto" else options.transport
        os.environ["EPCOMM_TIMEOUT"] = str(options.timeout)
        self.transport = options.transport
        return deep_ep

    def operations(self) -> Iterator[Operation]:
        """Under the names that epcomm's calls have."""
        for operation in super().operations():
            if self.layout == "padded" and operation.routing_mode == "fresh":
                operation = dataclasses.replace(operation, routing_mode="no-sync")
            yield operation
            del operation

"""Entry points of engines' plugin systems. They do nothing unless EPCOMM_DEEP_EP=1.

vLLM calls what stands in the group `vllm.general_plugins` in every process, SGLang what stands in
`sglang.srt.plugins` (https://docs.vllm.ai/en/latest/design/plugin_system/,
https://docs.sglang.io/docs/hardware-platforms/plugin). Importing this module loads neither torch
nor deep_ep.
"""

from __future__ import annotations

import contextlib
import importlib
import sys

from .. import env
from . import install


def vllm() -> None:
    """Puts epcomm in the place of deep_ep if EPCOMM_DEEP_EP is 1."""
    if env.switch("EPCOMM_DEEP_EP"):
        install()


# SGLang's module, the name it sets if it could import deep_ep, and what it imports from it.
_SGLANG = (
    ("sglang.srt.layers.moe.token_dispatcher.deepep", "use_deepep", ("Buffer", "Config")),
    ("sglang.srt.layers.moe.token_dispatcher.deepep_v2", "use_deepep_v2", ("ElasticBuffer",)),
)


def sglang() -> None:
    """As `vllm`. SGLang's scheduler process loads its plugins after it has looked for deep_ep, so
    its modules are told (names as of SGLang 0.5.23).
    """
    if not env.switch("EPCOMM_DEEP_EP"):
        return
    install()
    deep_ep = importlib.import_module("epcomm.compat.deep_ep")
    for name, found, wanted in _SGLANG:
        module = sys.modules.get(name)
        if module is None or getattr(module, found, True):
            continue
        for attribute in wanted:
            setattr(module, attribute, getattr(deep_ep, attribute))
        # Its modules import this after deep_ep, in the same try.
        with contextlib.suppress(ImportError, OSError):
            fp8 = importlib.import_module("sglang.kernels.ops.quantization.fp8_kernel")
            quantise = "sglang_per_token_group_quant_fp8"
            setattr(module, quantise, getattr(fp8, quantise))
        setattr(module, found, True)

"""Fast memory for neural networks: kernels for CPU and GPU, drop-in modules, and the systems built on them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmem import nn as nn
    from fastmem.ops._dispatch import explain as explain
    from fastmem.ops.causal_conv1d import causal_conv1d as causal_conv1d
    from fastmem.ops.causal_conv1d import causal_conv1d_step as causal_conv1d_step
    from fastmem.ops.causal_conv1d import causal_conv1d_step_ as causal_conv1d_step_
    from fastmem.ops.gated_write import Bank as Bank
    from fastmem.ops.gated_write import SurpriseStats as SurpriseStats
    from fastmem.ops.gated_write import gated_write as gated_write
    from fastmem.ops.selective_scan import selective_scan as selective_scan
    from fastmem.ops.selective_scan import selective_scan_step as selective_scan_step
    from fastmem.ops.selective_scan import selective_scan_step_ as selective_scan_step_
    from fastmem.ops.topk_attention import topk_attention as topk_attention

__version__ = "0.1.0"

_OPS = {  # public op -> its file in fastmem/ops
    "causal_conv1d": "causal_conv1d",
    "causal_conv1d_step": "causal_conv1d",
    "causal_conv1d_step_": "causal_conv1d",
    "gated_write": "gated_write",
    "selective_scan": "selective_scan",
    "selective_scan_step": "selective_scan",
    "selective_scan_step_": "selective_scan",
    "topk_attention": "topk_attention",
}
_TYPES = {"Bank": "gated_write", "SurpriseStats": "gated_write"}  # what an op takes and returns -> the op's file
_PACKAGES = ("compat", "experiments", "integrations", "models", "nn", "ops", "registry", "tasks")

__all__ = ["__version__", "explain", "nn", *_OPS, *_TYPES]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import fastmem` costs nothing."""
    value: Any
    if name in _PACKAGES:
        return import_module(f"fastmem.{name}")
    file = _OPS.get(name) or _TYPES.get(name)
    if file is not None:
        value = getattr(import_module(f"fastmem.ops.{file}"), name)
    elif name == "explain":
        for op in {*_OPS.values()}:  # they state what they support when they are imported
            import_module(f"fastmem.ops.{op}")
        value = import_module("fastmem.ops._dispatch").explain
    else:
        raise AttributeError(f"module 'fastmem' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})

"""causal-conv1d 1.7: the same names, signatures and layouts, on CPU and GPU."""

from fastmem.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]

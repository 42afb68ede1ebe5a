"""Where kernels are launched."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it that of x. Nothing for the interpreter's tensors on the CPU."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

"""Where kernels are launched: Triton launches on the current device, whatever its arguments are on."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """The device of x becomes the current one. Nothing for the interpreter's tensors on the CPU."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

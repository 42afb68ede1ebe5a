"""Where kernels are launched: Triton launches on the current device, whatever its arguments are on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments, Result = ParamSpec("Arguments"), TypeVar("Result")


def on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """The device of x becomes the current one. Nothing for the interpreter's tensors on the CPU."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def on_its_device(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """All that the function launches is launched on the device of its first argument."""

    @functools.wraps(function)
    def launch(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        x = args[0]
        assert isinstance(x, Tensor)
        with on(x):
            return function(*args, **kwargs)

    return launch

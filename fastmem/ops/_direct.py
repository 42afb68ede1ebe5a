"""Calls that may go straight to a kernel, past autograd (25 us) and PyTorch's dispatcher (10 us)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn import Parameter

from fastmem import _native


def untracked(*tensors: Tensor | None) -> bool:
    """Whether nothing differentiates or maps this call."""
    if torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():  # whether a tensor requires grad is not to be relied on there
        return not torch.is_grad_enabled()
    if forward_ad._current_level >= 0:
        return False
    return not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors))


def recorded(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for through this call."""
    if torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return not untracked(*tensors)


def apply(function: type[Function], *args: Any) -> Any:
    """function.apply(*args)."""
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        # Dynamo takes a tensor that torch.func has just wrapped for one without gradient, and leaves the Function out
        # without a word. What an op has made of it is believed.
        args = tuple(x.view_as(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    return function.apply(*args)


def unintercepted(*tensors: Tensor | None) -> bool:
    """Whether an untracked call may skip the dispatcher: no mode is on, no tensor is special, all are on the CPU."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    return all(x is None or ((type(x) is Tensor or type(x) is Parameter) and x.is_cpu) for x in tensors)


def _use_exchange() -> bool:
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # since torch 2.10
    return _native.kernels is not None and table is not None and _native.kernels.use_exchange(table)


KERNELS_READ_TENSORS = _use_exchange()


def readable(*tensors: Tensor | None) -> bool:
    """Whether a kernel may take these tensors themselves, to look at device, shape and strides on its own."""
    if not KERNELS_READ_TENSORS or torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    for x in tensors:
        if x is None:
            continue
        if (type(x) is not Tensor and type(x) is not Parameter) or not x.is_cpu or x.is_neg():
            return False
    return untracked(*tensors)


def dense(x: object) -> bool:
    """Whether x is a tensor with strides, of which a kernel's result can be made."""
    return isinstance(x, Tensor) and x.layout == torch.strided


def changed(state: Tensor) -> None:
    """Tell autograd that a kernel wrote into this tensor."""
    if not (torch.compiler.is_compiling() or state.is_inference()):  # a compiled graph knows it from the op
        torch.autograd.graph.increment_version(state)

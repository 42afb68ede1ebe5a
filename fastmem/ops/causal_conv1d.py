"""Depthwise causal convolution over time, over whole sequences and step by step. docs/ops/causal_conv1d.md."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastmem import _native
from fastmem.ops import _dispatch
from fastmem.ops._causal_conv1d_autograd import CausalConv1d, step_directly
from fastmem.ops._causal_conv1d_reference import compute_dtype, reference
from fastmem.ops._direct import apply, changed, dense, readable, untracked
from fastmem.ops._dispatch import Explanation
from fastmem.ops._sequence import check_cu_seqlens, check_reset

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = (None, "silu", "swish")


class _Call(NamedTuple):
    """A validated call; weight and bias in the dtype that is computed in."""

    x: Tensor  # (B, L, D), or (B, D) of a step
    weight: Tensor
    bias: Tensor | None
    initial_state: Tensor | None
    reset: Tensor | None
    cu_seqlens: Tensor | None
    silu: bool


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Each channel convolved over time with W weights of its own, seeing no later step.

    y[t] = activation(bias + sum over w of weight[:, w] * x[t - (W - 1) + w]). Inputs before the sequence are the rows
    of `initial_state`, or zeros. Derivatives of any order are exact, for both states too.

    Args:
        x: (B, L, D) float32, float64, or bfloat16 or float16, which are computed in float32. Read in place in any
            layout.
        weight: (D, W), any float dtype, W at least 1; the last one multiplies the present input.
        bias: (D,), any float dtype, or None.
        activation: None, or "silu" (also called "swish").
        initial_state: (B, W - 1, D), the dtype of x: the inputs before the sequence, oldest first; (n, W - 1, D) for
            n packed sequences.
        return_final_state: also return what `initial_state` must be to go on after this sequence.
        reset: (B, L) bool; where true, no input before this step, nor the initial state, is seen from here on: they
            count as zeros.
        cu_seqlens: (n + 1,) int32 or int64, from 0 up to L: x is a row of n sequences, B = 1, and sequence i holds
            steps cu_seqlens[i] to cu_seqlens[i + 1] - 1. They do not see each other; one may be empty.
        backend: "auto", "cpp", "triton" or "reference".

    Returns:
        y (B, L, D), contiguous, the dtype of x; with return_final_state also the final state, shaped as the initial.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device, number, activation or backend is wrong, or the backend cannot serve the call.

    Source: the short convolution in the block of Gu and Dao, Mamba (arXiv:2312.00752), figure 3.
    """
    call = _validated(x, weight, bias, activation, initial_state, reset, cu_seqlens)
    chosen = _chosen("causal_conv1d", backend, call)
    if chosen == "reference":
        results = reference(*call)
    else:
        grouped = (call.x, call.weight[None], None if call.bias is None else call.bias[None], *call[3:])
        if untracked(call.x, call.weight, call.bias, initial_state):
            results = torch.ops.fastmem.causal_conv1d(*grouped)
        else:
            results = apply(CausalConv1d, *grouped)
    return results if return_final_state else results[0]


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of causal_conv1d.

    Args:
        state: (B, W - 1, D) the inputs before this one, oldest first, the dtype of x. Not changed.
        x: (B, D) the input of this step; float32, float64, bfloat16 or float16.
        weight: (D, W), any float dtype.
        bias: (D,), any float dtype, or None.
        activation: None, or "silu" (also called "swish").
        backend: "auto", "cpp", "triton" or "reference".

    Returns:
        y (B, D) and the new state (B, W - 1, D), in the dtype of x.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device, activation or backend is wrong, or the backend cannot serve the call.
    """
    if (
        backend == "auto"
        and activation in ACTIVATIONS
        and dense(x)
        and dense(state)
        and readable(state, x, weight, bias)
    ):
        new_state = torch.empty_like(state, memory_format=torch.contiguous_format)
        y = step_directly(state, x, weight, bias, activation is not None, new_state)
        if y is not None:
            return y, new_state
    call = _validated_step(state, x, weight, bias, activation)
    chosen = _chosen("causal_conv1d_step", backend, call)
    if chosen != "reference" and untracked(state, x, weight, bias):
        return torch.ops.fastmem.causal_conv1d_step(state, x, call.weight, call.bias, call.silu)
    return _tracked_step(call, chosen)


def causal_conv1d_step_(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """One step of causal_conv1d that changes `state` in place.

    Arguments and errors as for causal_conv1d_step. Gradients flow through y and through the state's new value.

    Returns:
        y (B, D), in the dtype of x.
    """
    if backend == "auto" and activation in ACTIVATIONS and dense(x) and readable(state, x, weight, bias):
        y = step_directly(state, x, weight, bias, activation is not None, state)
        if y is not None:
            changed(state)
            return y
    call = _validated_step(state, x, weight, bias, activation)
    chosen = _chosen("causal_conv1d_step_", backend, call)
    if chosen != "reference" and untracked(state, x, weight, bias):
        y = torch.ops.fastmem.causal_conv1d_step_(state, x, call.weight, call.bias, call.silu)
        changed(state)
        return y
    # Autograd keeps the old state, which is about to be overwritten.
    y, new_state = _tracked_step(call._replace(initial_state=state.clone()), chosen)
    state.copy_(new_state)
    return y


def _tracked_step(call: _Call, chosen: str) -> tuple[Tensor, Tensor]:
    """A step as a sequence of length 1."""
    call = call._replace(x=call.x[:, None])
    if chosen == "reference":
        y, new_state = reference(*call)
    else:
        bias = None if call.bias is None else call.bias[None]
        y, new_state = apply(CausalConv1d, call.x, call.weight[None], bias, *call[3:])
    return y[:, 0], new_state


def _chosen(op: str, backend: str, call: _Call) -> str:
    """The backend of a call. On a CPU with kernels that is known without reasons, which take longer than a step."""
    if backend == "auto" and call.x.is_cpu and _native.kernels is not None:
        return "cpp"
    plan = _plan(op, backend, call)
    if backend == "auto" and plan.chosen == "reference":
        _dispatch.warn_slow(op, plan.refused["cpp" if call.x.device.type == "cpu" else "triton"])
    return plan.chosen


def _plan(op: str, backend: str, call: _Call) -> Explanation:
    tensors = [x for x in call if isinstance(x, Tensor)]
    triton = _dispatch.no_triton(*tensors)
    if triton is None:
        from fastmem.kernels import causal_conv1d as kernels

        triton = kernels.refuses(call.weight.shape[1])
    return _dispatch.choose(op, backend, {"triton": triton, "cpp": _dispatch.no_cpp(*tensors), "reference": None})


@_dispatch.explainer("causal_conv1d")
def _explain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Explanation:
    call = _validated(x, weight, bias, activation, initial_state, reset, cu_seqlens)
    return _plan("causal_conv1d", backend, call)


@_dispatch.explainer("causal_conv1d_step")
def _explain_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str = "auto",
) -> Explanation:
    return _plan("causal_conv1d_step", backend, _validated_step(state, x, weight, bias, activation))


@_dispatch.explainer("causal_conv1d_step_")
def _explain_step_(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str = "auto",
) -> Explanation:
    return _plan("causal_conv1d_step_", backend, _validated_step(state, x, weight, bias, activation))


# ---------------------------------------------------------------------------------------------------------- validation


def _validated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
) -> _Call:
    _check_input(x, 3, "(B, L, D)")
    weight, bias, silu = _check_parameters(x, weight, bias, activation)
    (B, L, D), W = x.shape, weight.shape[1]
    n = B
    if reset is not None:
        check_reset(reset, B, L, x.device)
    if cu_seqlens is not None:
        cu_seqlens = check_cu_seqlens(cu_seqlens, B, L, x.device)
        n = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        sizes = f"({'B' if cu_seqlens is None else 'n'}, W - 1, D) = ({n}, {W - 1}, {D})"
        _check_state("initial_state", initial_state, (n, W - 1, D), sizes, x)
    return _Call(x, weight, bias, initial_state, reset, cu_seqlens, silu)


def _validated_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> _Call:
    _check_input(x, 2, "(B, D)")
    weight, bias, silu = _check_parameters(x, weight, bias, activation)
    (B, D), W = x.shape, weight.shape[1]
    _check_state("state", state, (B, W - 1, D), f"(B, W - 1, D) = ({B}, {W - 1}, {D})", x)
    return _Call(x, weight, bias, state, None, None, silu)


def _check_input(x: Tensor, ndim: int, shape: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    _check_dense("x", x)
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.ndim != ndim:
        raise ValueError(f"x: expected {shape}, got {tuple(x.shape)}")


def _check_dense(name: str, x: Tensor) -> None:
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {x.layout}")


def _check_parameters(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor | None, bool]:
    D = x.shape[-1]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None and name == "bias":
            continue
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(parameter).__name__}")
        _check_dense(name, parameter)
        if not parameter.is_floating_point():
            raise TypeError(f"{name}: expected a float dtype, got {parameter.dtype}")
        if parameter.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {parameter.device}")
    if weight.ndim != 2 or weight.shape[0] != D or weight.shape[1] < 1:
        time_last = x.ndim == 3 and weight.ndim == 2 and weight.shape[0] == x.shape[1]
        hint = "; x looks like (B, D, L), expected (B, L, D)" if time_last else ""
        raise ValueError(f"weight: expected (D, W) with D = {D} and W at least 1, got {tuple(weight.shape)}{hint}")
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"bias: expected (D,) with D = {D}, got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected None, 'silu' or 'swish', got {activation!r}")
    compute = compute_dtype(x.dtype)
    if weight.dtype != compute:
        weight = weight.to(compute)
    if bias is not None and bias.dtype != compute:
        bias = bias.to(compute)
    return weight, bias, activation is not None


def _check_state(name: str, state: Tensor, shape: tuple[int, ...], sizes: str, x: Tensor) -> None:
    if not isinstance(state, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(state).__name__}")
    _check_dense(name, state)
    if state.dtype != x.dtype:
        raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {state.dtype}")
    if state.shape != shape:
        raise ValueError(f"{name}: expected {sizes}, got {tuple(state.shape)}")
    if state.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {state.device}")

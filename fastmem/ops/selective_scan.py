"""The selective scan of state-space models (Mamba): a linear recurrence whose coefficients depend on the input.

Derivation of forward, backward, second derivative and chunking: docs/ops/selective_scan.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastmem.ops import _dispatch
from fastmem.ops import _selective_scan_reference as definition
from fastmem.ops._direct import apply, changed, dense, readable, recorded, untracked
from fastmem.ops._dispatch import Explanation
from fastmem.ops._selective_scan_autograd import SelectiveScan, step_directly
from fastmem.ops._sequence import check_cu_seqlens, check_reset


class _Call(NamedTuple):
    """A validated call. B and C are (B, L, G, N); parameters and states are in the dtype that the state is kept in."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    initial_state: Tensor | None
    reset: Tensor | None
    cu_seqlens: Tensor | None


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan of a diagonal state-space model whose step size, input and output maps change with every step.

    Per channel d and state n, with dt = delta + delta_bias, through softplus where `delta_softplus`:

        h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] u[t]
        y[t] = (sum over n of C[t] h[t] + D u[t]) * silu(z[t])

    Gradients flow to every float input and from both results; second derivatives are exact, third ones raise (with
    backend="reference" they exist).

    Args:
        u: (B, L, D) input; float32, bfloat16, float16 or float64.
        delta: (B, L, D) step sizes before bias and softplus, as all of delta, B, C, z of any float dtype; float64 goes
            with float64 only.
        A: (D, N) decay rates, negative for a scan that forgets. Complex: B and C may be complex too, y is twice the
            real part, and the reference serves the call.
        B: (B, L, N), or (B, L, G, N) where channel d reads group d // (D / G): input map.
        C: like B: output map.
        D: (D,) skip connection, or None.
        z: (B, L, D) gate, or None.
        delta_bias: (D,) or None.
        delta_softplus: whether dt = softplus(delta + delta_bias).
        initial_state: (B, D, N) state before the first step; with cu_seqlens (n, D, N), one for each sequence.
        return_final_state: also return the state after the last step.
        reset: (B, L) bool, true where the state is dropped before the step; also the initial one, at t = 0.
        cu_seqlens: (n + 1,) int32 or int64, B = 1: n sequences packed one after the other, sequence i being
            [cu_seqlens[i], cu_seqlens[i + 1]). None carries over to the next.
        backend: "auto", "reference", "cpp" or "triton".

    Returns:
        y (B, L, D) in the dtype of u; with return_final_state (y, final_state): (B, D, N), or (n, D, N) with
        cu_seqlens, in float32 (float64 for float64).

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device or backend is wrong, or the backend cannot serve the call.

    Source: Gu and Dao, Mamba (arXiv:2312.00752), equations 2a, 2b and algorithm 2.
    """
    call = _validated(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset, cu_seqlens)
    explanation = _dispatch.choose("selective_scan", backend, _refusals(call))
    if explanation.chosen == "reference":
        if backend == "auto":
            _dispatch.warn_slow("selective_scan", explanation.refused["cpp" if u.device.type == "cpu" else "triton"])
        y, final = definition.scan(*call)
    else:
        y, final = _apply(call, return_final_state)
    return (y, final) if return_final_state else y


def _apply(call: _Call, save_final: bool) -> tuple[Tensor, Tensor]:
    """The raw op, or the Function around it where something may be differentiated."""
    u, delta, A, B, C, D, z, bias, softplus, state, reset, cu_seqlens = call
    skip, bias = (None if x is None else x[None] for x in (D, bias))
    inputs = u, delta, A[None], B, C, skip, z, bias, state, reset, cu_seqlens, softplus
    if untracked(u, delta, A, B, C, D, z, bias, state):
        y, final, _ = torch.ops.fastmem.selective_scan_forward(*inputs, save_final, False)
    else:
        y, final, _ = apply(SelectiveScan, *inputs, save_final)
    return y, final


@_dispatch.explainer("selective_scan")
def _explain(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Explanation:
    call = _validated(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset, cu_seqlens)
    return _dispatch.choose("selective_scan", backend, _refusals(call))


def _refusals(call: _Call) -> dict[str, str | None]:
    tensors = [x for x in call if isinstance(x, Tensor)]
    cpp, triton = _dispatch.no_cpp(*tensors), _dispatch.no_triton(*tensors)
    if any(x.is_complex() for x in (call.A, call.B, call.C)):
        cpp = triton = "A, B or C is complex, and the kernels are real"
    elif triton is None:
        from fastmem.kernels import selective_scan as kernels

        triton = kernels.refuses(call.A.dtype, call.A.shape[1])
    return {"triton": triton, "cpp": cpp, "reference": None}


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of `selective_scan`; the state given is left as it is, and gradients flow.

    Args:
        state: (B, D, N), float32 (float64 with float64).
        u, delta, z: (B, D).
        A: (D, N).
        B, C: (B, N) or (B, G, N).
        D, delta_bias: (D,) or None.
        delta_softplus: as in `selective_scan`.
        backend: "auto", "reference", "cpp" or "triton".

    Returns:
        y (B, D) in the dtype of u, new state (B, D, N).

    Raises:
        TypeError, ValueError: as in `selective_scan`.
    """
    call = _validated_step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    explanation = _dispatch.choose("selective_scan_step", backend, _refusals(call))
    u, delta, A, B, C, D, z, bias, softplus, state_, _, _ = call
    if explanation.chosen != "reference" and untracked(u, delta, A, B, C, D, z, bias, state_):
        assert state_ is not None
        new = state_.clone(memory_format=torch.contiguous_format)
        return _step_in_place(new, call), new
    u, delta, B, C = (x[:, None] for x in (u, delta, B, C))
    z = None if z is None else z[:, None]
    call = _Call(u, delta, A, B, C, D, z, bias, softplus, state_, None, None)
    y, new = definition.scan(*call) if explanation.chosen == "reference" else _apply(call, True)
    return y[:, 0], new


def selective_scan_step_(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`selective_scan_step` that writes the new state into `state` and returns y alone: the step of decoding.

    It is not differentiable: where a gradient is being recorded it raises RuntimeError.

    Args:
        state: (B, D, N), float32 (float64 with float64); changed. It must not share memory with another argument.
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend: as in `selective_scan_step`.

    Returns:
        y (B, D) in the dtype of u.

    Raises:
        RuntimeError: if a gradient is being recorded.
        TypeError, ValueError: as in `selective_scan`; a state of another type cannot be changed in place.
    """
    inputs = u, delta, A, B, C, D, z, delta_bias
    if backend == "auto" and dense(u) and type(delta_softplus) is bool and readable(state, *inputs):
        y = step_directly(state, *inputs, delta_softplus)
        if y is not None:
            changed(state)
            return y
    call = _validated_step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if call.initial_state is not state or state.is_complex() != call.A.is_complex():
        raise TypeError(f"state: expected {call.A.dtype}, which is changed in place, got {state.dtype}")
    if recorded(state, u, delta, A, B, C, D, z, delta_bias):
        raise RuntimeError(
            "selective_scan_step_: gradients do not flow through a state changed in place; "
            "use selective_scan_step, or torch.no_grad()"
        )
    explanation = _dispatch.choose("selective_scan_step", backend, _refusals(call))
    if explanation.chosen == "reference" or not _writable(state):
        y, new = selective_scan_step(
            state, u, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus, backend=explanation.chosen
        )
        state.copy_(new)
        return y
    y = _step_in_place(state, call)
    changed(state)
    return y


def _writable(state: Tensor) -> bool:
    """Whether a kernel can write the state where it is. Compiled graphs see no tensors with a negative bit."""
    return state.is_contiguous() and (torch.compiler.is_compiling() or not state.is_neg())


def _step_in_place(state: Tensor, call: _Call) -> Tensor:
    u, delta, A, B, C, D, z, bias, softplus = call[:9]
    return torch.ops.fastmem.selective_scan_step_(state, u, delta, A, B, C, D, z, bias, softplus)


@_dispatch.explainer("selective_scan_step")
def _explain_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    backend: str = "auto",
) -> Explanation:
    call = _validated_step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return _dispatch.choose("selective_scan_step", backend, _refusals(call))


@_dispatch.explainer("selective_scan_step_")
def _explain_step_in_place(*args: Any, **kwargs: Any) -> Explanation:
    return replace(_explain_step(*args, **kwargs), op="selective_scan_step_")


# ---------------------------------------------------------------------------------------------------------- validation

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _validated(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
) -> _Call:
    _check_input(u, ("B", "L", "D"))
    rows, L, width = u.shape
    delta = _check("delta", delta, u, (rows, L, width))
    A, N = _check_A(A, u)
    B, C = _check_maps(B, C, u, A, (rows, L))
    D = None if D is None else _check("D", D, u, (width,), A)
    z = None if z is None else _check("z", z, u, (rows, L, width))
    delta_bias = None if delta_bias is None else _check("delta_bias", delta_bias, u, (width,), A)
    if reset is not None:
        check_reset(reset, rows, L, u.device)
    count = rows
    if cu_seqlens is not None:
        cu_seqlens = check_cu_seqlens(cu_seqlens, rows, L, u.device)
        count = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        initial_state = _check("initial_state", initial_state, u, (count, width, N), A)
    _check_flag(delta_softplus)
    return _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset, cu_seqlens)


def _validated_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> _Call:
    _check_input(u, ("B", "D"))
    rows, width = u.shape
    delta = _check("delta", delta, u, (rows, width))
    A, N = _check_A(A, u)
    B, C = _check_maps(B, C, u, A, (rows,))
    D = None if D is None else _check("D", D, u, (width,), A)
    z = None if z is None else _check("z", z, u, (rows, width))
    delta_bias = None if delta_bias is None else _check("delta_bias", delta_bias, u, (width,), A)
    state = _check("state", state, u, (rows, width, N), A)
    _check_flag(delta_softplus)
    return _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, None, None)


def _check_flag(delta_softplus: object) -> None:
    if not isinstance(delta_softplus, bool):
        raise TypeError(f"delta_softplus: expected a bool, got {type(delta_softplus).__name__}")


def _check_input(u: object, shape: tuple[str, ...]) -> None:
    if not isinstance(u, Tensor):
        raise TypeError(f"u: expected a tensor, got {type(u).__name__}")
    if u.layout != torch.strided:
        raise TypeError(f"u: expected a dense tensor, got {u.layout}")
    if u.dtype not in DTYPES:
        raise TypeError(f"u: expected float32, bfloat16, float16 or float64, got {u.dtype}")
    if u.ndim != len(shape):
        raise ValueError(f"u: expected ({', '.join(shape)}), got {tuple(u.shape)}")


def _check(name: str, x: object, u: Tensor, shape: tuple[int, ...], kept: Tensor | None = None) -> Tensor:
    """x, if it goes with u and has this shape; in the dtype of `kept` where that is given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.shape != shape:
        expected = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
        raise ValueError(f"{name}: expected {expected} to match u {tuple(u.shape)}, got {tuple(x.shape)}")
    _check_kind(name, x, u, complex_too=kept is not None and kept.is_complex())
    return x if kept is None or (x.is_complex() and kept.is_complex()) else x.to(definition.compute_dtype(u.dtype))


def _check_kind(name: str, x: Tensor, u: Tensor, complex_too: bool) -> None:
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {x.layout}")
    if not (x.dtype in DTYPES or (complex_too and x.is_complex())):
        raise TypeError(f"{name}: expected a float dtype, got {x.dtype}")
    if (x.dtype in (torch.float64, torch.complex128)) != (u.dtype == torch.float64):
        expected = "torch.float64" if u.dtype == torch.float64 else "float32, bfloat16 or float16"
        raise TypeError(
            f"{name}: expected {expected} to go with u in {u.dtype}, got {x.dtype}: float64 goes with float64 only"
        )
    if x.device != u.device:
        raise ValueError(f"{name}: expected the device of u, {u.device}, got {x.device}")


def _check_A(A: object, u: Tensor) -> tuple[Tensor, int]:
    if not isinstance(A, Tensor):
        raise TypeError(f"A: expected a tensor, got {type(A).__name__}")
    if A.ndim != 2 or A.shape[0] != u.shape[-1] or A.shape[1] < 1:
        time_last = u.ndim == 3 and A.ndim == 2 and A.shape[0] == u.shape[1]
        hint = "; u looks like (B, D, L), expected (B, L, D)" if time_last else ""
        raise ValueError(f"A: expected (D, N) with D = {u.shape[-1]} and N at least 1, got {tuple(A.shape)}{hint}")
    _check_kind("A", A, u, complex_too=True)
    return (A if A.is_complex() else A.to(definition.compute_dtype(u.dtype))), A.shape[1]


def _check_maps(B: object, C: object, u: Tensor, A: Tensor, lead: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """B and C with their axis of groups."""
    maps, width, N = [], u.shape[-1], A.shape[1]
    for name, x in (("B", B), ("C", C)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        k = len(lead)
        grouped = x.unsqueeze(k) if x.ndim == k + 1 else x
        G = grouped.shape[k] if grouped.ndim == k + 2 else 0
        if grouped.ndim != k + 2 or grouped.shape[:k] != lead or grouped.shape[-1] != N or not _divides(G, width):
            sizes = ", ".join(map(str, lead))
            raise ValueError(
                f"{name}: expected ({sizes}, {N}) or ({sizes}, G, {N}) with a G that divides D = {width}, "
                f"got {tuple(x.shape)}"
            )
        _check_kind(name, x, u, complex_too=A.is_complex())
        maps.append(grouped)
    if maps[0].shape != maps[1].shape:
        raise ValueError(f"C: expected the groups of B {tuple(maps[0].shape)}, got {tuple(maps[1].shape)}")
    return maps[0], maps[1]


def _divides(G: int, width: int) -> bool:
    return G >= 1 and width % G == 0

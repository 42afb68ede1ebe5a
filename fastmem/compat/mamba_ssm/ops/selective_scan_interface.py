"""selective_scan_fn and mamba_inner_fn with mamba-ssm's signatures and (B, D, L) layout.

Results are views of what the ops give in (B, L, D), so channels lie next to each other in memory. The `_ref` functions
are the same calls made of plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmem.compat.mamba_ssm import _maps
from fastmem.ops.causal_conv1d import causal_conv1d
from fastmem.ops.selective_scan import selective_scan


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan of `fastmem.selective_scan`.

    Args:
        u, delta, z: (B, D, L).
        A: (D, N), real or complex.
        B, C: (D, N) for a map that no step changes, (B, N, L), or (B, G, N, L) in groups of channels; with a complex A
            the last axis is 2 L long, real and imaginary part in turn.
        D, delta_bias: (D,).
        delta_softplus: whether delta goes through softplus, after its bias.
        return_last_state: also return the state after the last step.

    Returns:
        (B, D, L) in the dtype of u; with return_last_state also (B, D, N), float32 or complex64, with its gradient.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or shape.
    """
    y, state = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (y, state) if return_last_state else y


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_fn` by the definition, in plain PyTorch."""
    y, state = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend="reference")
    return (y, state) if return_last_state else y


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    *,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Output (B, D, L) and last state (B, D, N); reset (B, L) as in `fastmem.selective_scan`."""
    for name, x in (("u", u), ("delta", delta), ("z", z)):
        if x is not None and (x.ndim != 3 or x.shape != u.shape):
            expected = "(B, D, L)" if name == "u" else f"{tuple(u.shape)} like u"
            raise ValueError(f"{name}: expected {expected}, got {tuple(x.shape)}")
    batch, _, length = u.shape
    A, D, delta_bias = _maps.as_wide_as(u, A, D, delta_bias)  # type: ignore[assignment]
    maps = (_maps.input_map(name, x, A, batch, length) for name, x in (("B", B), ("C", C)))
    y, state = selective_scan(
        _by_step(u),
        _by_step(delta),
        A,
        *_maps.same_groups(*maps),
        D,
        None if z is None else _by_step(z),
        delta_bias,
        delta_softplus=bool(delta_softplus),
        return_final_state=True,
        reset=reset,
        backend=backend,
    )
    return y.transpose(1, 2), state


def _by_step(x: Tensor) -> Tensor:
    """(B, L, D) from (B, D, L)."""
    if x.stride(1) == 1 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.transpose(1, 2)
    # The op needs channels next to each other. PyTorch transposes in blocks, 4 times as fast, where there are two axes.
    if len(x) == 1:
        return x.squeeze(0).t().contiguous().unsqueeze(0)
    return torch.stack([row.t().contiguous() for row in x]) if len(x) else x.transpose(1, 2)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba block between its input projection and its output.

    Args:
        xz: (B, 2 D, L) what in_proj gave: input of the convolution, then gate.
        conv1d_weight: (D, 1, W).
        conv1d_bias: (D,) or None.
        x_proj_weight: (R + what of B and C varies, D): rank R of delta, then N rows for B and for C where they are
            None, 2 N with a complex A.
        delta_proj_weight: (D, R).
        out_proj_weight: (d_model, D).
        out_proj_bias: (d_model,) or None.
        A: (D, N), real or complex.
        B, C: (D, N), or None: projected from the input.
        D, delta_bias: (D,) or None.
        B_proj_bias, C_proj_bias: (N,) added to what was projected, (2 N,) with a complex A.
        delta_softplus: whether delta goes through softplus, after its bias.
        checkpoint_lvl: taken and not used; the scan's backward recomputes its states by itself.
        b_rms_weight, c_rms_weight: (N,) weights of an RMS norm of B and of C, or None.
        dt_rms_weight: (D,) the same for delta, after its projection and before its bias.
        b_c_dt_rms_eps: epsilon of these norms.

    Returns:
        (B, L, d_model).

    Raises:
        TypeError, ValueError: an argument is of the wrong type or shape.
    """
    values = dict(locals())
    del values["checkpoint_lvl"]
    return _inner(**values)


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` by the definition, in plain PyTorch."""
    return _inner(**locals(), backend="reference")


def _inner(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    delta_softplus: bool,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    if xz.ndim != 3 or xz.shape[1] != 2 * A.shape[0]:
        raise ValueError(f"xz: expected (B, {2 * A.shape[0]}, L) to match A {tuple(A.shape)}, got {tuple(xz.shape)}")
    batch, length = xz.shape[0], xz.shape[2]
    x, z = (part.transpose(1, 2) for part in xz.chunk(2, dim=1))
    u = causal_conv1d(x, conv1d_weight[:, 0], conv1d_bias, activation="silu", backend=backend)

    rank, size = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    projected = F.linear(u, x_proj_weight)
    delta = F.linear(projected[..., :rank], delta_proj_weight)
    middle, last = projected[..., rank : rank + size], projected[..., -size:]
    if dt_rms_weight is not None:
        delta = _rms_norm(delta, dt_rms_weight, b_c_dt_rms_eps)

    def varying(name: str, part: Tensor, bias: Tensor | None, norm: Tensor | None) -> Tensor:
        if bias is not None:
            part = part + bias.to(part.dtype)
        if norm is not None:
            if A.is_complex():
                raise ValueError(f"{name}_rms_weight: a norm goes with a real A only")
            part = _rms_norm(part, norm, b_c_dt_rms_eps)
        return (_maps.complex_of(part) if A.is_complex() else part).unsqueeze(2)

    def fixed(name: str, x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            raise ValueError(f"{name.lower()}_rms_weight: a norm goes with a projected {name} only")
        if x.shape != A.shape:
            raise ValueError(f"{name}: expected {tuple(A.shape)} like A, got {tuple(x.shape)}")
        return _maps.constant_map(x, batch, length)

    B = fixed("B", B, b_rms_weight) if B is not None else varying("b", middle, B_proj_bias, b_rms_weight)
    C = fixed("C", C, c_rms_weight) if C is not None else varying("c", last, C_proj_bias, c_rms_weight)
    B, C = _maps.same_groups(B, C)
    y = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=bool(delta_softplus), backend=backend)
    return F.linear(y, out_proj_weight, out_proj_bias)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


__all__ = ["mamba_inner_fn", "mamba_inner_ref", "selective_scan_fn", "selective_scan_ref"]

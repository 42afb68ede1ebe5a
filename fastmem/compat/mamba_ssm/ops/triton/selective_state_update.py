"""One step of the scan for decoding, with mamba-ssm's signature; no Triton is needed for it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmem.compat.mamba_ssm._maps import as_wide_as
from fastmem.ops._direct import untracked
from fastmem.ops.selective_scan import selective_scan_step, selective_scan_step_


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of `fastmem.selective_scan`, the new state written into `state`.

    Where a gradient is being recorded it flows, through the state as well.

    Args:
        state: (B, D, N), or (B, H, D, N) with heads, of any float dtype, complex with a complex A; changed.
        x, dt, z: (B, D) or (B, H, D).
        A: (D, N) or (H, D, N), real or complex.
        B, C: (B, N), or (B, G, N) where head h reads group h // (H / G).
        D, dt_bias: (D,) or (H, D).
        dt_softplus: whether dt goes through softplus, after its bias.
        state_batch_indices: (B,) int: row b of the other arguments goes with state[index b]; `state` may have any
            number of rows then. A negative index marks a row of padding: its output is 0.

    Returns:
        (B, D) or (B, H, D), in the dtype of x.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or shape.
    """
    return _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, "auto")


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`selective_state_update` by the definition, in plain PyTorch."""
    return _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, None, "reference")


def _update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    indices: Tensor | None,
    backend: str,
) -> Tensor:
    if state.ndim not in (3, 4):
        raise ValueError(f"state: expected (B, D, N) or (B, H, D, N), got {tuple(state.shape)}")
    if x.shape[1:] != state.shape[1:-1] or (indices is None and len(x) != len(state)):
        expected = ", ".join(map(str, ("B" if indices is not None else len(state), *state.shape[1:-1])))
        raise ValueError(f"x: expected ({expected}) to match state {tuple(state.shape)}, got {tuple(x.shape)}")
    if A.shape != state.shape[1:]:
        raise ValueError(
            f"A: expected {tuple(state.shape[1:])} to match state {tuple(state.shape)}, got {tuple(A.shape)}"
        )

    A, D, dt_bias = as_wide_as(x, A, D, dt_bias)  # type: ignore[assignment]

    def channels(v: Tensor | None, first: int) -> Tensor | None:
        """Heads and their channels as one axis."""
        return v.flatten(first, first + 1) if v is not None and state.ndim == 4 else v

    rest = (channels(x, 1), channels(dt, 1), channels(A, 0), B, C)
    rest += (channels(D, 0), channels(z, 1), channels(dt_bias, 0))  # type: ignore[assignment]
    options = {"delta_softplus": bool(dt_softplus), "backend": backend}
    kept = torch.float64 if x.dtype == torch.float64 else torch.float32
    if A.is_complex():
        kept = kept.to_complex()
    if state.is_complex() != A.is_complex():
        raise TypeError(f"state: expected {kept}, as A is {A.dtype}, got {state.dtype}")

    recorded = not untracked(state, *rest)
    if indices is None and not recorded and state.dtype == kept and state.is_contiguous():
        y = selective_scan_step_(state.flatten(1, -2), *rest, **options)  # type: ignore[arg-type]
        return y.view(x.shape)

    # What a backward pass needs of `state` must be a copy: `state` is written to.
    rows = (state.clone() if recorded else state) if indices is None else state[_checked(indices, x).clamp(min=0)]
    y, new = selective_scan_step(rows.to(kept).flatten(1, -2), *rest, **options)  # type: ignore[arg-type]
    y, new = y.view(x.shape), new.to(state.dtype).view(rows.shape)
    if indices is None:
        state.copy_(new)
        return y
    live = indices >= 0
    state[indices[live].long()] = new[live]
    return y.masked_fill(~live.view(-1, *(1,) * (y.ndim - 1)), 0)


def _checked(indices: Tensor, x: Tensor) -> Tensor:
    if indices.shape != (len(x),) or indices.dtype.is_floating_point or indices.dtype == torch.bool:
        raise ValueError(
            f"state_batch_indices: expected ({len(x)},) int to match x {tuple(x.shape)}, "
            f"got {tuple(indices.shape)} {indices.dtype}"
        )
    return indices.long()


__all__ = ["selective_state_update", "selective_state_update_ref"]

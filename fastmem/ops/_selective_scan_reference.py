"""selective_scan and its step in plain PyTorch: the definition, on any device and dtype, to be read first.

Shapes here: u, delta, z (B, L, D); A (D, N); B, C (B, L, G, N), channel d in group d // (D / G); D, delta_bias (D,).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmem.ops._dtypes import compute_dtype


def step(
    h: Tensor,  # (B, D, N)
    u: Tensor,  # (B, D)
    dt: Tensor,  # (B, D), after bias and softplus
    A: Tensor,
    B: Tensor,  # (B, G, N)
    C: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence: (sum over n of C h, new h)."""
    per_group = A.shape[0] // B.shape[1]
    B, C = (x.repeat_interleave(per_group, 1) for x in (B, C))
    h = torch.exp(dt[..., None] * A) * h + (dt * u)[..., None] * B
    y = (h * C).sum(-1)
    return (2 * y.real if y.is_complex() else y), h


def time_step(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """dt from delta: bias, then softplus."""
    dt = delta if delta_bias is None else delta + delta_bias
    return F.softplus(dt) if delta_softplus else dt


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
    initial_state: Tensor | None,  # (B, D, N); (n, D, N) with cu_seqlens
    reset: Tensor | None,  # (B, L)
    cu_seqlens: Tensor | None,  # (n + 1,)
) -> tuple[Tensor, Tensor]:
    """(y in the dtype of u, final state in the dtype that the state is kept in)."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        parts = []
        for i, (begin, end) in enumerate(pairwise(ends)):
            u_, delta_, B_, C_, z_, reset_ = (
                None if x is None else x[:, begin:end] for x in (u, delta, B, C, z, reset)
            )
            state = None if initial_state is None else initial_state[i : i + 1]
            parts.append(scan(u_, delta_, A, B_, C_, D, z_, delta_bias, delta_softplus, state, reset_, None))  # type: ignore[arg-type]
        if not parts:
            return u[:, :0], A.new_zeros(0, *A.shape) if initial_state is None else initial_state.clone()
        return torch.cat([y for y, _ in parts], 1), torch.cat([h for _, h in parts])

    dtype, kept = u.dtype, compute_dtype(u.dtype)
    h = A.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.clone()
    u, delta = u.to(kept), delta.to(kept)
    B, C = (x if x.is_complex() else x.to(kept) for x in (B, C))
    dt = time_step(delta, delta_bias, delta_softplus)
    ys = []
    for t in range(u.shape[1]):
        if reset is not None:
            h = h.masked_fill(reset[:, t, None, None], 0)
        y, h = step(h, u[:, t], dt[:, t], A, B[:, t], C[:, t])
        ys.append(y)
    y = torch.stack(ys, 1) if ys else u  # of no steps
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z.to(kept))
    return y.to(dtype), h

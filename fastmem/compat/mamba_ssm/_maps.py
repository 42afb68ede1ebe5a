"""mamba-ssm's forms of B and C in the one form of `fastmem.selective_scan`: (B, L, G, N)."""

from __future__ import annotations

import torch
from torch import Tensor


def input_map(name: str, x: Tensor, A: Tensor, batch: int, length: int) -> Tensor:
    """(batch, L, G, N) from (D, N), (batch, N, L) or (batch, G, N, L); with a complex A, pairs of reals along L.

    Raises:
        ValueError: if the shape is none of these.
    """
    D, N = A.shape
    if x.ndim == 2 and x.shape == (D, N):
        return constant_map(x, batch, length)
    pairs = A.is_complex() and not x.is_complex()
    grouped = x.unsqueeze(1) if x.ndim == 3 else x
    last = 2 * length if pairs else length
    if grouped.ndim != 4 or (grouped.shape[0], *grouped.shape[2:]) != (batch, N, last):
        raise ValueError(
            f"{name}: expected ({D}, {N}), ({batch}, {N}, {last}) or ({batch}, G, {N}, {last}), got {tuple(x.shape)}"
        )
    return (complex_of(grouped) if pairs else grouped).permute(0, 3, 1, 2)


def constant_map(x: Tensor, batch: int, length: int) -> Tensor:
    """(batch, L, D, N) from a map (D, N) that no step changes: every channel is a group of its own."""
    return x.expand(batch, length, *x.shape)


def complex_of(x: Tensor) -> Tensor:
    """Complex numbers from real and imaginary parts that follow each other along the last axis."""
    return torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())


def as_wide_as(u: Tensor, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """Parameters in float64 where u is: transformers has them in float32 in a model of any type."""
    if u.dtype != torch.float64:
        return parameters
    return tuple(p if p is None or p.is_complex() else p.double() for p in parameters)


def same_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Both with as many groups as the one that has more."""
    groups = max(B.shape[2], C.shape[2])
    return _regroup(B, groups), _regroup(C, groups)


def _regroup(x: Tensor, groups: int) -> Tensor:
    if x.shape[2] == groups:
        return x
    if groups % x.shape[2]:
        raise ValueError(
            f"B and C: expected numbers of groups of which one divides the other, got {x.shape[2]}, {groups}"
        )
    return x.unsqueeze(3).expand(-1, -1, -1, groups // x.shape[2], -1).flatten(2, 3)

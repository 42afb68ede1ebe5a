"""causal_conv1d in PyTorch: the definition, any device and float dtype, differentiable at any order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmem.ops._dtypes import compute_dtype


def reference(
    x: Tensor,  # (B, L, D)
    weight: Tensor,  # (D, W)
    bias: Tensor | None,  # (D,)
    initial_state: Tensor | None,  # (B * n, W - 1, D), n sequences in a row
    reset: Tensor | None,  # (B, L)
    cu_seqlens: Tensor | None,  # (n + 1,)
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, L, D) and the final state (B * n, W - 1, D).

    Positions count along the row; those of the initial state lie just before the first step of their sequence.
    """
    (B, L, D), W = x.shape, weight.shape[1]
    steps = torch.arange(L, device=x.device)
    edges = torch.tensor([0, L], device=x.device) if cu_seqlens is None else cu_seqlens.long()
    start, stop, n = edges[:-1], edges[1:], edges.shape[0] - 1
    sequence = torch.searchsorted(edges, steps, right=True) - 1  # (L,), of each step

    # The oldest position that each step sees, (B, L): the newest reset of its sequence, else the initial state.
    oldest = (start[sequence] - (W - 1)).expand(B, L)
    if reset is not None:
        newest = torch.where(reset, steps, -1).cummax(1).values
        oldest = torch.where(newest >= start[sequence], newest, oldest)

    if initial_state is None:
        initial_state = x.new_zeros(B * n, W - 1, D)
    rows = torch.cat([x, initial_state.reshape(B, n * (W - 1), D)], 1)

    def at(position: Tensor, sequence: Tensor) -> Tensor:
        """Where in `rows` the position of a sequence lies."""
        before = L + (sequence + 1) * (W - 1) + position - start[sequence]
        return torch.where(position >= start[sequence], position, before)

    compute = compute_dtype(x.dtype)
    y = torch.zeros_like(x, dtype=compute)
    for back in range(W):
        seen = (steps - back >= oldest)[..., None]
        tap = torch.where(seen, rows[:, at(steps - back, sequence)].to(compute), 0.0)
        y = y + weight[:, W - 1 - back].to(compute) * tap
    if bias is not None:
        y = y + bias.to(compute)

    # The last W - 1 positions of each sequence, (n, W - 1), as its last step sees them.
    last = stop[:, None] - (W - 1) + torch.arange(W - 1, device=x.device)
    oldest_last = torch.cat([oldest, oldest.new_zeros(B, 1)], 1)[:, (stop - 1).clamp(min=-1)]
    oldest_last = torch.where(stop > start, oldest_last, start - (W - 1))
    place = at(last, torch.arange(n, device=x.device)[:, None].expand(n, W - 1))
    final = rows[:, place.flatten()].unflatten(1, (n, W - 1))
    final = torch.where((last >= oldest_last[..., None])[..., None], final, 0.0)
    return (F.silu(y) if silu else y).to(x.dtype), final.to(x.dtype).flatten(0, 1)

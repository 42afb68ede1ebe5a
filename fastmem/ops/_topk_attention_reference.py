"""The definition of topk_attention in PyTorch, for any device and dtype. Sizes: B, H, Q, S, E, F as in topk_attention.

`attend` takes the chosen slots as given and is differentiable any number of times, so it also serves the second
derivative of the kernels. k, v, scale, bias and mask may have 1 in place of B or H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmem.ops._dtypes import compute_dtype

COSINE_EPS = 1e-8  # csrc/attention.h has the same


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last dimension; where |x| <= COSINE_EPS, zero with zero gradient."""
    squared = x.square().sum(-1, keepdim=True)
    tiny = squared <= COSINE_EPS**2
    return x * squared.masked_fill(tiny, 1).rsqrt().masked_fill(tiny, 0)


def usable_slots(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """(B, H, S) bool, or None if every slot is usable: mask true and bias above -inf."""
    if bias is None:
        return mask
    strong = bias != float("-inf")
    return strong if mask is None else strong & mask


def scores_of(q: Tensor, k: Tensor, scale: Tensor | None, bias: Tensor | None, factor: float, cosine: bool) -> Tensor:
    """(B, H, Q, S) scores of every slot, before any is ruled out."""
    q, k = (x.to(compute_dtype(q.dtype)) for x in (q, k))
    if cosine:
        q, k = unit(q), unit(k)
    q = q * factor if scale is None else q * (factor * scale[:, :, None, None])
    scores = q @ k.transpose(-1, -2)
    return scores if bias is None else scores + bias[:, :, None, :]


@torch.no_grad()
def select(
    q: Tensor,
    k: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    factor: float,
    cosine: bool,
) -> Tensor:
    """(B, H, Q, top_k) int64: the best slots, best first, ties to the lowest, NaN above all; -1 where none is left."""
    scores = scores_of(q, k, scale, bias, factor, cosine)
    usable = usable_slots(bias, mask)
    if usable is not None:
        scores = scores.masked_fill(~usable[:, :, None, :], float("-inf"))
    scores, slots = scores.sort(dim=-1, descending=True, stable=True)
    chosen = slots[..., :top_k].masked_fill(scores[..., :top_k] == float("-inf"), -1)
    return torch.nn.functional.pad(chosen, (0, top_k - chosen.shape[-1]), value=-1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    indices: Tensor,
    factor: float,
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    """Attention over chosen slots: out (B, H, Q, F) and weights (B, H, Q, top_k).

    indices: (B, H, Q, top_k) int64, -1 for none.
    """
    B, H = q.shape[:2]
    S, compute = k.shape[2], compute_dtype(q.dtype)
    chosen = indices >= 0
    if S == 0:  # nothing to gather from: zeros that autograd still knows
        return attend_all(q, k, v, scale, bias, None, factor, cosine), torch.zeros_like(indices, dtype=compute)
    slot = indices.clamp_min(0)
    batch = torch.arange(B, device=q.device)[:, None, None, None]
    head = torch.arange(H, device=q.device)[None, :, None, None]

    def rows(x: Tensor) -> Tensor:
        # Converted first, so that its gradient, a sum over queries, is not taken in a half type.
        taken = x.to(compute)[0 if x.shape[0] == 1 else batch, 0 if x.shape[1] == 1 else head, slot]
        return taken.masked_fill(~(chosen if x.ndim == 3 else chosen.unsqueeze(-1)), 0)

    keys, values = rows(k), rows(v)  # (B, H, Q, top_k, E), (B, H, Q, top_k, F)
    queries = q.to(compute)
    if cosine:
        queries, keys = unit(queries), unit(keys)
    queries = queries * factor if scale is None else queries * (factor * scale[:, :, None, None])
    scores = (queries.unsqueeze(-2) * keys).sum(-1)
    if bias is not None:
        scores = scores + rows(bias)
    weights = softmax(scores, chosen)
    return (weights.unsqueeze(-1) * values).sum(-2).to(q.dtype), weights


def softmax(scores: Tensor, usable: Tensor) -> Tensor:
    """Softmax along the last dimension over the usable entries; zeros where there is none."""
    scores = scores.masked_fill(~usable, float("-inf"))
    any_usable = usable.any(-1, keepdim=True)
    return scores.masked_fill(~any_usable, 0).softmax(-1).masked_fill(~usable, 0)


def attend_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    factor: float,
    cosine: bool,
) -> Tensor:
    """Plain attention over every usable slot: out (B, H, Q, F)."""
    usable = usable_slots(bias, mask)
    if usable is not None:  # whatever an unusable slot holds, NaN included, must not be multiplied by 0
        k, v = (x.masked_fill(~usable.unsqueeze(-1), 0) for x in (k, v))
        bias = None if bias is None else bias.masked_fill(~usable, 0)
    scores = scores_of(q, k, scale, bias, factor, cosine)
    usable = torch.ones((), dtype=torch.bool, device=q.device) if usable is None else usable[:, :, None, :]
    usable = usable.expand(scores.shape) & (scores != float("-inf"))
    return (softmax(scores, usable) @ v.to(scores.dtype)).to(q.dtype)

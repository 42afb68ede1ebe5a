"""Attention over a bank of slots, of which each query sees its best top_k. Derivation: docs/ops/topk_attention.md."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastmem.ops import _dispatch
from fastmem.ops import _topk_attention_reference as definition
from fastmem.ops._dense_attention import DenseAttention, SdpaAttention
from fastmem.ops._dense_attention import forward_cpp as dense_forward_cpp
from fastmem.ops._direct import apply, unintercepted, untracked
from fastmem.ops._dispatch import Explanation
from fastmem.ops._topk_attention_autograd import TopkAttention

SIMILARITIES = ("cosine", "dot")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Call(NamedTuple):
    """A validated call. Shared dimensions are 1: scale (1, H or 1), bias and mask (B or 1, H or 1, S)."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    top_k: int | None
    factor: float
    cosine: bool


@overload
def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    top_k: int | None = None,
    scale: float | Tensor | None = None,
    similarity: str = "cosine",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    return_indices: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    top_k: int | None = None,
    scale: float | Tensor | None = None,
    similarity: str = "cosine",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    return_indices: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]: ...


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    top_k: int | None = None,
    scale: float | Tensor | None = None,
    similarity: str = "cosine",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    return_indices: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention of each query over its `top_k` best slots of a bank.

    score[s] = scale * similarity(q, k[s]) + bias[s]; the best top_k usable slots are chosen (ties go to the lowest
    slot), and out is the sum of their values weighted by the softmax of their scores. A query with no usable slot gets
    zeros. Gradients flow to q, k, v, scale, bias and through `weights`; which slots are chosen is a constant to them.

    Args:
        q: (B, H, Q, E) queries; float32, bfloat16, float16 (computed in float32) or float64.
        k: (B, H, S, E) keys, the same dtype. B and H may each be 1, also for v: the bank is then shared, read in
            place, and its gradient is the sum over those who share it.
        v: (B, H, S, F) values.
        top_k: how many slots each query sees, at least 1. None: all of them, that is plain attention.
        scale: what the similarity is multiplied by: a number, or a tensor () or (H,), which gets a gradient. Default:
            1 / sqrt(E) for "dot", sqrt(E) for "cosine"; either gives random keys scores of variance about 1.
        similarity: "cosine" or "dot". The cosine with a vector of norm 1e-8 or less is 0, and so is its gradient;
            norms above 1e19 overflow in float32 as they do in torch.nn.functional.normalize.
        bias: (B, S) or (B, H, S), B and H may be 1: added to the scores, such as a log strength. -inf rules a slot out.
        mask: bool, shapes as for bias; true = usable. Nothing is read from a slot that is not.
        return_indices: also return which slots were chosen, and their weights. Needs top_k.
        backend: "auto", "reference", "cpp" or "triton"; with top_k=None also "sdpa", torch's own kernels.

    Returns:
        out (B, H, Q, F); with return_indices (out, indices, weights): indices (B, H, Q, top_k) int64, best first, -1
        where fewer than top_k slots are usable (top_k may exceed S); weights (B, H, Q, top_k), 0 there.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device, top_k, similarity or backend is wrong, or the backend cannot serve the call.

    Source: content-based addressing (Graves et al., Neural Turing Machines, arXiv:1410.5401) restricted to the best
    matches (Rae et al., sparse reads, arXiv:1610.09027).
    """
    call = _validated(q, k, v, top_k, scale, similarity, bias, mask, return_indices)
    refusals = _refusals(call)
    chosen = _dispatch.pick("topk_attention", backend, refusals)
    q, k, v, scale, bias, mask, top_k, factor, cosine = call
    if chosen == "reference" and backend == "auto" and top_k is not None:
        _dispatch.warn_slow("topk_attention", refusals["cpp" if q.is_cpu else "triton"] or "")
    if top_k is None:
        if chosen == "reference":
            return definition.attend_all(q, k, v, scale, bias, mask, factor, cosine)
        if chosen == "sdpa":
            return apply(SdpaAttention, q, k, v, scale, bias, mask, factor, cosine)
        if untracked(q, k, v, scale, bias):
            forward = dense_forward_cpp if unintercepted(q, k, v) else torch.ops.fastmem.dense_attention_forward
            return forward(q, k, v, scale, bias, mask, factor, cosine)[0]
        return apply(DenseAttention, q, k, v, scale, bias, mask, factor, cosine)[0]
    if chosen == "reference":
        indices = definition.select(q, k, scale, bias, mask, top_k, factor, cosine)
        out, weights = definition.attend(q, k, v, scale, bias, indices, factor, cosine)
    elif untracked(q, k, v, scale, bias):
        out, indices, weights = torch.ops.fastmem.topk_attention_forward(*call)
    else:
        out, indices, weights = apply(TopkAttention, *call)
    return (out, indices, weights.to(q.dtype)) if return_indices else out


@_dispatch.explainer("topk_attention")
def _explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    top_k: int | None = None,
    scale: float | Tensor | None = None,
    similarity: str = "cosine",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    return_indices: bool = False,
    backend: str = "auto",
) -> Explanation:
    call = _validated(q, k, v, top_k, scale, similarity, bias, mask, return_indices)
    return _dispatch.choose("topk_attention", backend, _refusals(call))


def _refusals(call: _Call) -> dict[str, str | None]:
    cpp = _dispatch.no_cpp(call.q)  # all are on one device
    if call.top_k is None:
        no_triton = "plain attention (top_k=None) has no Triton kernel here: torch's own serves it"
        return {"triton": no_triton, "cpp": cpp, "sdpa": None, "reference": None}
    triton = _dispatch.no_triton(call.q)
    if triton is None:
        from fastmem.kernels import topk_attention as kernels

        triton = kernels.refuses(call.top_k, call.q.dtype, call.k.shape[2])
    return {"triton": triton, "cpp": cpp, "reference": None}


# ---------------------------------------------------------------------------------------------------------- validation


def _validated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    top_k: int | None,
    scale: float | Tensor | None,
    similarity: str,
    bias: Tensor | None,
    mask: Tensor | None,
    return_indices: bool,
) -> _Call:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if q.dtype not in DTYPES:
        raise TypeError(f"q: expected float32, bfloat16, float16 or float64, got {q.dtype}")
    if q.ndim != 4:
        raise ValueError(f"q: expected (B, H, Q, E), got {tuple(q.shape)}")
    S = k.shape[2] if k.ndim == 4 else -1
    _check_bank("k", k, q, "S", S, "E", q.shape[3])
    _check_bank("v", v, q, "S", S, "F", v.shape[3] if v.ndim == 4 else -1)
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity: expected one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise TypeError(f"top_k: expected an int or None, got {type(top_k).__name__}")
        if top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {top_k}")
        if top_k >= 2**31:
            raise ValueError(f"top_k: expected less than 2^31, got {top_k}")
    elif return_indices:
        raise ValueError("return_indices: expected top_k to be given with it, got top_k=None (every slot takes part)")
    for name, given in (("bias", bias), ("mask", mask)):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a tensor or None, got {type(given).__name__}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool, true = usable, got {mask.dtype}")
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(f"bias: expected a float dtype, got {bias.dtype}")
        bias = bias.to(definition.compute_dtype(q.dtype))
    cosine = similarity == "cosine"
    factor, scale = _scale_of(scale, q, cosine)
    return _Call(q, k, v, scale, _per_slot("bias", bias, q, S), _per_slot("mask", mask, q, S), top_k, factor, cosine)


def _check_bank(name: str, x: Tensor, q: Tensor, rows: str, S: int, columns: str, E: int) -> None:
    B, H = q.shape[:2]
    shape = x.shape
    if len(shape) != 4 or shape[0] not in (1, B) or shape[1] not in (1, H) or shape[2] != S or shape[3] != E:
        sizes = f"B = {B} or 1, H = {H} or 1" + (f", {rows} = {S}" if S >= 0 else "")
        sizes += f", {columns} = {E}" if E >= 0 else ""
        raise ValueError(f"{name}: expected (B, H, {rows}, {columns}) with {sizes}, got {tuple(shape)}")
    if x.dtype != q.dtype:
        raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}")
    _check_device(name, x, q)


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")


def _per_slot(name: str, x: Tensor | None, q: Tensor, S: int) -> Tensor | None:
    """(B, S) or (B, H, S) -> (B or 1, H or 1, S)."""
    if x is None:
        return None
    B, H = q.shape[:2]
    given = tuple(x.shape)
    if x.ndim == 2:
        x = x[:, None]
    if x.ndim != 3 or x.shape[0] not in (1, B) or x.shape[1] not in (1, H) or x.shape[2] != S:
        raise ValueError(f"{name}: expected (B, S) or (B, H, S) with B = {B} or 1, H = {H} or 1, S = {S}, got {given}")
    _check_device(name, x, q)
    return x


def _scale_of(scale: float | Tensor | None, q: Tensor, cosine: bool) -> tuple[float, Tensor | None]:
    """A number to multiply with, and None or a tensor (1, H or 1) likewise."""
    H, E = q.shape[1], q.shape[3]
    if scale is None:
        root = math.sqrt(max(E, 1))
        return (root if cosine else 1 / root), None
    if isinstance(scale, Tensor):
        if not scale.is_floating_point():
            raise TypeError(f"scale: expected a float dtype, got {scale.dtype}")
        if scale.shape not in ((), (H,)):
            raise ValueError(f"scale: expected a number, () or (H,) with H = {H}, got {tuple(scale.shape)}")
        _check_device("scale", scale, q)
        return 1.0, scale.to(definition.compute_dtype(q.dtype)).reshape(1, -1)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number, a tensor or None, got {type(scale).__name__}")
    try:
        return float(scale), None
    except OverflowError:
        raise ValueError("scale: expected a number that fits a float, got a larger one") from None

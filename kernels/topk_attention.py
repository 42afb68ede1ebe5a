"""Triton kernels of topk_attention. Derivation: docs/ops/topk_attention.md.

Forward: `_select` streams a split of the bank past a block of queries and keeps each query's best keys; `_attend`
merges the splits and attends. Backward: `_per_query` gives dq and the coefficients, `_per_slot` sums over the queries
that chose a slot, in their order. No atomics, so two runs give the same bits.

Score and slot are one int64 whose order is the order of selection: higher score first, NaN above all, then lower slot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastmem.kernels._device import on
from torch import Tensor

COSINE_EPS = 1e-8  # as in fastmem/ops/_topk_attention_reference.py
MAX_TOP_K = 128
_NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def _pack(score, slot):
    """Keys of scores (fp32) at slots; -inf becomes no key at all."""
    finite = tl.where(score == 0, 0.0, score)  # -0 and 0 tie
    bits = finite.to(tl.int32, bitcast=True)
    bits = tl.where(score != score, 0x7FC00000, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    key = (bits.to(tl.int64) << 32) | (0xFFFFFFFF - slot.to(tl.int64))
    return tl.where(score == float("-inf"), _NO_KEY, key)


@triton.jit
def _score_of(key):
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _slot_of(key):
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def _merge(best, more):
    """The best half of two descending rows of keys, descending."""
    return tl.bitonic_merge(tl.maximum(best, tl.flip(more, len(more.shape) - 1)), descending=True)


@triton.jit
def _inverse_norm(squared, eps: tl.constexpr):
    return tl.where(squared <= eps * eps, 0.0, tl.rsqrt(squared))


@triton.jit
def _at(bank, i, H, Q, share_b: tl.constexpr, share_h: tl.constexpr):
    """Batch, head and query of the i-th query of a bank."""
    rest = i // Q
    if share_b:
        if share_h:
            b, h = rest // H, rest % H
        else:
            b, h = rest, bank + rest * 0
    else:
        if share_h:
            b, h = bank + rest * 0, rest
        else:
            b, h = bank // H + rest * 0, bank % H + rest * 0
    return b.to(tl.int64), h.to(tl.int64), (i % Q).to(tl.int64)


_LENGTHS = ["H", "Q", "S", "per_bank", "blocks", "splits", "per_split", "top_k", "n_queries", "n_slots"]


@triton.jit(do_not_specialize=_LENGTHS)
def _select(
    p_q, p_k, p_scale, p_bias, p_mask, p_found,
    q_b, q_h, q_q, k_b, k_h, k_s, scale_b, scale_h, bias_b, bias_h, bias_s, mask_b, mask_h, mask_s,
    H, Q, S, per_bank, blocks, splits, per_split, factor,
    E: tl.constexpr, eps: tl.constexpr, cosine: tl.constexpr, share_b: tl.constexpr, share_h: tl.constexpr,
    b_q: tl.constexpr, b_s: tl.constexpr, b_e: tl.constexpr, b_k: tl.constexpr,
):  # fmt: skip
    """found (banks, per_bank, splits, b_k) int64: best keys of a block of queries among one split of the slots."""
    bank = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    split = tl.program_id(1)
    o_q = block * b_q + tl.arange(0, b_q)
    m_q = o_q < per_bank
    b, h, q = _at(bank, o_q, H, Q, share_b, share_h)
    home_b, home_h, _ = _at(bank, o_q * 0, H, Q, share_b, share_h)
    home_b, home_h = tl.max(home_b, 0), tl.max(home_h, 0)
    p_q += b * q_b + h * q_h + q * q_q
    p_k += home_b * k_b + home_h * k_h
    o_e = tl.arange(0, b_e)

    times = tl.full([b_q], factor, tl.float32)
    if p_scale is not None:
        times *= tl.load(p_scale + b * scale_b + h * scale_h, mask=m_q, other=0)
    if cosine:
        squared = tl.zeros([b_q], tl.float32)
        for e in range(0, E, b_e):
            x = tl.load(p_q[:, None] + e + o_e[None, :], mask=m_q[:, None] & (e + o_e < E)[None, :], other=0)
            squared += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        times *= _inverse_norm(squared, eps)

    best = tl.full([b_q, b_k], _NO_KEY, tl.int64)
    begin = split.to(tl.int64) * per_split
    for start in range(begin, tl.minimum(begin + per_split, S), b_s):
        o_s = start + tl.arange(0, b_s).to(tl.int64)
        m_s = o_s < S
        if p_mask is not None:
            m_s &= tl.load(p_mask + home_b * mask_b + home_h * mask_h + o_s * mask_s, mask=m_s, other=0) != 0
        if p_bias is not None:
            bias = tl.load(p_bias + home_b * bias_b + home_h * bias_h + o_s * bias_s, mask=m_s, other=float("-inf"))
            m_s &= bias != float("-inf")
        products = tl.zeros([b_q, b_s], tl.float32)
        squared_k = tl.zeros([b_s], tl.float32)
        for e in range(0, E, b_e):
            m_e = e + o_e < E
            x = tl.load(p_q[:, None] + e + o_e[None, :], mask=m_q[:, None] & m_e[None, :], other=0)
            k = tl.load(p_k + o_s[:, None] * k_s + e + o_e[None, :], mask=m_s[:, None] & m_e[None, :], other=0)
            if b_q == 1:
                products += tl.sum(k.to(tl.float32) * x.to(tl.float32), 1)[None, :]
            else:
                products = tl.dot(x, tl.trans(k), products, input_precision="tf32x3")
            if cosine:
                squared_k += tl.sum(k.to(tl.float32) * k.to(tl.float32), 1)
        score = products * times[:, None]
        if cosine:
            score *= _inverse_norm(squared_k, eps)[None, :]
        if p_bias is not None:
            score += bias[None, :]
        key = tl.where(m_q[:, None] & m_s[None, :], _pack(score, o_s[None, :]), _NO_KEY)
        better = key > tl.min(best, 1)[:, None]
        if tl.max(tl.max(better.to(tl.int32), 1), 0) > 0:
            best = _merge(best, tl.topk(key, b_k))

    row = (bank.to(tl.int64) * per_bank + o_q) * splits + split
    o_k = tl.arange(0, b_k)
    tl.store(p_found + row[:, None] * b_k + o_k[None, :], best, mask=m_q[:, None])


@triton.jit(do_not_specialize=_LENGTHS)
def _attend(
    p_found, p_v, p_out, p_indices, p_weights,
    v_b, v_h, v_s,
    H, Q, per_bank, splits, top_k,
    F: tl.constexpr, share_b: tl.constexpr, share_h: tl.constexpr, b_k: tl.constexpr, b_f: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query; out, indices and weights are contiguous."""
    bank = (tl.program_id(0) // per_bank).to(tl.int64)
    i = tl.program_id(0) % per_bank
    o_k = tl.arange(0, b_k)
    p_found += (bank * per_bank + i) * splits * b_k
    key = tl.load(p_found + o_k)
    for split in range(1, splits):
        key = _merge(key, tl.load(p_found + split * b_k + o_k))
    m_k = (key != _NO_KEY) & (o_k < top_k)
    slot = _slot_of(key)
    score = tl.where(m_k, _score_of(key), float("-inf"))
    # The first is the best, NaN included, which a maximum would lose.
    top = tl.sum(tl.where((o_k == 0) & m_k, score, 0.0), 0)
    weight = tl.where(m_k, tl.exp(score - top), 0.0)
    total = tl.sum(weight, 0)
    weight = tl.where(m_k, weight / total, 0.0)

    b, h, q = _at(bank, i, H, Q, share_b, share_h)
    row = (b * H + h) * Q + q
    tl.store(p_indices + row * top_k + o_k, tl.where(m_k, slot, -1), mask=o_k < top_k)
    tl.store(p_weights + row * top_k + o_k, weight, mask=o_k < top_k)
    p_v += b * v_b + h * v_h
    o_f = tl.arange(0, b_f)
    for f in range(0, F, b_f):
        m_f = f + o_f < F
        v = tl.load(p_v + slot[:, None] * v_s + f + o_f[None, :], mask=m_k[:, None] & m_f[None, :], other=0)
        tl.store(p_out + row * F + f + o_f, tl.sum(weight[:, None] * v.to(tl.float32), 0), mask=m_f)


@triton.jit(do_not_specialize=_LENGTHS)
def _per_query(
    p_q, p_k, p_v, p_scale, p_grad_out, p_grad_weights, p_indices, p_weights,
    p_grad_q, p_grad_scale, p_grad_score, p_onto_query, p_onto_self,
    q_b, q_h, q_q, k_b, k_h, k_s, v_b, v_h, v_s, scale_b, scale_h, out_b, out_h, out_q,
    H, Q, top_k, factor,
    E: tl.constexpr, F: tl.constexpr, eps: tl.constexpr, cosine: tl.constexpr,
    b_k: tl.constexpr, b_e: tl.constexpr,
):  # fmt: skip
    """One query: dq, d scale, and per chosen slot d score and what multiplies q and k in dk."""
    row = tl.program_id(0).to(tl.int64)
    b, h, q = row // Q // H, row // Q % H, row % Q
    o_k = tl.arange(0, b_k)
    slot = tl.load(p_indices + row * top_k + o_k, mask=o_k < top_k, other=-1)
    m_k = slot >= 0
    weight = tl.load(p_weights + row * top_k + o_k, mask=m_k, other=0)
    p_q += b * q_b + h * q_h + q * q_q
    p_k += b * k_b + h * k_h
    p_v += b * v_b + h * v_h
    p_grad_out += b * out_b + h * out_h + q * out_q
    o_e = tl.arange(0, b_e)

    grad_p = tl.load(p_grad_weights + row * top_k + o_k, mask=m_k, other=0)
    for f in range(0, F, b_e):
        m_f = f + o_e < F
        v = tl.load(p_v + slot[:, None] * v_s + f + o_e[None, :], mask=m_k[:, None] & m_f[None, :], other=0)
        g = tl.load(p_grad_out + f + o_e, mask=m_f, other=0)
        grad_p += tl.sum(v.to(tl.float32) * g.to(tl.float32)[None, :], 1)
    product = tl.zeros([b_k], tl.float32)
    squared_k = tl.zeros([b_k], tl.float32)
    squared_q = 0.0
    for e in range(0, E, b_e):
        m_e = e + o_e < E
        k = tl.load(p_k + slot[:, None] * k_s + e + o_e[None, :], mask=m_k[:, None] & m_e[None, :], other=0)
        x = tl.load(p_q + e + o_e, mask=m_e, other=0).to(tl.float32)
        k = k.to(tl.float32)
        product += tl.sum(k * x[None, :], 1)
        squared_k += tl.sum(k * k, 1)
        squared_q += tl.sum(x * x, 0)

    times = factor
    if p_scale is not None:
        times *= tl.load(p_scale + b * scale_b + h * scale_h)
    # Relative to the best slot's: where its weight is near 1, the differences below would cancel.
    grad_p = tl.where(m_k, grad_p - tl.sum(tl.where(o_k == 0, grad_p, 0.0), 0), 0.0)
    grad_score = weight * (grad_p - tl.sum(weight * grad_p, 0))
    similarity = product
    onto_product = grad_score * times
    if cosine:
        inverse_q = _inverse_norm(squared_q, eps)
        inverse_k = _inverse_norm(squared_k, eps)
        similarity *= inverse_q * inverse_k
        onto_self = -onto_product * similarity * inverse_k * inverse_k
        along_q = -tl.sum(onto_product * similarity, 0) * inverse_q * inverse_q
        onto_product *= inverse_q * inverse_k
        if p_onto_self is not None:
            tl.store(p_onto_self + row * top_k + o_k, onto_self, mask=o_k < top_k)
    if p_grad_scale is not None:
        first = tl.sum(tl.where(o_k == 0, similarity, 0.0), 0)
        tl.store(p_grad_scale + row, factor * tl.sum(tl.where(m_k, grad_score * (similarity - first), 0.0), 0))
    if p_grad_score is not None:
        tl.store(p_grad_score + row * top_k + o_k, grad_score, mask=o_k < top_k)
    if p_onto_query is not None:
        tl.store(p_onto_query + row * top_k + o_k, onto_product, mask=o_k < top_k)
    if p_grad_q is not None:
        for e in range(0, E, b_e):
            m_e = e + o_e < E
            k = tl.load(p_k + slot[:, None] * k_s + e + o_e[None, :], mask=m_k[:, None] & m_e[None, :], other=0)
            grad = tl.sum(onto_product[:, None] * k.to(tl.float32), 0)
            if cosine:
                grad += along_q * tl.load(p_q + e + o_e, mask=m_e, other=0).to(tl.float32)
            tl.store(p_grad_q + row * E + e + o_e, grad, mask=m_e)


@triton.jit(do_not_specialize=_LENGTHS)
def _per_slot(
    p_entry, p_start, p_rows, p_coefficient, p_self, p_own, p_grad,
    r_b, r_h, r_q, own_b, own_h, own_s,
    H, Q, S, top_k, heads,
    width: tl.constexpr, b_n: tl.constexpr, b_e: tl.constexpr,
):  # fmt: skip
    """grad (slots of all banks, width): sum over a slot's entries of coefficient * row, plus (sum of self) * own row.

    entry (n,) int64: flat query * top_k + place, sorted by slot; start: where each slot's entries begin.
    Rows are q or the gradient of out; own rows are k. Without rows (bias): grad is the sum of coefficients.
    """
    slot = tl.program_id(0).to(tl.int64)
    begin = tl.load(p_start + slot)
    end = tl.load(p_start + slot + 1)
    o_n = tl.arange(0, b_n)
    o_e = tl.program_id(1) * b_e + tl.arange(0, b_e)
    m_e = o_e < width
    grad = tl.zeros([b_e], tl.float32)
    along = 0.0
    for first in range(begin, end, b_n):
        m_n = first + o_n < end
        entry = tl.load(p_entry + first + o_n, mask=m_n, other=0)
        coefficient = tl.load(p_coefficient + entry, mask=m_n, other=0)
        if p_self is not None:
            along += tl.sum(tl.load(p_self + entry, mask=m_n, other=0), 0)
        if p_rows is None:
            along += tl.sum(coefficient, 0)
        else:
            query = entry // top_k
            row = p_rows + query // Q // H * r_b + query // Q % H * r_h + query % Q * r_q
            x = tl.load(row[:, None] + o_e[None, :], mask=m_n[:, None] & m_e[None, :], other=0)
            grad += tl.sum(coefficient[:, None] * x.to(tl.float32), 0)
    if p_rows is None:
        tl.store(p_grad + slot, along)
    else:
        if p_self is not None and end > begin:
            bank = slot // S
            p_own += bank // heads * own_b + bank % heads * own_h + slot % S * own_s
            grad += along * tl.load(p_own + o_e, mask=m_e, other=0).to(tl.float32)
        tl.store(p_grad + slot * width + o_e, grad, mask=m_e)


# ------------------------------------------------------------------------------------------------------------ launchers


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    """Strides of the first `count` dimensions, 0 where the tensor is shared (or absent)."""
    if x is None:
        return (0,) * count
    return tuple(stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True))[:count]


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def select_config(per_bank: int, top_k: int) -> dict[str, int]:
    """Block sizes of `_select`. The keys fill most registers; larger blocks of E than these spill."""
    b_k = max(32, triton.next_power_of_2(top_k))
    b_q, b_e = (1, 32) if per_bank == 1 else (16, 16)
    return {"b_q": b_q, "b_s": max(64, b_k), "b_e": b_e, "b_k": b_k, "num_warps": 8 if b_k == 128 else 4}


def row_config(top_k: int) -> dict[str, int]:
    """Block sizes of `_attend` and `_per_query`, which hold b_k rows at once."""
    b_k = max(32, triton.next_power_of_2(top_k))
    return {"b_k": b_k, "b_e": 64 if b_k <= 32 else 32, "num_warps": 4}


SLOT_CONFIG = {"b_n": 16, "b_e": 64, "num_warps": 4}
EXAMINED_SLOTS = 1024  # a split is no shorter; also the programs wanted in flight
PROGRAMS = 1024


def refuses(top_k: int, dtype: torch.dtype, slots: int) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if top_k > MAX_TOP_K:
        return f"top_k is {top_k}; the Triton kernels go up to {MAX_TOP_K}"
    if dtype == torch.float64:
        return "the Triton kernels compute in float32, inputs are float64"
    if slots >= 2**31:
        return "2**31 slots or more"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    factor: float,
    cosine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw op fastmem::topk_attention_forward."""
    (B, H, Q, E), S, F = q.shape, k.shape[2], v.shape[3]
    out = q.new_empty(B, H, Q, F)
    indices = q.new_empty(B, H, Q, top_k, dtype=torch.int64)
    weights = q.new_empty(B, H, Q, top_k, dtype=torch.float32)
    if out.numel() == 0 and indices.numel() == 0:
        return out, indices, weights
    q, k, v = _rows(q), _rows(k), _rows(v)
    strides = [*_strides(q, 3), *_strides(k, 3), *_strides(scale, 2), *_strides(bias, 3), *_strides(mask, 3)]
    seen_alike = [(_strides(x, 2) if x is not None else (0, 0)) for x in (k, bias, mask)]
    share_b, share_h = (B == 1 or not any(s[0] for s in seen_alike), H == 1 or not any(s[1] for s in seen_alike))
    banks = (1 if share_b else B) * (1 if share_h else H)
    per_bank = B * H * Q // banks
    config = select_config(per_bank, top_k)
    blocks = triton.cdiv(per_bank, config["b_q"])
    splits = max(1, min(triton.cdiv(S, EXAMINED_SLOTS), triton.cdiv(PROGRAMS, banks * blocks)))
    per_split = triton.cdiv(triton.cdiv(S, splits), config["b_s"]) * config["b_s"]
    found = q.new_empty(banks, per_bank, splits, config["b_k"], dtype=torch.int64)
    flags = {"share_b": share_b, "share_h": share_h}
    rows = row_config(top_k)
    with on(q):
        _select[(banks * blocks, splits)](
            q, k, scale, bias, mask, found, *strides, H, Q, S, per_bank, blocks, splits, per_split, factor,
            E=E, eps=COSINE_EPS, cosine=cosine, **flags, **config,
        )  # fmt: skip
        _attend[(banks * per_bank,)](
            found, v, out, indices, weights, *_strides(v, 3), H, Q, per_bank, splits, top_k,
            F=F, **flags, b_k=rows["b_k"], b_f=rows["b_e"], num_warps=rows["num_warps"],
        )  # fmt: skip
    return out, indices, weights


def backward(
    grad_out: Tensor,
    grad_weights: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    factor: float,
    cosine: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The raw op fastmem::topk_attention_backward."""
    (B, H, Q, E), S, F, top_k = q.shape, k.shape[2], v.shape[3], indices.shape[3]
    q, k, v, grad_out = _rows(q), _rows(k), _rows(v), _rows(grad_out)
    grad_weights, indices, weights = grad_weights.contiguous(), indices.contiguous(), weights.contiguous()
    want_q, want_k, want_v, want_scale, want_bias = (
        want and x is not None for want, x in zip(wanted, (q, k, v, scale, bias), strict=True)
    )
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format) if want_q else None
    per_query = weights.new_empty(B, H, Q) if want_scale else None
    grad_score = torch.empty_like(weights) if want_bias else None
    onto_query = torch.empty_like(weights) if want_k else None
    onto_self = torch.empty_like(weights) if want_k and cosine else None
    config = row_config(top_k)
    if B * H * Q > 0:
        with on(q):
            _per_query[(B * H * Q,)](
                q, k, v, scale, grad_out, grad_weights, indices, weights,
                grad_q, per_query, grad_score, onto_query, onto_self,
                *_strides(q, 3), *_strides(k, 3), *_strides(v, 3), *_strides(scale, 2), *_strides(grad_out, 3),
                H, Q, top_k, factor, E=E, F=F, eps=COSINE_EPS, cosine=cosine, **config,
            )  # fmt: skip
    grad_scale = per_query.sum(2).sum_to_size(scale.shape) if per_query is not None and scale is not None else None
    orders: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def per_slot(
        like: Tensor, rows: Tensor | None, coefficient: Tensor | None, along: Tensor | None, own: Tensor | None
    ) -> Tensor:
        sharing = (like.shape[0], like.shape[1])
        if sharing not in orders:
            orders[sharing] = by_slot(indices, *sharing, S)
        grad = torch.empty_like(like, memory_format=torch.contiguous_format)
        width = 1 if rows is None else rows.shape[3]
        if grad.numel():
            with on(q):
                _per_slot[(sharing[0] * sharing[1] * S, triton.cdiv(width, SLOT_CONFIG["b_e"]))](
                    *orders[sharing], rows, coefficient, along, own, grad, *_strides(rows, 3), *_strides(own, 3),
                    H, Q, S, top_k, sharing[1], width=width, **SLOT_CONFIG,
                )  # fmt: skip
        return grad

    grad_k = per_slot(k, q, onto_query, onto_self, k) if want_k else None
    grad_v = per_slot(v, grad_out, weights, None, None) if want_v else None
    grad_bias = per_slot(bias, None, grad_score, None, None) if want_bias and bias is not None else None
    grads = (grad_q, grad_k, grad_v, grad_scale, grad_bias)
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore[return-value]


def by_slot(indices: Tensor, banks_b: int, banks_h: int, S: int) -> tuple[Tensor, Tensor]:
    """Entries (query and place) sorted by bank and slot, in the order of the queries, and where each slot begins.

    Args:
        indices: (B, H, Q, top_k) int64, -1 for none.
        banks_b, banks_h: B or 1, H or 1.
        S: slots of a bank.

    Returns:
        entry (B * H * Q * top_k,) and start (banks * S + 1,), both int64.
    """
    B, H = indices.shape[:2]
    batch = torch.arange(B, device=indices.device) if banks_b > 1 else torch.zeros(B, device=indices.device).long()
    head = torch.arange(H, device=indices.device) if banks_h > 1 else torch.zeros(H, device=indices.device).long()
    bank = (batch[:, None] * banks_h + head)[:, :, None, None]
    slots = banks_b * banks_h * S
    place = torch.where(indices >= 0, bank * S + indices, slots).flatten()
    place, entry = place.sort(stable=True)
    return entry, torch.searchsorted(place, torch.arange(slots + 1, device=indices.device))

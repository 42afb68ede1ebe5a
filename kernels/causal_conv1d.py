"""causal_conv1d on a GPU; derivation in docs/ops/causal_conv1d.md.

A program holds a tile of steps x channels of one row. The inputs that its steps see, or in the backward the gradients
of the later steps that see its inputs, are loaded again for each of the W taps; all but the first load come from L1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastmem.kernels._device import on
from torch import Tensor

MAX_W = 8
FORWARD_CONFIG = {"b_t": 16, "b_d": 64, "num_warps": 4}
ROW_CONFIG = {"b_d": 256, "num_warps": 2}


def sums_config(W: int) -> dict[str, int]:
    """For `_onto_taps`; with many taps 8 warps run out of registers."""
    return {"b_t": 32, "b_d": 64, "num_warps": 8 if W <= 4 else 16}


def refuses(W: int) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    return f"W is {W}; the Triton kernels go up to {MAX_W}" if W > MAX_W else None


# Positions count along the row; those of the initial state lie just before `start`, the first step of their sequence.


@triton.jit
def _input(p_x, p_state, position, seen, start, sequence, o_d, m_d, x_t, x_d, D, W: tl.constexpr, dtype: tl.constexpr):
    """(b_t, b_d) inputs at these positions, from x or the initial state; 0 where not `seen` or before that."""
    m = (seen & (position >= start))[:, None] & m_d[None, :]
    x = tl.load(p_x + position.to(tl.int64)[:, None] * x_t + o_d.to(tl.int64)[None, :] * x_d, mask=m, other=0.0).to(
        dtype
    )
    if p_state is not None:
        row = W - 1 + position - start
        m = (seen & (position < start) & (row >= 0))[:, None] & m_d[None, :]
        p = p_state + (sequence.to(tl.int64) * (W - 1) + row)[:, None] * D + o_d[None, :]
        x += tl.load(p, mask=m, other=0.0).to(dtype)
    return x


@triton.jit
def _taps(
    p_x, p_weight, p_bias, p_state, p_reset, t, m_t, start, sequence, o_d, m_d, x_t, x_d, D,
    W: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The sum before the activation at steps t."""
    total = tl.zeros([t.shape[0], o_d.shape[0]], dtype)
    if p_bias is not None:
        total += tl.load(p_bias + o_d, mask=m_d, other=0.0)[None, :]
    seen = m_t
    for back in tl.static_range(W):
        if back > 0 and p_reset is not None:
            m = seen & (t - back + 1 >= start)
            seen = seen & (tl.load(p_reset + t - back + 1, mask=m, other=0) == 0)
        x = _input(p_x, p_state, t - back, seen, start, sequence, o_d, m_d, x_t, x_d, D, W, dtype)
        total += tl.load(p_weight + o_d * W + W - 1 - back, mask=m_d, other=0.0)[None, :] * x
    return total


@triton.jit
def _sequence_of(p_sequence, p_edges, t, m_t, row, L, n):
    """(index among all sequences, first step, step after the last) of steps t."""
    if p_sequence is None:
        start = tl.zeros_like(t)
        return start + row, start, start + L
    else:
        sequence = tl.load(p_sequence + t, mask=m_t, other=0)
        start = tl.load(p_edges + sequence, mask=m_t, other=0)
        return sequence + row * n, start, tl.load(p_edges + sequence + 1, mask=m_t, other=0)


@triton.jit(do_not_specialize=["L", "n", "tiles", "rows_per_group"])
def _forward(
    p_x,  # (B, L, D), any strides
    p_weight,  # (groups, D, W)
    p_bias,  # (groups, D) or None
    p_state,  # (B * n, W - 1, D) or None
    p_reset,  # (B, L) bytes or None
    p_sequence,  # (L,) or None: one sequence a row
    p_edges,  # (n + 1,) or None
    p_y,  # (B, L, D)
    x_b,
    x_t,
    x_d,
    L,
    D,
    n,
    tiles,
    rows_per_group,
    W: tl.constexpr,
    silu: tl.constexpr,
    b_t: tl.constexpr,
    b_d: tl.constexpr,
):
    dtype: tl.constexpr = p_weight.dtype.element_ty
    row = tl.program_id(0) // tiles
    t = tl.program_id(0) % tiles * b_t + tl.arange(0, b_t)
    o_d = tl.program_id(1) * b_d + tl.arange(0, b_d)
    m_t, m_d = t < L, o_d < D
    sequence, start, _stop = _sequence_of(p_sequence, p_edges, t, m_t, row, L, n)
    row = row.to(tl.int64)
    group = row // rows_per_group
    if p_bias is not None:
        p_bias += group * D
    if p_reset is not None:
        p_reset += row * L
    y = _taps(
        p_x + row * x_b, p_weight + group * D * W, p_bias, p_state, p_reset,
        t, m_t, start, sequence, o_d, m_d, x_t, x_d, D, W, dtype,
    )  # fmt: skip
    if silu:
        y = y * tl.sigmoid(y)
    tl.store(p_y + (row * L + t)[:, None] * D + o_d[None, :], y, mask=m_t[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["L", "n"])
def _final_state(
    p_x,
    p_state,
    p_reset,
    p_edges,
    p_final,  # (B * n, W - 1, D)
    x_b,
    x_t,
    x_d,
    L,
    D,
    n,
    W: tl.constexpr,
    b_d: tl.constexpr,
):
    index = tl.program_id(0)
    row = (index // n).to(tl.int64)
    o_d = tl.program_id(1) * b_d + tl.arange(0, b_d)
    m_d = o_d < D
    one = tl.zeros([1], tl.int32)  # a tile of one step
    if p_edges is None:
        start, stop = one, one + L
    else:
        start, stop = tl.load(p_edges + index % n + one), tl.load(p_edges + index % n + one + 1)
    if p_reset is not None:
        p_reset += row * L
    seen = one == 0
    for back in tl.static_range(W - 1):
        position = stop - 1 - back
        if back > 0 and p_reset is not None:
            seen = seen & (tl.load(p_reset + position + 1, mask=seen & (position + 1 >= start), other=0) == 0)
        x = _input(
            p_x + row * x_b, p_state, position, seen, start, one + index, o_d, m_d, x_t, x_d, D,
            W, p_final.dtype.element_ty,
        )  # fmt: skip
        p = p_final + (index.to(tl.int64) * (W - 1) + W - 2 - back + one)[:, None] * D + o_d[None, :]
        tl.store(p, x, mask=m_d[None, :])


@triton.jit(do_not_specialize=["L", "n", "tiles", "rows_per_group"])
def _onto_taps(
    p_grad_y,  # (B, L, D), any strides
    p_x,
    p_weight,
    p_bias,
    p_state,
    p_reset,
    p_sequence,
    p_edges,
    p_grad,  # (B, L, D): gradient of the sum before the activation; None without one, where it is grad_y
    p_sums,  # (B * tiles, W + 1, D): this tile's share of the gradients of weight and, last, bias
    g_b,
    g_t,
    g_d,
    x_b,
    x_t,
    x_d,
    L,
    D,
    n,
    tiles,
    rows_per_group,
    W: tl.constexpr,
    b_t: tl.constexpr,
    b_d: tl.constexpr,
):
    dtype: tl.constexpr = p_weight.dtype.element_ty
    tile = tl.program_id(0)
    row = tile // tiles
    t = tile % tiles * b_t + tl.arange(0, b_t)
    o_d = tl.program_id(1) * b_d + tl.arange(0, b_d)
    m_t, m_d = t < L, o_d < D
    m = m_t[:, None] & m_d[None, :]
    sequence, start, _stop = _sequence_of(p_sequence, p_edges, t, m_t, row, L, n)
    row = row.to(tl.int64)
    p_x += row * x_b
    if p_reset is not None:
        p_reset += row * L
    p = p_grad_y + row * g_b + t.to(tl.int64)[:, None] * g_t + o_d.to(tl.int64)[None, :] * g_d
    g = tl.load(p, mask=m, other=0.0).to(dtype)
    if p_grad is not None:
        group = row // rows_per_group
        p_weight += group * D * W
        if p_bias is not None:
            p_bias += group * D
        x = _taps(p_x, p_weight, p_bias, p_state, p_reset, t, m_t, start, sequence, o_d, m_d, x_t, x_d, D, W, dtype)
        s = tl.sigmoid(x)
        g = tl.where(m, g * s * (1 + x * (1 - s)), 0.0)
        tl.store(p_grad + (row * L + t)[:, None] * D + o_d[None, :], g, mask=m)
    p_share = p_sums + tile.to(tl.int64) * (W + 1) * D + o_d
    tl.store(p_share + W * D, tl.sum(g, 0), mask=m_d)
    seen = m_t
    for back in range(W):  # not unrolled: the taps' tiles would all want registers at once
        if p_reset is not None:
            m_reset = seen & (back > 0) & (t - back + 1 >= start)
            seen = seen & (tl.load(p_reset + t - back + 1, mask=m_reset, other=0) == 0)
        x = _input(p_x, p_state, t - back, seen, start, sequence, o_d, m_d, x_t, x_d, D, W, dtype)
        tl.store(p_share + (W - 1 - back) * D, tl.sum(g * x, 0), mask=m_d)


@triton.jit
def _gather(
    p_grad, p_grad_final, p_weight, p_reset, t, seen, start, stop, sequence, o_d, m_d, g_t, g_d, D,
    W: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The gradient of the inputs at positions t: of the steps that see them, and of the final state."""
    total = tl.zeros([t.shape[0], o_d.shape[0]], dtype)
    for ahead in tl.static_range(W):
        later = t + ahead
        inside = later >= start  # or still in the initial state
        seen = seen & ((inside == 0) | (later < stop))
        if p_reset is not None:  # a step's own reset does not hide its input
            reset = tl.load(p_reset + later, mask=seen & inside & (later > t), other=0)
            seen = seen & (reset == 0)
        m = (seen & inside)[:, None] & m_d[None, :]
        g = tl.load(p_grad + later.to(tl.int64)[:, None] * g_t + o_d.to(tl.int64)[None, :] * g_d, mask=m, other=0.0).to(
            dtype
        )
        w = tl.load(p_weight + o_d * W + W - 1 - ahead, mask=m_d, other=0.0)
        total += tl.where(m, w[None, :] * g, 0.0)
        if ahead < W - 1:
            m = (seen & (later == stop - 1))[:, None] & m_d[None, :]
            p = p_grad_final + (sequence.to(tl.int64) * (W - 1) + W - 2 - ahead)[:, None] * D + o_d[None, :]
            total += tl.load(p, mask=m, other=0.0).to(dtype)
    return total


@triton.jit(do_not_specialize=["L", "n", "tiles", "rows_per_group"])
def _backward(
    p_grad,  # (B, L, D), any strides: gradient of the sum before the activation
    p_grad_final,  # (B * n, W - 1, D)
    p_weight,
    p_reset,
    p_sequence,
    p_edges,
    p_grad_x,  # (B, L, D)
    g_b,
    g_t,
    g_d,
    L,
    D,
    n,
    tiles,
    rows_per_group,
    W: tl.constexpr,
    b_t: tl.constexpr,
    b_d: tl.constexpr,
):
    row = tl.program_id(0) // tiles
    t = tl.program_id(0) % tiles * b_t + tl.arange(0, b_t)
    o_d = tl.program_id(1) * b_d + tl.arange(0, b_d)
    m_t, m_d = t < L, o_d < D
    sequence, start, stop = _sequence_of(p_sequence, p_edges, t, m_t, row, L, n)
    row = row.to(tl.int64)
    if p_reset is not None:
        p_reset += row * L
    grad_x = _gather(
        p_grad + row * g_b, p_grad_final, p_weight + row // rows_per_group * D * W, p_reset,
        t, m_t, start, stop, sequence, o_d, m_d, g_t, g_d, D, W, p_weight.dtype.element_ty,
    )  # fmt: skip
    p = p_grad_x + (row * L + t)[:, None] * D + o_d[None, :]
    tl.store(p, grad_x, mask=m_t[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["L", "n", "rows_per_group"])
def _state_backward(
    p_grad,
    p_grad_final,
    p_weight,
    p_reset,
    p_edges,
    p_grad_state,  # (B * n, W - 1, D)
    g_b,
    g_t,
    g_d,
    L,
    D,
    n,
    rows_per_group,
    W: tl.constexpr,
    b_d: tl.constexpr,
):
    index = tl.program_id(0)
    row = (index // n).to(tl.int64)
    before = W - 1 - tl.program_id(2)  # steps before the sequence
    o_d = tl.program_id(1) * b_d + tl.arange(0, b_d)
    m_d = o_d < D
    one = tl.zeros([1], tl.int32)
    if p_edges is None:
        start, stop = one, one + L
    else:
        start, stop = tl.load(p_edges + index % n + one), tl.load(p_edges + index % n + one + 1)
    if p_reset is not None:
        p_reset += row * L
    grad = _gather(
        p_grad + row * g_b, p_grad_final, p_weight + row // rows_per_group * D * W, p_reset,
        start - before, one == 0, start, stop, one + index, o_d, m_d, g_t, g_d, D, W, p_weight.dtype.element_ty,
    )  # fmt: skip
    p = p_grad_state + (index.to(tl.int64) * (W - 1) + W - 1 - before + one)[:, None] * D + o_d[None, :]
    tl.store(p, grad, mask=m_d[None, :])


@triton.jit
def _step(
    p_state,  # (B, W - 1, D), any strides
    p_x,  # (B, D), any strides
    p_weight,  # (D, W)
    p_bias,  # (D,) or None
    p_y,  # (B, D)
    p_new,  # like the state, may be it
    s_b,
    s_w,
    s_d,
    x_b,
    x_d,
    n_b,
    n_w,
    n_d,
    D,
    W: tl.constexpr,
    silu: tl.constexpr,
    b_d: tl.constexpr,
):
    dtype: tl.constexpr = p_weight.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * b_d + tl.arange(0, b_d)
    m_d = o_d < D
    far = o_d.to(tl.int64)  # channels may be the length of a sequence apart
    p_state += row * s_b + far * s_d
    p_new += row * n_b + far * n_d
    x = tl.load(p_x + row * x_b + far * x_d, mask=m_d, other=0.0)
    y = tl.load(p_weight + o_d * W + W - 1, mask=m_d, other=0.0) * x.to(dtype)
    if p_bias is not None:
        y += tl.load(p_bias + o_d, mask=m_d, other=0.0)
    # Where the state is changed in place, each row is read by all threads before one writes there.
    for w in tl.static_range(W - 1):
        old = tl.load(p_state + w * s_w, mask=m_d, other=0.0)
        y += tl.load(p_weight + o_d * W + w, mask=m_d, other=0.0) * old.to(dtype)
        tl.debug_barrier()
        if w > 0:
            tl.store(p_new + (w - 1) * n_w, old, mask=m_d)
    if W > 1:
        tl.store(p_new + (W - 2) * n_w, x, mask=m_d)
    if silu:
        y = y * tl.sigmoid(y)
    tl.store(p_y + row * D + o_d, y, mask=m_d)


# ------------------------------------------------------------------------------------------------------------- launches


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _packing(cu_seqlens: Tensor | None, L: int) -> tuple[Tensor | None, Tensor | None, int]:
    """(sequence of each step, where sequences begin and end, their number), in bounds whatever stands in cu_seqlens."""
    if cu_seqlens is None:
        return None, None, 1
    n = cu_seqlens.shape[0] - 1
    if n == 0 and L > 0:
        raise ValueError("cu_seqlens: expected at least one sequence for L > 0, got none")
    edges = cu_seqlens.clamp(0, L).int()
    sequence = torch.searchsorted(edges, torch.arange(L, device=edges.device, dtype=torch.int32), right=True) - 1
    return sequence.clamp(0, max(n - 1, 0)).int(), edges, n


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    y: Tensor,
    final_state: Tensor,
) -> None:
    """The raw op fastmem::causal_conv1d, results written into y and final_state."""
    (B, L, D), (groups, _, W) = x.shape, weight.shape
    weight, bias, state, reset = _contiguous(weight, bias, state, reset)
    reset = None if reset is None else reset.view(torch.uint8)
    if W == 1:
        state = None
    with on(x):
        sequence, edges, n = _packing(cu_seqlens, L)
        if y.numel():
            tiles = triton.cdiv(L, FORWARD_CONFIG["b_t"])
            _forward[(B * tiles, triton.cdiv(D, FORWARD_CONFIG["b_d"]))](
                x, weight, bias, state, reset, sequence, edges, y, *x.stride(), L, D, n, tiles, B // groups,
                W=W, silu=silu, **FORWARD_CONFIG,
            )  # fmt: skip
        if final_state.numel():
            _final_state[(B * n, triton.cdiv(D, ROW_CONFIG["b_d"]))](
                x, state, reset, edges, final_state, *x.stride(), L, D, n, W=W, **ROW_CONFIG
            )


def backward(
    grad_y: Tensor,
    grad_final: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_state: Tensor,
) -> None:
    """The raw op fastmem::causal_conv1d_backward, gradients written into the last four."""
    (B, L, D), (groups, _, W) = x.shape, weight.shape
    weight, bias, state, reset, grad_final = _contiguous(weight, bias, state, reset, grad_final)
    reset = None if reset is None else reset.view(torch.uint8)
    if W == 1:
        state = None
    sums_of = sums_config(W)
    tiles = triton.cdiv(L, sums_of["b_t"])
    sums = weight.new_empty(B * tiles, W + 1, D)
    with on(x):
        sequence, edges, n = _packing(cu_seqlens, L)
        grad = weight.new_empty(B, L, D) if silu else grad_y
        if grad_x.numel():
            _onto_taps[(B * tiles, triton.cdiv(D, sums_of["b_d"]))](
                grad_y, x, weight, bias, state, reset, sequence, edges, grad if silu else None, sums,
                *grad_y.stride(), *x.stride(), L, D, n, tiles, B // groups, W=W, **sums_of,
            )  # fmt: skip
            row_tiles = triton.cdiv(L, FORWARD_CONFIG["b_t"])
            _backward[(B * row_tiles, triton.cdiv(D, FORWARD_CONFIG["b_d"]))](
                grad, grad_final, weight, reset, sequence, edges, grad_x, *grad.stride(),
                L, D, n, row_tiles, B // groups, W=W, **FORWARD_CONFIG,
            )  # fmt: skip
        if state is not None and state.numel():
            _state_backward[(B * n, triton.cdiv(D, ROW_CONFIG["b_d"]), W - 1)](
                grad, grad_final, weight, reset, edges, grad_state, *grad.stride(),
                L, D, n, B // groups, W=W, **ROW_CONFIG,
            )  # fmt: skip
        totals = sums.view(groups, B // groups * tiles, W + 1, D).sum(1)
        grad_weight.copy_(totals[:, :W].mT)
        if bias is not None:
            grad_bias.copy_(totals[:, W])


def step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, y: Tensor, new_state: Tensor
) -> None:
    """The raw ops fastmem::causal_conv1d_step and causal_conv1d_step_: new_state may be state."""
    (B, D), W = x.shape, weight.shape[1]
    weight, bias = _contiguous(weight, bias)
    if y.numel():
        with on(x):
            _step[(B, triton.cdiv(D, ROW_CONFIG["b_d"]))](
                state, x, weight, bias, y, new_state, *state.stride(), *x.stride(), *new_state.stride(), D,
                W=W, silu=silu, **ROW_CONFIG,
            )  # fmt: skip

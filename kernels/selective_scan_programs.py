"""Triton programs of selective_scan, which selective_scan.py launches. Derivation: docs/ops/selective_scan.md.

A program takes one time segment of one sequence and a block of its channels, one warp as a rule, and keeps their states
[b_d, b_n] in registers. The lanes lie along the channels first and along n with what is left: with 32 channels the sums
over n stay inside a thread. The channels of a block share their B and C.

    _local     what a segment does to a state of zero, and the sum of its dt, by which it decays one that comes in
    _carry     from these, the state that comes into each segment; one program for some elements of the state
    _forward   a segment from the state that comes in: y, the final state, the states that a backward starts from
    _backward  chunk by chunk from the last: the states again from the one that was kept, then the gradients
    _step      one step of decoding

`_local` and `_carry` run only where sequences and channels alone do not fill the GPU; with `adjoint` they run against
time, on the adjoint of the state. With `dual` every kernel carries the tangent v_x of each x along given directions,
and its results are the tangents of y, of the final state, and of the gradients.

exp(dt A) is exp2 with A scaled by log2(e). Steps are taken b_t at a time; those past the end have dt = u = 0, which
leave a state as it is. Gradients of B and C are summed over the channels of a program, those of the parameters over its
steps, and both over programs by torch, in a fixed order: no atomics, two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# -------------------------------------------------------------------------------------------------------------- pieces


@triton.jit
def _load(p, at, offsets, step, mask):
    """fp32 from p + at + offsets + step; zeros for a pointer that is absent."""
    if p is None:
        x = tl.zeros(mask.shape, tl.float32)
    else:
        x = tl.load(p + at + offsets + step, mask=mask, other=0).to(tl.float32)
    return x


@triton.jit
def _program(work, p_cu, L, packed, segments, per_segment, blocks):
    """Block of channels, sequence, segment, row, and where the sequence (begin, end) and the segment (lo, hi) lie."""
    block = work % blocks
    unit = (work // blocks).to(tl.int64)
    segment = unit % segments
    sequence = unit // segments
    row = sequence // packed
    begin = row * 0
    end = begin + L
    if p_cu is not None:
        begin = tl.minimum(tl.maximum(tl.load(p_cu + sequence % packed), 0), L)
        end = tl.minimum(tl.maximum(tl.load(p_cu + sequence % packed + 1), begin), L)
    lo = tl.minimum(begin + segment * per_segment, end)
    hi = tl.minimum(lo + per_segment, end)
    return block, sequence, segment, row, begin, end, lo, hi


@triton.jit
def _hidden(o):
    """o, of which the compiler no longer sees that neighbours are neighbours.

    It would make loads of a state wide, and their layout, which is wrong for the sums, would be that of the loops.
    """
    return o & 0x7FFFFFFF


@triton.jit
def _opaque(x, i):
    """x >= 0, of which the compiler no longer sees how it follows from the loop variable i, or that it does not.

    It would keep a pointer for every load of a loop and step them all: far more than there are registers.
    """
    return x ^ (tl.program_id(2) & i)  # the grid has one axis


@triton.jit
def _places(block, D, G, per_group, N, b_d: tl.constexpr, b_n: tl.constexpr):
    """Group of a block of channels, and the channels and states with what exists of them and of both."""
    group = block // per_group
    o_d = _hidden(group * (D // G) + block % per_group * b_d + tl.arange(0, b_d))
    m_d = o_d < (group + 1) * (D // G)
    o_n = tl.arange(0, b_n)
    m_n = o_n < N
    return group.to(tl.int64), o_d, m_d, o_n, m_n, m_d[:, None] & m_n[None, :]


@triton.jit
def _state(at, D, N, o_d, o_n):
    """Places of the at-th state of (..., D, N)."""
    return ((at * D + o_d) * N)[:, None] + _hidden(o_n)[None, :]


@triton.jit
def _transposed(at, N, D, o_d, o_n):
    """Places of the at-th state of (..., N, D)."""
    return (at * N + _hidden(o_n))[None, :] * D + o_d[:, None]


@triton.jit
def _time_step(x, v_x, mask, softplus: tl.constexpr):
    """dt = softplus(x) or x, 0 where masked, and the slope of the map; the tangents of both."""
    if softplus:
        large = x > 20  # as torch
        e = tl.exp2(LOG2E * tl.where(large, 0.0, x))
        series = e * (1 - e * (0.5 - e * (0.33333334 - e * (0.25 - e * 0.2))))
        dt = tl.where(large, x, tl.where(e < 0.0625, series, tl.log(1 + e)))
        slope = tl.where(large, 1.0, e / (1 + e))
        v_slope = tl.where(large, 0.0, slope / (1 + e)) * v_x
    else:
        dt = x
        slope = tl.full(x.shape, 1.0, tl.float32)
        v_slope = tl.zeros(x.shape, tl.float32)
    return tl.where(mask, dt, 0.0), tl.where(mask, slope * v_x, 0.0), slope, v_slope


@triton.jit
def _gate(z):
    """silu(z), its slope and its curvature."""
    sigma = 1 / (1 + tl.exp2(-LOG2E * z))
    slope = sigma * (1 + z * (1 - sigma))
    return z * sigma, slope, sigma * (1 - sigma) * (2 + z * (1 - 2 * sigma))


@triton.jit
def _drop(h, v_h, p_reset, at, mask):
    """The state before a step, zero where it is dropped; whatever it was, nan included."""
    if p_reset is not None:
        dropped = tl.load(p_reset + at, mask=mask, other=0) != 0
        h = tl.where(dropped, 0.0, h)
        v_h = tl.where(dropped, 0.0, v_h)
    return h, v_h


@triton.jit
def _exponent(A, v_A, dt, v_dt):
    """Tangent of dt A, where A is scaled."""
    return LN2 * (v_dt[:, None] * A + dt[:, None] * v_A)


@triton.jit
def _advance(
    h, v_h, A, v_A, bias, v_bias, p_reset, p, at, by, i, m_d, m_n, o_d, o_n, softplus: tl.constexpr, dual: tl.constexpr
):  # fmt: skip
    """Step i of a block: h <- exp(dt A) h + dt u B, and its tangent.

    p: u, delta, B and their directions; at, by: where step 0 lies, and how far apart steps do, of u, delta, B, of what
    lies like y and of what lies like B without strides, and of reset.
    """
    u = _load(p[0], at[0], o_d, i * by[0], m_d)
    x = _load(p[1], at[1], o_d, i * by[1], m_d) + bias
    B = _load(p[2], at[2], o_n, i * by[2], m_n)
    v_u = _load(p[3], at[3], o_d, i * by[3], m_d)
    v_x = _load(p[4], at[3], o_d, i * by[3], m_d) + v_bias
    dt, v_dt, slope, v_slope = _time_step(x, v_x, m_d, softplus)
    before, v_before = _drop(h, v_h, p_reset, at[5] + i, i < by[5])
    x = dt * u
    a = tl.exp2(dt[:, None] * A)
    if dual:
        v_B = _load(p[5], at[4], o_n, i * by[4], m_n)
        v_x = v_dt * u + dt * v_u
        v_h = (
            a * (v_before + _exponent(A, v_A, dt, v_dt) * before)
            + v_x[:, None] * B[None, :]
            + x[:, None] * v_B[None, :]
        )
    return before, v_before, a * before + x[:, None] * B[None, :], v_h, u, v_u, dt, v_dt, slope, v_slope


_SIZES = [
    "L",
    "packed",
    "per_set",
    "segments",
    "per_segment",
    "blocks",
    "per_group",
    "G",
    "plane",
    "summed",
    "S",
    "works",
]

# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=_SIZES)
def _local(
    p_u, p_delta, p_A, p_B, p_C, p_z, p_bias, p_reset, p_cu, p_grad_y,
    p_to_u, p_to_delta, p_to_A, p_to_B, p_to_C, p_to_z, p_to_bias,
    p_ends, p_sums, p_dropped,
    u_r, u_t, delta_r, delta_t, B_r, B_t, B_g, C_r, C_t, C_g, z_r, z_t, gy_r, gy_t,
    L, D, packed, per_set, S, segments, per_segment, blocks, G, per_group,
    N: tl.constexpr, softplus: tl.constexpr, adjoint: tl.constexpr, dual: tl.constexpr,
    b_d: tl.constexpr, b_n: tl.constexpr, b_t: tl.constexpr,
):  # fmt: skip
    """ends (1 or 2, S, segments, N, D), sums (1 or 2, S, segments, D), dropped (S, segments).

    Of the last segment (with `adjoint` the first) nobody needs the end.
    """
    block, sequence, segment, row, _begin, end, lo, hi = _program(
        tl.program_id(0), p_cu, L, packed, segments, per_segment, blocks
    )
    needed = (segment > 0) & (lo < hi) if adjoint else hi < end
    if needed:
        group, o_d, m_d, o_n, m_n, m_h = _places(block, D, G, per_group, N, b_d, b_n)
        set = sequence // per_set
        A = LOG2E * _load(p_A, 0, _state(set, D, N, o_d, o_n), 0, m_h)
        bias = _load(p_bias, set * D, o_d, 0, m_d)
        v_A = LOG2E * _load(p_to_A, 0, _state(set, D, N, o_d, o_n), 0, m_h)
        v_bias = _load(p_to_bias, set * D, o_d, 0, m_d)
        h = tl.zeros([b_d, b_n], tl.float32)
        v_h = tl.zeros([b_d, b_n], tl.float32)
        total = tl.zeros([b_d], tl.float32)
        v_total = tl.zeros([b_d], tl.float32)
        any_dropped = tl.zeros([1], tl.int32)
        p = p_u, p_delta, p_B, p_to_u, p_to_delta, p_to_B
        for done in range(0, hi - lo, b_t):
            left = (hi - lo - done).to(tl.int32)
            t0 = _opaque(hi - 1 - done if adjoint else lo + done, done)
            y_at = (row * L + t0) * D
            n_at = ((row * L + t0) * G + group) * N
            for i in tl.static_range(b_t):
                valid = i < left
                m = m_d & valid
                m_i = m_n & valid
                if adjoint:
                    x = _load(p_delta, row * delta_r + t0 * delta_t, o_d, -i * delta_t, m) + bias
                    v_x = _load(p_to_delta, y_at, o_d, -i * D, m) + v_bias
                    dt, v_dt, _, _ = _time_step(x, v_x, m, softplus)
                    C = _load(p_C, row * C_r + t0 * C_t + group * C_g, o_n, -i * C_t, m_i)
                    gp = _load(p_grad_y, row * gy_r + t0 * gy_t, o_d, -i * gy_t, m)
                    if p_z is not None:
                        w, w_slope, _ = _gate(_load(p_z, row * z_r + t0 * z_t, o_d, -i * z_t, m))
                        v_gp = gp * w_slope * _load(p_to_z, y_at, o_d, -i * D, m)
                        gp *= w
                    h += C[None, :] * gp[:, None]
                    a = tl.exp2(dt[:, None] * A)
                    if dual:
                        v_C = _load(p_to_C, n_at, o_n, -i * (G * N), m_i)
                        v_h += v_C[None, :] * gp[:, None]
                        if p_z is not None:
                            v_h += C[None, :] * v_gp[:, None]
                        v_h = a * (v_h + _exponent(A, v_A, dt, v_dt) * h)
                    h, v_h = _drop(a * h, v_h, p_reset, row * L + t0 - i, valid)
                else:
                    at = (
                        row * u_r + t0 * u_t, row * delta_r + t0 * delta_t, row * B_r + t0 * B_t + group * B_g,
                        y_at, n_at, row * L + t0,
                    )  # fmt: skip
                    by = u_t, delta_t, B_t, D, G * N, left
                    _, _, h, v_h, _, _, dt, v_dt, _, _ = _advance(
                        h, v_h, A, v_A, bias, v_bias, p_reset, p, at, by, i, m, m_i, o_d, o_n, softplus, dual
                    )
                total += dt
                if dual:
                    v_total += v_dt
                if p_reset is not None:
                    at_reset = row * L + (t0 - i if adjoint else t0 + i)
                    any_dropped |= tl.load(p_reset + at_reset, mask=valid, other=0).to(tl.int32)
        unit = sequence * segments + segment
        tl.store(p_ends + _transposed(unit, N, D, o_d, o_n), h, mask=m_h)
        tl.store(p_sums + unit * D + o_d, total, mask=m_d)
        if dual:
            unit_ = S.to(tl.int64) * segments + unit
            tl.store(p_ends + _transposed(unit_, N, D, o_d, o_n), v_h, mask=m_h)
            tl.store(p_sums + unit_ * D + o_d, v_total, mask=m_d)
        if block == 0:
            tl.store(p_dropped + unit + tl.arange(0, 1), any_dropped.to(tl.int8))


@triton.jit(do_not_specialize=_SIZES)
def _carry(
    p_ends, p_sums, p_dropped, p_A, p_to_A, p_first, p_to_first, p_cu,
    L, D, packed, per_set, S, segments, per_segment, blocks,
    N: tl.constexpr, adjoint: tl.constexpr, dual: tl.constexpr, b: tl.constexpr, b_t: tl.constexpr,
):  # fmt: skip
    """ends: each segment's own end becomes the state that comes into it; `first` (S, D, N) is what comes first."""
    block, sequence, _, _, begin, end, _, _ = _program(tl.program_id(0), p_cu, L, packed, 1, L, blocks)
    o = block * b + tl.arange(0, b)
    m = o < N * D
    n, d = o // D, o % D
    set = sequence // per_set
    A = LOG2E * _load(p_A, set * D * N, d * N + n, 0, m)
    v_A = LOG2E * _load(p_to_A, set * D * N, d * N + n, 0, m)
    h = _load(p_first, sequence * D * N, d * N + n, 0, m)
    v_h = _load(p_to_first, sequence * D * N, d * N + n, 0, m)
    count = tl.maximum(tl.cdiv(end - begin, per_segment), 1)
    for done in range(0, count, b_t):
        ends, v_ends, sums, v_sums, drops = (), (), (), (), ()  # all loads before the stores
        for i in tl.static_range(b_t):
            segment = count - 1 - done - i if adjoint else done + i
            unit = sequence * segments + segment
            m_i = m & (done + i + 1 < count)  # the last one's end is not needed
            ends += (_load(p_ends, unit * N * D, o, 0, m_i),)
            sums += (_load(p_sums, unit * D, d, 0, m_i),)
            drops += (tl.load(p_dropped + unit, mask=done + i + 1 < count, other=0) != 0,)
            if dual:
                unit_ = S.to(tl.int64) * segments + unit
                v_ends += (_load(p_ends, unit_ * N * D, o, 0, m_i),)
                v_sums += (_load(p_sums, unit_ * D, d, 0, m_i),)
        for i in tl.static_range(b_t):
            segment = count - 1 - done - i if adjoint else done + i
            unit = sequence * segments + segment
            m_i = m & (done + i < count)
            tl.store(p_ends + unit * N * D + o, h, mask=m_i)
            a = tl.exp2(sums[i] * A)
            if dual:
                tl.store(p_ends + (S.to(tl.int64) * segments + unit) * N * D + o, v_h, mask=m_i)
                v_h = a * (v_h + LN2 * (v_sums[i] * A + sums[i] * v_A) * h)
                v_h = tl.where(drops[i], 0.0, v_h) + v_ends[i]
            h = tl.where(drops[i], 0.0, a * h) + ends[i]


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_state, p_reset, p_cu,
    p_to_u, p_to_delta, p_to_A, p_to_B, p_to_C, p_to_D, p_to_z, p_to_bias, p_to_state,
    p_starts, p_y, p_final, p_carries,
    u_r, u_t, delta_r, delta_t, B_r, B_t, B_g, C_r, C_t, C_g, z_r, z_t,
    L, D, packed, per_set, S, segments, per_segment, blocks, G, per_group, plane,
    N: tl.constexpr, softplus: tl.constexpr, dual: tl.constexpr, chunk: tl.constexpr,
    b_d: tl.constexpr, b_n: tl.constexpr, b_t: tl.constexpr,
):  # fmt: skip
    """y (R, L, D), final (S, D, N), carries (1 or 2, R, L // chunk, N, D), whose halves lie `plane` apart.

    starts (1 or 2, S, segments, N, D): what comes into each segment; without them the initial state does.
    """
    block, sequence, segment, row, begin, end, lo, hi = _program(
        tl.program_id(0), p_cu, L, packed, segments, per_segment, blocks
    )
    group, o_d, m_d, o_n, m_n, m_h = _places(block, D, G, per_group, N, b_d, b_n)
    set = sequence // per_set
    A = LOG2E * _load(p_A, 0, _state(set, D, N, o_d, o_n), 0, m_h)
    bias = _load(p_bias, set * D, o_d, 0, m_d)
    skip = _load(p_D, set * D, o_d, 0, m_d)
    v_A = LOG2E * _load(p_to_A, 0, _state(set, D, N, o_d, o_n), 0, m_h)
    v_bias = _load(p_to_bias, set * D, o_d, 0, m_d)
    v_skip = _load(p_to_D, set * D, o_d, 0, m_d)
    if p_starts is None:
        h = _load(p_state, 0, _state(sequence, D, N, o_d, o_n), 0, m_h)
        v_h = _load(p_to_state, 0, _state(sequence, D, N, o_d, o_n), 0, m_h)
    else:
        unit = sequence * segments + segment
        used = m_h & ((lo < hi) | (segment == 0))
        h = _load(p_starts, 0, _transposed(unit, N, D, o_d, o_n), 0, used)
        v_h = tl.zeros([b_d, b_n], tl.float32)
        if dual:
            v_h = _load(p_starts, 0, _transposed(S.to(tl.int64) * segments + unit, N, D, o_d, o_n), 0, used)
    p = p_u, p_delta, p_B, p_to_u, p_to_delta, p_to_B
    for c in range(lo, hi, chunk):
        if p_carries is not None:
            index = row * (L // chunk) + begin // chunk + (c - begin) // chunk - 1
            o_carry = _transposed(index, N, _opaque(D, c), o_d, o_n)
            tl.store(p_carries + o_carry, h, mask=m_h & (c > begin))
            if dual:
                tl.store(p_carries + plane + o_carry, v_h, mask=m_h & (c > begin))
        for t in range(c, tl.minimum(c + chunk, hi), b_t):
            t0 = _opaque(t, t)
            left = (hi - t0).to(tl.int32)
            y_at = (row * L + t0) * D
            n_at = ((row * L + t0) * G + group) * N
            at = (
                row * u_r + t0 * u_t, row * delta_r + t0 * delta_t, row * B_r + t0 * B_t + group * B_g,
                y_at, n_at, row * L + t0,
            )  # fmt: skip
            by = u_t, delta_t, B_t, D, G * N, left
            ys = ()  # stored together, so that loads need not wait for stores
            for i in tl.static_range(b_t):
                m = m_d & (i < left)
                m_i = m_n & (i < left)
                C = _load(p_C, row * C_r + t0 * C_t + group * C_g, o_n, i * C_t, m_i)
                _, _, h, v_h, u, v_u, _, _, _, _ = _advance(
                    h, v_h, A, v_A, bias, v_bias, p_reset, p, at, by, i, m, m_i, o_d, o_n, softplus, dual
                )
                y = tl.sum(C[None, :] * h, 1) + skip * u
                if dual:
                    v_C = _load(p_to_C, n_at, o_n, i * (G * N), m_i)
                    v_y = tl.sum(v_C[None, :] * h + C[None, :] * v_h, 1) + v_skip * u + skip * v_u
                if p_z is not None:
                    w, w_slope, _ = _gate(_load(p_z, row * z_r + t0 * z_t, o_d, i * z_t, m))
                    if dual:
                        v_y = v_y * w + y * w_slope * _load(p_to_z, y_at, o_d, i * D, m)
                    y *= w
                ys += (v_y if dual else y,)
            for i in tl.static_range(b_t):
                tl.store(p_y + y_at + o_d + i * D, ys[i], mask=m_d & (i < left))
    if p_final is not None:
        last = (hi == end) & ((lo < hi) | (segment == 0))
        if last:  # as a part of the mask it makes registers spill
            tl.store(p_final + _state(sequence, D, N, o_d, o_n), v_h if dual else h, mask=m_h)


@triton.jit(do_not_specialize=_SIZES)
def _backward(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_state, p_reset, p_cu,
    p_to_u, p_to_delta, p_to_A, p_to_B, p_to_C, p_to_D, p_to_z, p_to_bias, p_to_state,
    p_grad_y, p_grad_final, p_starts, p_carries, p_kept,
    p_grad_u, p_grad_delta, p_grad_A, p_grad_B, p_grad_C, p_grad_D, p_grad_z, p_grad_bias, p_grad_state,
    u_r, u_t, delta_r, delta_t, B_r, B_t, B_g, C_r, C_t, C_g, z_r, z_t, gy_r, gy_t,
    L, D, packed, per_set, S, segments, per_segment, blocks, G, per_group, plane, summed, works,
    N: tl.constexpr, softplus: tl.constexpr, dual: tl.constexpr, chunk: tl.constexpr,
    b_d: tl.constexpr, b_n: tl.constexpr, b_t: tl.constexpr,
):  # fmt: skip
    """Gradients, or with `dual` their tangents.

    grad_u, grad_delta, grad_z (R, L, D); grad_B, grad_C (per_group, R, L, G, N), `summed` elements to a block; grad_A
    (S, segments, N, D), grad_D and grad_bias (S, segments, D); grad_state (S, D, N). carries as _forward wrote them;
    starts: the adjoints that come into each segment from its end; without them grad_final does. kept (programs,
    chunk / b_t, 1 or 2, b_n, b_d) is scratch: the state before every b_t-th step of a chunk. That is why a
    program takes several of the `works` where they are many.
    """
    copies: tl.constexpr = 2 if dual else 1
    p_kept += tl.program_id(0).to(tl.int64) * (chunk // b_t * copies * b_n * b_d)
    o_kept = _hidden(tl.arange(0, b_n))[None, :] * b_d + _hidden(tl.arange(0, b_d))[:, None]
    for work in range(tl.program_id(0), works, tl.num_programs(0)):
        block, sequence, segment, row, begin, _end, lo, hi = _program(
            work, p_cu, L, packed, segments, per_segment, blocks
        )
        group, o_d, m_d, o_n, m_n, m_h = _places(block, D, G, per_group, N, b_d, b_n)
        set = sequence // per_set
        unit = sequence * segments + segment
        unit_ = S.to(tl.int64) * segments + unit
        A = LOG2E * _load(p_A, 0, _state(set, D, N, o_d, o_n), 0, m_h)
        bias = _load(p_bias, set * D, o_d, 0, m_d)
        skip = _load(p_D, set * D, o_d, 0, m_d)
        v_A = LOG2E * _load(p_to_A, 0, _state(set, D, N, o_d, o_n), 0, m_h)
        v_bias = _load(p_to_bias, set * D, o_d, 0, m_d)
        v_skip = _load(p_to_D, set * D, o_d, 0, m_d)
        v_g = tl.zeros([b_d, b_n], tl.float32)
        if p_starts is None:
            g = _load(p_grad_final, 0, _state(sequence, D, N, o_d, o_n), 0, m_h)
        else:
            used = m_h & ((lo < hi) | (segment == 0))
            g = _load(p_starts, 0, _transposed(unit, N, D, o_d, o_n), 0, used)
            if dual:
                v_g = _load(p_starts, 0, _transposed(unit_, N, D, o_d, o_n), 0, used)
        grad_A = tl.zeros([b_d, b_n], tl.float32)
        grad_skip = tl.zeros([b_d], tl.float32)
        grad_bias = tl.zeros([b_d], tl.float32)
        p = p_u, p_delta, p_B, p_to_u, p_to_delta, p_to_B
        chunks = tl.cdiv(hi - lo, chunk)
        for done in range(0, chunks):
            c = _opaque(lo + (chunks - 1 - done) * chunk, done)
            c_end = tl.minimum(c + chunk, hi)
            D_ = _opaque(D, done)
            o_carry = _transposed(row * (L // chunk) + begin // chunk + (c - begin) // chunk - 1, N, D_, o_d, o_n)
            o_state = _state(_opaque(sequence, done), D_, N, o_d, o_n)
            h = _load(p_state, 0, o_state, 0, m_h & (c == begin))
            h += _load(p_carries, 0, o_carry, 0, m_h & (c > begin))
            v_h = tl.zeros([b_d, b_n], tl.float32)
            if dual:
                v_h = _load(p_to_state, 0, o_state, 0, m_h & (c == begin))
                v_h += _load(p_carries, plane, o_carry, 0, m_h & (c > begin))
            tl.debug_barrier()  # the chunk before this one has been read
            for t in range(c, c_end, b_t):
                t0 = _opaque(t, t)
                slot = (t0 - c) // b_t
                tl.store(p_kept + slot * (copies * b_n * b_d) + o_kept, h)
                if dual:
                    tl.store(p_kept + slot * (copies * b_n * b_d) + b_n * b_d + o_kept, v_h)
                left = (c_end - t0).to(tl.int32)
                at = (
                    row * u_r + t0 * u_t, row * delta_r + t0 * delta_t, row * B_r + t0 * B_t + group * B_g,
                    (row * L + t0) * D, ((row * L + t0) * G + group) * N, row * L + t0,
                )  # fmt: skip
                by = u_t, delta_t, B_t, D, G * N, left
                for i in tl.static_range(b_t):
                    m = m_d & (i < left)
                    m_i = m_n & (i < left)
                    _, _, h, v_h, _, _, _, _, _, _ = _advance(
                        h, v_h, A, v_A, bias, v_bias, p_reset, p, at, by, i, m, m_i, o_d, o_n, softplus, dual
                    )
            tl.debug_barrier()  # what one thread kept, another may read
            for back in range(0, tl.cdiv(c_end - c, b_t)):
                slot = _opaque(tl.cdiv(c_end - c, b_t) - 1 - back, back)
                h = tl.load(p_kept + slot * (copies * b_n * b_d) + o_kept)
                v_h = tl.zeros([b_d, b_n], tl.float32)
                if dual:
                    v_h = tl.load(p_kept + slot * (copies * b_n * b_d) + b_n * b_d + o_kept)
                t0 = c + slot * b_t
                left = (c_end - t0).to(tl.int32)
                y_at = (row * L + t0) * D
                n_at = ((row * L + t0) * G + group) * N
                at = (
                    row * u_r + t0 * u_t, row * delta_r + t0 * delta_t, row * B_r + t0 * B_t + group * B_g,
                    y_at, n_at, row * L + t0,
                )  # fmt: skip
                by = u_t, delta_t, B_t, D, G * N, left
                before, v_before, after, v_after = (), (), (), ()  # states around each of b_t steps
                us, v_us, dts, v_dts, slopes, v_slopes = (), (), (), (), (), ()
                for i in tl.static_range(b_t):
                    m = m_d & (i < left)
                    m_i = m_n & (i < left)
                    h, v_h, h_after, v_h_after, u, v_u, dt, v_dt, slope, v_slope = _advance(
                        h, v_h, A, v_A, bias, v_bias, p_reset, p, at, by, i, m, m_i, o_d, o_n, softplus, dual
                    )
                    before += (h,)
                    v_before += (v_h,)
                    h, v_h = h_after, v_h_after
                    after += (h,)
                    v_after += (v_h,)
                    us += (u,)
                    v_us += (v_u,)
                    dts += (dt,)
                    v_dts += (v_dt,)
                    slopes += (slope,)
                    v_slopes += (v_slope,)
                grads_u, grads_delta, grads_z, grads_B, grads_C = (), (), (), (), ()  # stored together, as in _forward
                for i in tl.static_range(b_t - 1, -1, -1):
                    m = m_d & (i < left)
                    m_i = m_n & (i < left)
                    u, dt, h, h_before = us[i], dts[i], after[i], before[i]
                    x = dt * u
                    B = _load(p_B, at[2], o_n, i * B_t, m_i)
                    C = _load(p_C, row * C_r + t0 * C_t + group * C_g, o_n, i * C_t, m_i)
                    gp = _load(p_grad_y, row * gy_r + t0 * gy_t, o_d, i * gy_t, m)  # adjoint of the sum over n
                    v_gp = tl.zeros([b_d], tl.float32)
                    if dual:
                        v_u, v_dt, v_h, v_h_before = v_us[i], v_dts[i], v_after[i], v_before[i]
                        v_x = v_dt * u + dt * v_u
                        v_B = _load(p_to_B, n_at, o_n, i * (G * N), m_i)
                        v_C = _load(p_to_C, n_at, o_n, i * (G * N), m_i)
                    if p_z is not None:
                        w, w_slope, w_curve = _gate(_load(p_z, row * z_r + t0 * z_t, o_d, i * z_t, m))
                        y = tl.sum(C[None, :] * h, 1) + skip * u
                        grad_z = gp * y * w_slope
                        if dual:
                            v_z = _load(p_to_z, y_at, o_d, i * D, m)
                            v_y = tl.sum(v_C[None, :] * h + C[None, :] * v_h, 1) + v_skip * u + skip * v_u
                            grad_z = gp * (v_y * w_slope + y * w_curve * v_z)
                            v_gp = gp * w_slope * v_z
                        gp *= w
                        grads_z += (grad_z,)
                    a = tl.exp2(dt[:, None] * A)
                    g += C[None, :] * gp[:, None]
                    along_B = tl.sum(g * B[None, :], 1)
                    q = g * a * h_before
                    along_A = LN2 * tl.sum(A * q, 1)
                    if dual:
                        exponent = _exponent(A, v_A, dt, v_dt)
                        v_g += v_C[None, :] * gp[:, None] + C[None, :] * v_gp[:, None]
                        v_along_B = tl.sum(v_g * B[None, :] + g * v_B[None, :], 1)
                        v_q = a * (v_g * h_before + g * (v_h_before + exponent * h_before))
                        v_along_A = LN2 * tl.sum(v_A * q + A * v_q, 1)
                        onto_B = v_g * x[:, None] + g * v_x[:, None]
                        onto_C = v_gp[:, None] * h + gp[:, None] * v_h
                        grad_u = v_gp * skip + gp * v_skip + v_dt * along_B + dt * v_along_B
                        grad_delta = (v_u * along_B + u * v_along_B + v_along_A) * slopes[i]
                        grad_delta += (u * along_B + along_A) * v_slopes[i]
                        grad_A += v_dt[:, None] * q + dt[:, None] * v_q
                        grad_skip += v_gp * u + gp * v_u
                        v_g = a * (v_g + exponent * g)
                    else:
                        onto_B = g * x[:, None]
                        onto_C = gp[:, None] * h
                        grad_u = gp * skip + dt * along_B
                        grad_delta = (u * along_B + along_A) * slopes[i]
                        grad_A += dt[:, None] * q
                        grad_skip += gp * u
                    grad_delta = tl.where(m, grad_delta, 0.0)
                    grad_bias += grad_delta
                    grads_u += (grad_u,)
                    grads_delta += (grad_delta,)
                    grads_B += (tl.sum(onto_B, 0),)
                    grads_C += (tl.sum(onto_C, 0),)
                    g, v_g = _drop(a * g, v_g, p_reset, row * L + t0 + i, i < left)
                for j in tl.static_range(b_t):
                    i = b_t - 1 - j
                    m = m_d & (i < left)
                    tl.store(p_grad_u + y_at + o_d + i * D, grads_u[j], mask=m)
                    tl.store(p_grad_delta + y_at + o_d + i * D, grads_delta[j], mask=m)
                    if p_z is not None:
                        tl.store(p_grad_z + y_at + o_d + i * D, grads_z[j], mask=m)
                    at_block = block % per_group * summed.to(tl.int64) + n_at
                    tl.store(p_grad_B + at_block + o_n + i * (G * N), grads_B[j], mask=m_n & (i < left))
                    tl.store(p_grad_C + at_block + o_n + i * (G * N), grads_C[j], mask=m_n & (i < left))
        tl.store(p_grad_A + _transposed(unit, N, D, o_d, o_n), grad_A, mask=m_h)
        if p_grad_D is not None:
            tl.store(p_grad_D + unit * D + o_d, grad_skip, mask=m_d)
        if p_grad_bias is not None:
            tl.store(p_grad_bias + unit * D + o_d, grad_bias, mask=m_d)
        if p_grad_state is not None:
            tl.store(p_grad_state + _state(sequence, D, N, o_d, o_n), v_g if dual else g, mask=m_h & (segment == 0))


@triton.jit(do_not_specialize=["blocks", "G"])
def _step(
    p_state, p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_y,
    u_r, delta_r, B_r, B_g, C_r, C_g, z_r,
    D, G, blocks,
    N: tl.constexpr, softplus: tl.constexpr, b_d: tl.constexpr, b_n: tl.constexpr,
):  # fmt: skip
    """state (R, D, N) in place, y (R, D): one row and a block of channels, the lanes along n, as the state lies."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    o_d = tl.program_id(0) % blocks * b_d + tl.arange(0, b_d)
    o_n = tl.arange(0, b_n)
    m_d = o_d < D
    m_h = m_d[:, None] & (o_n < N)[None, :]
    group = (o_d // (D // G)).to(tl.int64)
    o_h = o_d[:, None] * N + o_n[None, :]
    u = _load(p_u, row * u_r, o_d, 0, m_d)
    x = _load(p_delta, row * delta_r, o_d, 0, m_d) + _load(p_bias, row * 0, o_d, 0, m_d)
    dt, _, _, _ = _time_step(x, x, m_d, softplus)
    A = LOG2E * _load(p_A, row * 0, o_h, 0, m_h)
    B = _load(p_B, row * B_r, group[:, None] * B_g + o_n[None, :], 0, m_h)
    C = _load(p_C, row * C_r, group[:, None] * C_g + o_n[None, :], 0, m_h)
    h = _load(p_state, row * D * N, o_h, 0, m_h)
    h = tl.exp2(dt[:, None] * A) * h + (dt * u)[:, None] * B
    y = tl.sum(C * h, 1) + _load(p_D, row * 0, o_d, 0, m_d) * u
    if p_z is not None:
        w, _, _ = _gate(_load(p_z, row * z_r, o_d, 0, m_d))
        y *= w
    tl.store(p_state + row * D * N + o_h, h, mask=m_h)
    tl.store(p_y + row * D + o_d, y, mask=m_d)

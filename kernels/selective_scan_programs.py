"""Triton programs of selective_scan, which selective_scan.py launches. Derivation: docs/ops/selective_scan.md.

A program takes one time segment of one sequence and a block of its channels, one warp as a rule, and keeps their states
[b_d, b_n] in registers. The lanes lie along the channels first and along n with what is left: with 32 channels the sums
over n stay inside a thread. The channels of a block share their B and C. Pieces: selective_scan_pieces.py.

    _local     what a segment does to a state of zero, and the sum of its dt, by which it decays one that comes in
    _carry     from these, the state that comes into each segment; one program for some elements of the state
    _forward   a segment from the state that comes in: y, the final state, the states that a backward starts from
    _backward  chunk by chunk from the last: the states again from the one that was kept, then the gradients; it is in
               selective_scan_backward.py
    _step      one step of decoding

`_local` and `_carry` run only where sequences and channels alone do not fill the GPU; with `adjoint` they run against
time, on the adjoint of the state. With `dual` every kernel carries the tangent v_x of each x along given directions,
and its results are the tangents of y, of the final state, and of the gradients.

exp(dt A) is exp2 with A scaled by log2(e). Steps are taken b_t at a time, and a block of them is loaded while the one
before is computed (in `_backward` with `ahead`), so that a lone warp need not wait; B and C of a block go from a few
lanes to all through shared memory, once. `_local` and `_forward` take singly what is left at the end; in `_backward`
steps past it have dt = u = 0, which leave a state as it is. Gradients of B and C are summed over the channels of a
program, those of the parameters over its steps, and both over programs by torch, in a fixed order: no atomics, two runs
give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastmem.kernels.selective_scan_pieces import (
    LN2,
    LOG2E,
    SIZES,
    _advance,
    _drop,
    _exponent,
    _fetch,
    _gate,
    _hidden,
    _load,
    _opaque,
    _places,
    _state,
    _steps,
    _time_step,
    _transposed,
    _unit,
)


@triton.jit
def _local_steps(
    state, done, end, lo, hi, parameters, p, p_to, streams, p_z, p_reset, places,
    n: tl.constexpr, softplus: tl.constexpr, adjoint: tl.constexpr, dual: tl.constexpr,
):  # fmt: skip
    """Steps [done, end) of a segment, n at a time, each loaded while those before it are computed."""
    h, v_h, total, v_total, any_dropped = state
    A, v_A, bias, v_bias = parameters
    m_d = places[2]
    sign: tl.constexpr = -1 if adjoint else 1
    along_d: tl.constexpr = 3 if adjoint else 2
    first = hi - 1 if adjoint else lo
    next = _fetch(p, p_to, streams, p_reset, first + sign * done, end - done, n, sign, places, along_d, dual)
    for at in range(done, end, n):
        tiles, v_tiles, resets = next
        t = _opaque(first + sign * tl.minimum(at + n, end - n), at)
        next = _fetch(p, p_to, streams, p_reset, t, n, n, sign, places, along_d, dual)
        x = _steps(tiles)
        v_x = _steps(v_tiles) if dual else x
        for i in tl.static_range(n):
            delta, v_delta = x[0][i], v_x[0][i]
            if adjoint:
                dt, v_dt, _, _ = _time_step(delta + bias, v_delta + v_bias, m_d, softplus)
                gp, C = x[1][i], x[3][i]
                if p_z is not None:
                    w, w_slope, _ = _gate(x[2][i])
                    v_gp = gp * w_slope * v_x[2][i]
                    gp *= w
                h += C[None, :] * gp[:, None]
                a = tl.exp2(dt[:, None] * A)
                if dual:
                    v_h += v_x[3][i][None, :] * gp[:, None]
                    if p_z is not None:
                        v_h += C[None, :] * v_gp[:, None]
                    v_h = a * (v_h + _exponent(A, v_A, dt, v_dt) * h)
                h, v_h = _drop(a * h, v_h, resets, i)
            else:
                _, _, h, v_h, dt, v_dt, _, _ = _advance(
                    h, v_h, A, v_A, bias, v_bias, x[1][i], delta, x[2][i], v_x[1][i], v_delta, v_x[2][i], resets, i,
                    m_d, softplus, dual,
                )  # fmt: skip
            total += dt
            if dual:
                v_total += v_dt
            if p_reset is not None:
                any_dropped |= resets[i].to(tl.int32)
    return h, v_h, total, v_total, any_dropped


@triton.jit(do_not_specialize=SIZES)
def _local(
    p_u, p_delta, p_A, p_B, p_C, p_z, p_bias, p_reset, p_cu, p_grad_y,
    p_to_u, p_to_delta, p_to_A, p_to_B, p_to_C, p_to_z, p_to_bias,
    p_ends, p_sums, p_dropped,
    u_r, u_t, delta_r, delta_t, B_r, B_t, B_g, C_r, C_t, C_g, z_r, z_t, a_d, a_n, gy_r, gy_t,
    L, D, packed, per_set, S, segments, per_segment, blocks, G, per_group,
    N: tl.constexpr, softplus: tl.constexpr, adjoint: tl.constexpr, dual: tl.constexpr,
    b_d: tl.constexpr, b_n: tl.constexpr, b_t: tl.constexpr,
):  # fmt: skip
    """ends (1 or 2, S, segments, N, D), sums (1 or 2, S, segments, D), dropped (S, segments).

    Of the last segment (with `adjoint` the first) nobody needs the end.
    """
    block = tl.program_id(0) % blocks
    unit = (tl.program_id(0) // blocks).to(tl.int64)
    sequence, segment, row, _begin, end, lo, hi = _unit(unit, p_cu, L, packed, segments, per_segment)
    needed = (segment > 0) & (lo < hi) if adjoint else hi < end
    if needed:
        group, o_d, m_d, o_n, m_n, m_h = _places(block, D, G, per_group, N, b_d, b_n)
        set = sequence // per_set
        o_A = (o_d * a_d)[:, None] + (_hidden(o_n) * a_n)[None, :]
        A = LOG2E * _load(p_A, set * D * N, o_A, 0, m_h)
        bias = _load(p_bias, set * D, o_d, 0, m_d)
        v_A = LOG2E * _load(p_to_A, set * D * N, o_A, 0, m_h)
        v_bias = _load(p_to_bias, set * D, o_d, 0, m_d)
        h = tl.zeros([b_d, b_n], tl.float32)
        v_h = tl.zeros([b_d, b_n], tl.float32)
        total = tl.zeros([b_d], tl.float32)
        v_total = tl.zeros([b_d], tl.float32)
        any_dropped = tl.zeros([1], tl.int32)
        if adjoint:
            p, p_to = (p_delta, p_grad_y, p_z, p_C), (p_to_delta, None, p_to_z, p_to_C)
            at = row * delta_r, row * gy_r, row * z_r, row * C_r + group * C_g
            by = delta_t, gy_t, z_t, C_t
        else:
            p, p_to = (p_delta, p_u, p_B), (p_to_delta, p_to_u, p_to_B)
            at = row * delta_r, row * u_r, row * B_r + group * B_g
            by = delta_t, u_t, B_t
        streams = at, by, row * L * D, D, (row * L * G + group) * N, G * N, row * L
        full = (hi - lo) // b_t * b_t
        state = h, v_h, total, v_total, any_dropped
        parameters = A, v_A, bias, v_bias
        places = o_d, o_n, m_d, m_n
        state = _local_steps(
            state, 0, full, lo, hi, parameters, p, p_to, streams, p_z, p_reset, places, b_t, softplus, adjoint, dual
        )
        if b_t > 1:
            state = _local_steps(
                state, full, hi - lo, lo, hi, parameters, p, p_to, streams, p_z, p_reset, places,
                1, softplus, adjoint, dual,
            )  # fmt: skip
        h, v_h, total, v_total, any_dropped = state
        tl.store(p_ends + _transposed(unit, N, D, o_d, o_n), h, mask=m_h)
        tl.store(p_sums + unit * D + o_d, total, mask=m_d)
        if dual:
            unit_ = S.to(tl.int64) * segments + unit
            tl.store(p_ends + _transposed(unit_, N, D, o_d, o_n), v_h, mask=m_h)
            tl.store(p_sums + unit_ * D + o_d, v_total, mask=m_d)
        if block == 0:
            tl.store(p_dropped + unit + tl.arange(0, 1), any_dropped.to(tl.int8))


@triton.jit
def _decayed(a, h):
    """a h, 0 where h is: a segment's decay may overflow where those of its steps do not."""
    return tl.where((h == 0) & (a == float("inf")), 0.0, a * h)


@triton.jit(do_not_specialize=SIZES)
def _carry(
    p_ends, p_sums, p_dropped, p_A, p_to_A, p_first, p_to_first, p_cu,
    L, D, packed, per_set, S, segments, per_segment, blocks,
    N: tl.constexpr, adjoint: tl.constexpr, dual: tl.constexpr, b: tl.constexpr, b_t: tl.constexpr,
):  # fmt: skip
    """ends: each segment's own end becomes the state that comes into it; `first` (S, D, N) is what comes first."""
    block = tl.program_id(0) % blocks
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    _, _, _, begin, end, _, _ = _unit(sequence, p_cu, L, packed, 1, L)
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
                v_h = _decayed(a, v_h + LN2 * (v_sums[i] * A + sums[i] * v_A) * h)
                v_h = tl.where(drops[i], 0.0, v_h) + v_ends[i]
            h = tl.where(drops[i], 0.0, _decayed(a, h)) + ends[i]


@triton.jit
def _forward_steps(
    h, v_h, lo, hi, parameters, p, p_to, streams, p_z, p_reset, p_y, places, carries, D, N: tl.constexpr,
    chunk: tl.constexpr, n: tl.constexpr, softplus: tl.constexpr, dual: tl.constexpr,
):  # fmt: skip
    """Steps [lo, hi), n at a time, each loaded while those before it are computed."""
    A, v_A, bias, v_bias, skip, v_skip = parameters
    o_d, o_n, m_d, m_n = places
    m_h = m_d[:, None] & m_n[None, :]
    p_carries, first_carry, plane, begin = carries
    y_at = streams[2]
    next = _fetch(p, p_to, streams, p_reset, lo, hi - lo, n, 1, places, 3, dual)
    for c in range(lo, hi, chunk):
        if p_carries is not None:
            o_carry = _transposed(first_carry + (c - begin) // chunk, N, _opaque(D, c), o_d, o_n)
            kept = m_h & (c > begin) & ((c - begin) % chunk == 0)
            tl.store(p_carries + o_carry, h, mask=kept)
            if dual:
                tl.store(p_carries + plane + o_carry, v_h, mask=kept)
        for t in range(c, tl.minimum(c + chunk, hi), n):
            tiles, v_tiles, resets = next
            ahead = _opaque(tl.minimum(t + n, hi - n), t)
            next = _fetch(p, p_to, streams, p_reset, ahead, n, n, 1, places, 3, dual)
            us, deltas, zs, Bs, Cs = _steps(tiles)
            v_us, v_deltas, v_zs, v_Bs, v_Cs = _steps(v_tiles if dual else tiles)
            ys = ()
            for i in tl.static_range(n):
                u, v_u, C, v_C = us[i], v_us[i], Cs[i], v_Cs[i]
                _, _, h, v_h, _, _, _, _ = _advance(
                    h, v_h, A, v_A, bias, v_bias, u, deltas[i], Bs[i], v_u, v_deltas[i], v_Bs[i], resets, i, m_d,
                    softplus, dual,
                )  # fmt: skip
                y = tl.sum(C[None, :] * h, 1) + skip * u
                if dual:
                    v_y = tl.sum(v_C[None, :] * h + C[None, :] * v_h, 1) + v_skip * u + skip * v_u
                if p_z is not None:
                    w, w_slope, _ = _gate(zs[i])
                    if dual:
                        v_y = v_y * w + y * w_slope * v_zs[i]
                    y *= w
                ys += (v_y if dual else y,)
            y_t = y_at + _opaque(t, t) * D
            for i in tl.static_range(n):
                tl.store(p_y + y_t + o_d + i * D, ys[i], mask=m_d)
    return h, v_h


@triton.jit(do_not_specialize=SIZES)
def _forward(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_state, p_reset, p_cu,
    p_to_u, p_to_delta, p_to_A, p_to_B, p_to_C, p_to_D, p_to_z, p_to_bias, p_to_state,
    p_starts, p_y, p_final, p_carries,
    u_r, u_t, delta_r, delta_t, B_r, B_t, B_g, C_r, C_t, C_g, z_r, z_t, a_d, a_n,
    L, D, packed, per_set, S, segments, per_segment, blocks, G, per_group, plane,
    N: tl.constexpr, softplus: tl.constexpr, dual: tl.constexpr, chunk: tl.constexpr,
    b_d: tl.constexpr, b_n: tl.constexpr, b_t: tl.constexpr,
):  # fmt: skip
    """y (R, L, D), final (S, D, N), carries (1 or 2, R, L // chunk, N, D), whose halves lie `plane` apart.

    starts (1 or 2, S, segments, N, D): what comes into each segment; without them the initial state does.
    """
    block = tl.program_id(0) % blocks
    unit = (tl.program_id(0) // blocks).to(tl.int64)
    sequence, segment, row, begin, end, lo, hi = _unit(unit, p_cu, L, packed, segments, per_segment)
    group, o_d, m_d, o_n, m_n, m_h = _places(block, D, G, per_group, N, b_d, b_n)
    set = sequence // per_set
    o_A = (o_d * a_d)[:, None] + (_hidden(o_n) * a_n)[None, :]
    A = LOG2E * _load(p_A, set * D * N, o_A, 0, m_h)
    bias = _load(p_bias, set * D, o_d, 0, m_d)
    skip = _load(p_D, set * D, o_d, 0, m_d)
    v_A = LOG2E * _load(p_to_A, set * D * N, o_A, 0, m_h)
    v_bias = _load(p_to_bias, set * D, o_d, 0, m_d)
    v_skip = _load(p_to_D, set * D, o_d, 0, m_d)
    if p_starts is None:
        h = _load(p_state, 0, _state(sequence, D, N, o_d, o_n), 0, m_h)
        v_h = _load(p_to_state, 0, _state(sequence, D, N, o_d, o_n), 0, m_h)
    else:
        used = m_h & ((lo < hi) | (segment == 0))
        h = _load(p_starts, 0, _transposed(unit, N, D, o_d, o_n), 0, used)
        v_h = tl.zeros([b_d, b_n], tl.float32)
        if dual:
            v_h = _load(p_starts, 0, _transposed(S.to(tl.int64) * segments + unit, N, D, o_d, o_n), 0, used)
    p = p_u, p_delta, p_z, p_B, p_C
    p_to = p_to_u, p_to_delta, p_to_z, p_to_B, p_to_C
    at = row * u_r, row * delta_r, row * z_r, row * B_r + group * B_g, row * C_r + group * C_g
    by = u_t, delta_t, z_t, B_t, C_t
    streams = at, by, row * L * D, D, (row * L * G + group) * N, G * N, row * L
    tl.static_assert(chunk % b_t == 0)
    parameters = A, v_A, bias, v_bias, skip, v_skip
    places = o_d, o_n, m_d, m_n
    carries = p_carries, row * (L // chunk) + begin // chunk - 1, plane, begin
    full = lo + (hi - lo) // b_t * b_t
    h, v_h = _forward_steps(
        h, v_h, lo, full, parameters, p, p_to, streams, p_z, p_reset, p_y, places, carries, D, N, chunk,
        b_t, softplus, dual,
    )  # fmt: skip
    if b_t > 1:
        h, v_h = _forward_steps(
            h, v_h, full, hi, parameters, p, p_to, streams, p_z, p_reset, p_y, places, carries, D, N, chunk,
            1, softplus, dual,
        )  # fmt: skip
    if p_final is not None:
        last = (hi == end) & ((lo < hi) | (segment == 0))
        if last:  # as a part of the mask it makes registers spill
            tl.store(p_final + _state(sequence, D, N, o_d, o_n), v_h if dual else h, mask=m_h)


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

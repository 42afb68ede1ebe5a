"""The backward program of selective_scan; selective_scan_programs.py says how it lies in registers."""

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
    _transposed,
    _unit,
)


@triton.jit(do_not_specialize=SIZES)
def _backward(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_state, p_reset, p_cu,
    p_to_u, p_to_delta, p_to_A, p_to_B, p_to_C, p_to_D, p_to_z, p_to_bias, p_to_state,
    p_grad_y, p_grad_final, p_starts, p_carries, p_kept,
    p_grad_u, p_grad_delta, p_grad_A, p_grad_B, p_grad_C, p_grad_D, p_grad_z, p_grad_bias, p_grad_state,
    u_r, u_t, delta_r, delta_t, B_r, B_t, B_g, C_r, C_t, C_g, z_r, z_t, gy_r, gy_t,
    L, D, packed, per_set, S, segments, per_segment, blocks, G, per_group, plane, summed, teams, a_set,
    N: tl.constexpr, softplus: tl.constexpr, dual: tl.constexpr, chunk: tl.constexpr,
    b_d: tl.constexpr, b_n: tl.constexpr, b_t: tl.constexpr, ahead: tl.constexpr,
):  # fmt: skip
    """Gradients, or with `dual` their tangents.

    grad_u, grad_delta, grad_z (R, L, D); grad_B, grad_C (per_group, R, L, G, N), `summed` elements to a block; grad_A
    (teams, N, D), grad_D and grad_bias (teams, D); grad_state (S, D, N). carries as _forward wrote them; starts: the
    adjoints that come into each segment from its end; without them grad_final does. kept (programs, chunk / b_t, 1 or
    2, b_n, b_d) is scratch: the state before every b_t-th step of a chunk.

    Where there are more segments than programs, a team, `a_set` of them to a set of parameters, takes every a_set-th
    segment of its set, and where there are more teams, a program takes several, all for one block of channels.
    """
    copies: tl.constexpr = 2 if dual else 1
    p_kept += tl.program_id(0).to(tl.int64) * (chunk // b_t * copies * b_n * b_d)
    o_kept = _hidden(tl.arange(0, b_n))[None, :] * b_d + _hidden(tl.arange(0, b_d))[:, None]
    block = tl.program_id(0) % blocks
    group, o_d, m_d, o_n, m_n, m_h = _places(block, D, G, per_group, N, b_d, b_n)
    for team_ in range(tl.program_id(0) // blocks, teams, tl.num_programs(0) // blocks):
        team = tl.cast(team_, tl.int64)
        set = team // a_set
        A = LOG2E * _load(p_A, 0, _state(set, D, N, o_d, o_n), 0, m_h)
        bias = _load(p_bias, set * D, o_d, 0, m_d)
        skip = _load(p_D, set * D, o_d, 0, m_d)
        v_A = LOG2E * _load(p_to_A, 0, _state(set, D, N, o_d, o_n), 0, m_h)
        v_bias = _load(p_to_bias, set * D, o_d, 0, m_d)
        v_skip = _load(p_to_D, set * D, o_d, 0, m_d)
        grad_A = tl.zeros([b_d, b_n], tl.float32)
        grad_skip = tl.zeros([b_d], tl.float32)
        grad_bias = tl.zeros([b_d], tl.float32)
        for unit in range(set * per_set * segments + team % a_set, (set + 1) * per_set * segments, a_set):
            sequence, segment, row, begin, _end, lo, hi = _unit(unit, p_cu, L, packed, segments, per_segment)
            unit_ = S.to(tl.int64) * segments + unit
            v_g = tl.zeros([b_d, b_n], tl.float32)
            if p_starts is None:
                g = _load(p_grad_final, 0, _state(sequence, D, N, o_d, o_n), 0, m_h)
            else:
                used = m_h & ((lo < hi) | (segment == 0))
                g = _load(p_starts, 0, _transposed(unit, N, D, o_d, o_n), 0, used)
                if dual:
                    v_g = _load(p_starts, 0, _transposed(unit_, N, D, o_d, o_n), 0, used)
            at_u, at_delta, at_B = row * u_r, row * delta_r, row * B_r + group * B_g
            at_y, at_n, by_n, step = row * L * D, (row * L * G + group) * N, G * N, row * L
            p, p_to = (p_u, p_delta, p_B), (p_to_u, p_to_delta, p_to_B)
            streams = (at_u, at_delta, at_B), (u_t, delta_t, B_t), at_y, D, at_n, by_n, step
            p_all, p_to_all = (
                (p_u, p_delta, p_z, p_grad_y, p_B, p_C),
                (p_to_u, p_to_delta, p_to_z, None, p_to_B, p_to_C),
            )
            at_all = at_u, at_delta, row * z_r, row * gy_r, at_B, row * C_r + group * C_g
            streams_all = at_all, (u_t, delta_t, z_t, gy_t, B_t, C_t), at_y, D, at_n, by_n, step
            places = o_d, o_n, m_d, m_n
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
                last = c + (c_end - 1 - c) // b_t * b_t  # where the last block of steps starts
                if ahead:
                    next = _fetch(p, p_to, streams, p_reset, c, c_end - c, b_t, 1, places, 2, dual)
                for t in range(c, c_end, b_t):
                    t0 = _opaque(t, t)
                    slot = (t0 - c) // b_t
                    tl.store(p_kept + slot * (copies * b_n * b_d) + o_kept, h)
                    if dual:
                        tl.store(p_kept + slot * (copies * b_n * b_d) + b_n * b_d + o_kept, v_h)
                    if ahead:
                        tiles, v_tiles, resets = next
                    t1 = tl.minimum(t0 + b_t, last) if ahead else t0
                    next = _fetch(p, p_to, streams, p_reset, t1, c_end - t1, b_t, 1, places, 2, dual)
                    if not ahead:
                        tiles, v_tiles, resets = next
                    us, deltas, Bs = _steps(tiles)
                    v_us, v_deltas, v_Bs = _steps(v_tiles if dual else tiles)
                    for i in tl.static_range(b_t):
                        m = m_d & (i < c_end - t0)
                        _, _, h, v_h, _, _, _, _ = _advance(
                            h, v_h, A, v_A, bias, v_bias, us[i], deltas[i], Bs[i], v_us[i], v_deltas[i], v_Bs[i],
                            resets, i, m, softplus, dual,
                        )  # fmt: skip
                tl.debug_barrier()  # what one thread kept, another may read
                if ahead:
                    next_all = _fetch(
                        p_all, p_to_all, streams_all, p_reset, last, c_end - last, b_t, 1, places, 4, dual
                    )
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
                    if ahead:
                        tiles, v_tiles, resets = next_all
                    t1 = tl.maximum(t0 - b_t, c) if ahead else t0
                    next_all = _fetch(
                        p_all, p_to_all, streams_all, p_reset, t1, (c_end - t1).to(tl.int32), b_t, 1, places, 4, dual
                    )
                    if not ahead:
                        tiles, v_tiles, resets = next_all
                    us, deltas, zs, grads_y, Bs, Cs = _steps(tiles)
                    v_us, v_deltas, v_zs, _, v_Bs, v_Cs = _steps(v_tiles if dual else tiles)
                    before, v_before, after, v_after = (), (), (), ()  # states around each of b_t steps
                    dts, v_dts, slopes, v_slopes = (), (), (), ()
                    for i in tl.static_range(b_t):
                        h, v_h, h_after, v_h_after, dt, v_dt, slope, v_slope = _advance(
                            h, v_h, A, v_A, bias, v_bias, us[i], deltas[i], Bs[i], v_us[i], v_deltas[i], v_Bs[i],
                            resets, i, m_d & (i < left), softplus, dual,
                        )  # fmt: skip
                        before += (h,)
                        v_before += (v_h,)
                        h, v_h = h_after, v_h_after
                        after += (h,)
                        v_after += (v_h,)
                        dts += (dt,)
                        v_dts += (v_dt,)
                        slopes += (slope,)
                        v_slopes += (v_slope,)
                    grads_u, grads_delta, grads_z = (), (), ()  # stored together, as in _forward
                    grads_B, grads_C = (), ()
                    for i in tl.static_range(b_t - 1, -1, -1):
                        m = m_d & (i < left)
                        u, dt, h, h_before = us[i], dts[i], after[i], before[i]
                        x = dt * u
                        B, C = Bs[i], Cs[i]
                        gp = grads_y[i]  # adjoint of the sum over n
                        v_gp = tl.zeros([b_d], tl.float32)
                        if dual:
                            v_u, v_dt, v_h, v_h_before = v_us[i], v_dts[i], v_after[i], v_before[i]
                            v_x = v_dt * u + dt * v_u
                            v_B, v_C = v_Bs[i], v_Cs[i]
                        if p_z is not None:
                            w, w_slope, w_curve = _gate(zs[i])
                            y = tl.sum(C[None, :] * h, 1) + skip * u
                            grad_z = gp * y * w_slope
                            if dual:
                                v_z = v_zs[i]
                                v_y = tl.sum(v_C[None, :] * h + C[None, :] * v_h, 1) + v_skip * u + skip * v_u
                                grad_z = gp * (v_y * w_slope + y * w_curve * v_z)
                                v_gp = gp * w_slope * v_z
                            gp *= w
                            grads_z += (grad_z,)
                        a = tl.exp2(dt[:, None] * A)
                        if i > 0:  # past the end dt = 0, and times 0 what is not finite would not vanish
                            a = tl.where(i < left, a, 1.0)
                            h = tl.where(i < left, h, 0.0)
                            h_before = tl.where(i < left, h_before, 0.0)
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
                        g, v_g = _drop(a * g, v_g, resets, i)
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
            if p_grad_state is not None:
                tl.store(p_grad_state + _state(sequence, D, N, o_d, o_n), v_g if dual else g, mask=m_h & (segment == 0))
        tl.store(p_grad_A + _transposed(team, N, D, o_d, o_n), grad_A, mask=m_h)
        if p_grad_D is not None:
            tl.store(p_grad_D + team * D + o_d, grad_skip, mask=m_d)
        if p_grad_bias is not None:
            tl.store(p_grad_bias + team * D + o_d, grad_bias, mask=m_d)

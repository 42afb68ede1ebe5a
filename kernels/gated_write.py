"""gated_write on a GPU: the rule stands in docs/ops/gated_write.md.

`_forward` runs one program per memory over all its tokens, since each token sees the writes before it. Every token
reads the bank once, from L2 where it fits.
`_replay` applies decisions that are already made, or their transpose, to columns on their own; no atomics anywhere.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from fastmem.kernels._device import on
from torch import Tensor

FORWARD_CONFIG = {"b_s": 16, "b_e": 256, "num_warps": 8}
REPLAY_CONFIG = {"b_c": 128, "num_warps": 1}
STRENGTH_CONFIG = {"b_s": 1024, "num_warps": 4}


@triton.jit
def _inverse_length(p_row, n, b_e: tl.constexpr):
    """1 / |row|, 0 for a zero row, nan for one that is not finite; scaled, so that squares do not overflow."""
    o = tl.arange(0, b_e)
    largest = tl.zeros([b_e], p_row.dtype.element_ty)
    spoiled = tl.zeros([b_e], p_row.dtype.element_ty)
    for e in range(0, n, b_e):
        x = tl.load(p_row + e + o, mask=e + o < n, other=0.0)
        spoiled += x - x  # 0 or nan
        largest = tl.maximum(largest, tl.abs(x))
    top = tl.max(largest, 0)
    scale = tl.where(top > 0, top, 1.0)
    squares = tl.zeros([b_e], p_row.dtype.element_ty)
    for e in range(0, n, b_e):
        x = tl.load(p_row + e + o, mask=e + o < n, other=0.0) / scale
        squares += x * x
    length = scale * tl.sqrt(tl.sum(squares, 0))
    return tl.where(top > 0, 1 / length, 0.0) + tl.sum(spoiled, 0)


@triton.jit
def _blend_row(p_row, p_token, n, a, b_e: tl.constexpr):
    """row <- (1 - a) row + a token; with a = 1 what was there does not matter, not even nan."""
    o = tl.arange(0, b_e)
    for e in range(0, n, b_e):
        token = tl.load(p_token + e + o, mask=e + o < n)
        row = tl.load(p_row + e + o, mask=e + o < n)
        tl.store(p_row + e + o, tl.where(a == 1, token, (1 - a) * row + a * token), mask=e + o < n)


@triton.jit(do_not_specialize=["S", "T"])
def _forward(
    p_bank_keys,  # (B, S, E) copied from the old bank, written in place, like the next seven
    p_bank_values,  # (B, S, F)
    p_strength,  # (B, S)
    p_access,  # (B, S)
    p_age,  # (B, S)
    p_mean,  # (B,)
    p_var,  # (B,)
    p_count,  # (B,)
    p_keys,  # (B, T, E)
    p_values,  # (B, T, F)
    p_surprise,  # (B, T)
    p_mask,  # (B, T) bytes
    p_slot,  # (B, T)
    p_blend,  # (B, T)
    p_surprises,  # (B, T)
    p_threshold,  # (B, T)
    p_route,  # (B, T)
    p_rule,  # (15,) in the order of Rule, and 1 - ema_alpha
    p_inverse,  # (B, S) scratch: 1 / length of each key
    S,
    T,
    E,
    F,
    gated: tl.constexpr,
    masked: tl.constexpr,
    boosted: tl.constexpr,
    update: tl.constexpr,
    b_s: tl.constexpr,
    b_e: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    match_threshold, alpha_match, alpha_evict = tl.load(p_rule), tl.load(p_rule + 1), tl.load(p_rule + 2)
    boost, min_strength = tl.load(p_rule + 3), tl.load(p_rule + 4)
    retain_strength, retain_access, retain_age = tl.load(p_rule + 5), tl.load(p_rule + 6), tl.load(p_rule + 7)
    z_threshold, capacity_pressure = tl.load(p_rule + 8), tl.load(p_rule + 9)
    ema_alpha, ema_keep = tl.load(p_rule + 10), tl.load(p_rule + 14)
    conflict_weight, conflict_floor = tl.load(p_rule + 11), tl.load(p_rule + 12)
    mean, var, count = tl.load(p_mean + b), tl.load(p_var + b), tl.load(p_count + b)
    zero = mean * 0
    minus_inf = float("-inf")
    o_s = tl.arange(0, b_s)
    o_e = tl.arange(0, b_e)

    for i in range(0, S):
        tl.store(p_inverse + b * S + i, _inverse_length(p_bank_keys + (b * S + i) * E, E, b_e))
    tl.debug_barrier()  # what one thread of this program wrote, others read next

    for t in range(0, T):
        at = b * T + t
        p_key = p_keys + at * E
        p_value = p_values + at * F
        key_inverse = _inverse_length(p_key, E, b_e)
        spoiled = tl.zeros([b_e], p_value.dtype.element_ty)
        for e in range(0, F, b_e):
            x = tl.load(p_value + e + o_e, mask=e + o_e < F, other=0.0)
            spoiled += x - x
        valid = (key_inverse == key_inverse) & (tl.sum(spoiled, 0) == 0)
        if masked:
            valid = valid & (tl.load(p_mask + at) != 0)
        if gated:
            s_pred = tl.load(p_surprise + at)
            valid = valid & (s_pred - s_pred == 0)

        # One walk over the slots: the most similar live one, the one least worth keeping, the first dead one. Each lane
        # keeps the first of its own slots; the lowest of the lanes' wins below.
        top = tl.full([b_s], minus_inf, p_key.dtype.element_ty)
        low = tl.full([b_s], float("inf"), p_key.dtype.element_ty)
        best, weakest, first_dead = o_s, o_s, tl.full([b_s], 2147483647, tl.int32)
        lives = tl.zeros([b_s], tl.int32)
        for first in range(0, S, b_s):
            slots = first + o_s
            m_s = slots < S
            p_slots = b * S + slots
            total = tl.zeros([b_s, b_e], p_key.dtype.element_ty)
            for e in range(0, E, b_e):
                unit = tl.load(p_key + e + o_e, mask=e + o_e < E, other=0.0) * key_inverse
                p_tile = p_bank_keys + p_slots[:, None] * E + (e + o_e)[None, :]
                tile = tl.load(p_tile, mask=m_s[:, None] & (e + o_e < E)[None, :], other=0.0)
                total += tile * unit[None, :]
            cosine = tl.sum(total, 1) * tl.load(p_inverse + p_slots, mask=m_s, other=0.0)
            strength = tl.load(p_strength + p_slots, mask=m_s, other=0.0)
            access = tl.load(p_access + p_slots, mask=m_s, other=0.0)
            age = tl.load(p_age + p_slots, mask=m_s, other=0.0)
            live = m_s & (strength >= min_strength) & (strength > 0)
            lives += live.to(tl.int32)
            first_dead = tl.where(m_s & (live == 0), tl.minimum(first_dead, slots), first_dead)
            more = live & (cosine > top)  # never true of nan
            top, best = tl.where(more, cosine, top), tl.where(more, slots, best)
            retention = retain_strength * strength + retain_access * tl.log(1 + access) - retain_age * age
            less = m_s & (retention < low)
            low, weakest = tl.where(less, retention, low), tl.where(less, slots, weakest)
        c = tl.max(top, 0)
        live_count = tl.sum(lives, 0)

        # The gate.
        s = zero
        theta = zero
        write = valid & (S > 0)
        predicted = valid
        if gated:
            conflict = tl.where(c > conflict_floor, conflict_weight * (1 - c), 0.0)
            predicted = s_pred >= conflict
            s = tl.where(predicted, s_pred, conflict)
            utilisation = live_count.to(mean.dtype) / (zero + tl.maximum(S, 1))
            theta = (mean + z_threshold * tl.sqrt(var)) * (1 + capacity_pressure * utilisation)
            theta = tl.where(count == 0, 0.0, theta)
            write = write & (s > theta)
            if update:
                d = s - mean
                new_mean = tl.where(count == 0, s, mean + ema_alpha * d)
                new_var = tl.where(count == 0, 0.0, ema_keep * (var + ema_alpha * d * d))
                mean = tl.where(valid, new_mean, mean)
                var = tl.where(valid, new_var, var)
                count = tl.where(valid, count + 1, count)
            s = tl.where(valid, s, 0.0)
            theta = tl.where(valid, theta, 0.0)

        # The slot.
        matched = (c >= match_threshold) & (c > minus_inf)
        full = live_count == S
        slot = tl.where(full, tl.min(tl.where(low == tl.min(low, 0), weakest, 2147483647), 0), tl.min(first_dead, 0))
        slot = tl.where(matched, tl.min(tl.where(top == c, best, 2147483647), 0), slot)
        a = tl.where(matched, alpha_match, tl.where(full, alpha_evict, zero + 1))

        # The write.
        p_at = b * S + slot
        old = tl.load(p_strength + p_at, mask=write, other=0.0)
        alive = (old >= min_strength) & (old > 0)
        old = tl.where(alive, old, 0.0)
        if boosted:
            keeps = old + boost <= 1
            new = tl.where(keeps, old + boost, 1.0)
            route = tl.where(keeps & alive, 1, 0)
        else:
            keeps = matched & (old >= s)
            new = tl.where(keeps, old, s)
            route = tl.where(keeps, 1, tl.where(predicted, 2, 0))
        tl.store(p_slot + at, tl.where(write, slot, -1))
        tl.store(p_blend + at, tl.where(write, a, 0.0))
        tl.store(p_surprises + at, s)
        tl.store(p_threshold + at, theta)
        tl.store(p_route + at, tl.where(write, route, 0))
        tl.debug_barrier()  # everyone has read the bank as it was
        if write:
            p_row = p_bank_keys + p_at * E
            _blend_row(p_row, p_key, E, a, b_e)
            _blend_row(p_bank_values + p_at * F, p_value, F, a, b_e)
            tl.store(p_strength + p_at, new)
            tl.store(p_access + p_at, 0.0, mask=matched == 0)
            tl.store(p_age + p_at, 0.0)
            tl.debug_barrier()
            tl.store(p_inverse + p_at, _inverse_length(p_row, E, b_e))
            tl.debug_barrier()

    if gated:
        tl.store(p_mean + b, mean)
        tl.store(p_var + b, var)
        tl.store(p_count + b, count)


@triton.jit(do_not_specialize=["S", "T"])
def _replay(
    p_rows,  # (B, S, width) in place
    p_tokens,  # (B, T, width) read, or with `transposed` written
    p_slot,  # (B, T)
    p_blend,  # (B, T)
    S,
    T,
    width,
    transposed: tl.constexpr,
    b_c: tl.constexpr,
):
    """rows[slot] <- (1 - a) rows[slot] + a token, in order; transposed: grads of the rows, in reverse order."""
    b, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * b_c + tl.arange(0, b_c)
    m_column = column < width
    for i in range(0, T):
        t = T - 1 - i if transposed else i
        slot, a = tl.load(p_slot + b * T + t), tl.load(p_blend + b * T + t)
        p_token = p_tokens + (b * T + t) * width + column
        m = m_column & (slot >= 0)
        p_row = p_rows + (b * S + tl.maximum(slot, 0)) * width + column
        row = tl.load(p_row, mask=m, other=0.0)
        if transposed:
            tl.store(p_token, a * row, mask=m_column)  # a = 0 and row = 0 where nothing was written
            tl.store(p_row, tl.where(a == 1, 0.0, (1 - a) * row), mask=m)
        else:
            token = tl.load(p_token, mask=m)
            tl.store(p_row, tl.where(a == 1, token, (1 - a) * row + a * token), mask=m)
        tl.debug_barrier()  # the next token may meet this row again


@triton.jit(do_not_specialize=["S", "T"])
def _replay_strength(
    p_strength,  # (B, S) in place
    p_surprise,  # (B, T) read, or with `transposed` written
    p_slot,  # (B, T)
    p_route,  # (B, T)
    S,
    T,
    transposed: tl.constexpr,
    b_s: tl.constexpr,
):
    """The same for the strength of b_s slots, which is the old one, the token's surprise, or a constant."""
    b, o_s = tl.program_id(0).to(tl.int64), tl.program_id(1) * b_s + tl.arange(0, b_s)
    strength = tl.load(p_strength + b * S + o_s, mask=o_s < S, other=0.0)
    for i in range(0, T):
        t = T - 1 - i if transposed else i
        slot, route = tl.load(p_slot + b * T + t), tl.load(p_route + b * T + t)
        here = (o_s == slot) & (route != 1)
        if transposed:
            grad = tl.sum(tl.where(here, strength, 0.0), 0)
            mine = (slot // b_s == tl.program_id(1)) & (route == 2)
            tl.store(p_surprise + b * T + t, grad, mask=mine)  # elsewhere it is 0 already
            strength = tl.where(here, 0.0, strength)
        else:
            surprise = tl.load(p_surprise + b * T + t)
            strength = tl.where(here, tl.where(route == 2, surprise, 0.0), strength)
    tl.store(p_strength + b * S + o_s, strength, mask=o_s < S)


def _numbers(rule: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The rule on the device, so that a new number neither recompiles nor loses precision; (15,)."""
    numbers = torch.empty(15, dtype=dtype, device=device)
    for place, number in zip(numbers, (*rule, 1 - rule[10]), strict=True):
        place.fill_(number)  # a copy from the host would wait for the GPU, and cannot be captured in a graph
    return numbers


_kept_numbers = lru_cache(maxsize=256)(_numbers)


def forward(inputs: list[Tensor], out: list[Tensor], rule: tuple[float, ...]) -> None:
    """The raw op gated_write: contiguous inputs (None for what is not given), results written into `out`."""
    bank, (keys, values, surprise, mean, var, count, mask) = inputs[:5], inputs[5:]
    (B, S, E), (T, F) = bank[0].shape, values.shape[1:]
    gated = surprise is not None
    for new, old in zip(out[:8], [*bank, mean, var, count], strict=True):
        if old is not None:
            new.copy_(old)
    if B == 0:
        return
    with on(keys):
        # What is made while a graph is captured is filled, and lives, with that graph alone.
        capturing = keys.is_cuda and torch.cuda.is_current_stream_capturing()
        numbers = (_numbers if capturing else _kept_numbers)(tuple(rule), keys.dtype, keys.device)
        _forward[(B,)](
            *out[:8],
            keys,
            values,
            surprise if gated else keys,
            mask.view(torch.uint8) if mask is not None else keys,
            *out[8:],
            numbers,
            keys.new_empty((B, max(S, 1))),
            S,
            T,
            E,
            F,
            gated=gated,
            masked=mask is not None,
            boosted=rule[3] >= 0,
            update=gated and rule[13] != 0,
            **FORWARD_CONFIG,
        )


def _linear(rows: list[Tensor], tokens: list[Tensor], decisions: list[Tensor], transposed: bool) -> None:
    """rows: keys, values, strength, in place; tokens: keys, values, surprise; decisions: slot, blend, route."""
    slot, blend, route = decisions
    (B, T), S = slot.shape, rows[2].shape[1]
    if B * S == 0:
        for x in tokens if transposed else ():
            x.zero_()
        return
    with on(blend):
        for x, y in zip(rows[:2], tokens[:2], strict=True):
            width = x.shape[2]
            if width:
                grid = (B, triton.cdiv(width, REPLAY_CONFIG["b_c"]))
                _replay[grid](x, y, slot, blend, S, T, width, transposed=transposed, **REPLAY_CONFIG)
        if transposed:
            tokens[2].zero_()
        grid = (B, triton.cdiv(S, STRENGTH_CONFIG["b_s"]))
        _replay_strength[grid](rows[2], tokens[2], slot, route, S, T, transposed=transposed, **STRENGTH_CONFIG)


def replay(inputs: list[Tensor], out: list[Tensor]) -> None:
    """The raw op gated_write_replay: contiguous inputs, results written into `out`."""
    for new, old in zip(out, inputs[:3], strict=True):
        new.copy_(old)
    _linear(out, inputs[3:6], inputs[6:], transposed=False)


def backward(inputs: list[Tensor], out: list[Tensor]) -> None:
    """The raw op gated_write_backward: contiguous inputs, results written into `out`."""
    for new, old in zip(out[:3], inputs[:3], strict=True):
        new.copy_(old)
    _linear(out[:3], out[3:], inputs[3:], transposed=True)

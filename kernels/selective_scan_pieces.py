"""What the programs of selective_scan_programs.py and selective_scan_backward.py are made of."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# Sizes, of which no value deserves a kernel of its own.
SIZES = [
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
    "teams",
    "a_set",
]


@triton.jit
def _load(p, at, offsets, step, mask):
    """fp32 from p + at + offsets + step; zeros for a pointer that is absent."""
    if p is None:
        x = tl.zeros(mask.shape, tl.float32)
    else:
        x = tl.load(p + at + offsets + step, mask=mask, other=0).to(tl.float32)
    return x


@triton.jit
def _unit(unit, p_cu, L, packed, segments, per_segment):
    """Sequence, segment and row of the unit-th segment of all, where the sequence (begin, end) and it (lo, hi) lie."""
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
    return sequence, segment, row, begin, end, lo, hi


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
def _reciprocal(x):
    """1 / x for x >= 1: two instructions, of which a division takes six, for a range that is not needed."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _time_step(x, v_x, mask, softplus: tl.constexpr):
    """dt = softplus(x) or x, 0 where masked, and the slope of the map; the tangents of both."""
    if softplus:  # log(1 + e^x) = max(x, 0) + log(1 + e) with e = e^-|x|; the polynomial is log(1 + e) / e on [0, 1]
        e = tl.exp2(-LOG2E * tl.abs(x))
        p = 0.019542528 - 0.0031760570 * e
        p = -0.056373615 + p * e
        p = 0.10543624 + p * e
        p = -0.15269667 + p * e
        p = 0.19663274 + p * e
        p = -0.24951616 + p * e
        p = 0.33329710 + p * e
        p = -0.49999893 + p * e
        p = 1 + p * e
        dt = tl.maximum(x, 0.0) + p * e
        r = _reciprocal(1 + e)
        slope = tl.where(x > 0, 1.0, e) * r
        v_slope = e * r * r * v_x
    else:
        dt = x
        slope = tl.full(x.shape, 1.0, tl.float32)
        v_slope = tl.zeros(x.shape, tl.float32)
    return tl.where(mask, dt, 0.0), tl.where(mask, slope * v_x, 0.0), slope, v_slope


@triton.jit
def _gate(z):
    """silu(z), its slope and its curvature."""
    sigma = _reciprocal(1 + tl.exp2(-LOG2E * z))
    slope = sigma * (1 + z * (1 - sigma))
    return z * sigma, slope, sigma * (1 - sigma) * (2 + z * (1 - 2 * sigma))


@triton.jit
def _fetch(
    p, p_to, streams, p_reset, t, within, n: tl.constexpr, sign: tl.constexpr, places, along_d: tl.constexpr,
    dual: tl.constexpr,
):  # fmt: skip
    """What n steps take, from t on or with sign -1 from t back: tiles, those of directions, the resets.

    A tile is (b_d, n) for the first along_d of the pointers p and (b_n, n) for the rest; p_to are their directions.
    streams: where step 0 of each lies, and how far from it the next; the same of what lies like y, and of what lies
    like (L, G, N); row_step, where step 0 is among all. Only steps < within are loaded.
    """
    at, by, y_at, y_by, n_at, n_by, row_step = streams
    o_d, o_n, m_d, m_n = places
    o_t = sign * tl.arange(0, n)
    m_t = tl.arange(0, n) < within
    tiles, v_tiles = (), ()
    for k in tl.static_range(len(by)):
        o = (o_d if k < along_d else o_n)[:, None]
        m = (m_d if k < along_d else m_n)[:, None] & m_t[None, :]
        tiles += (_load(p[k], at[k] + t * by[k], o + (o_t * by[k])[None, :], 0, m),)
        if dual:
            v_at = y_at + t * y_by if k < along_d else n_at + t * n_by
            v_by = y_by if k < along_d else n_by
            v_tiles += (_load(p_to[k], v_at, o + (o_t * v_by)[None, :], 0, m),)
    resets = ()
    if p_reset is not None:
        for i in tl.static_range(n):
            resets += (tl.load(p_reset + row_step + t + sign * i, mask=i < within, other=0),)
    return tiles, v_tiles, resets


@triton.jit
def _columns(tile):
    """The columns of a tile (b, 1, 2 or 4), a tuple."""
    b: tl.constexpr = tile.shape[0]
    n: tl.constexpr = tile.shape[1]
    tl.static_assert(n == 1 or n == 2 or n == 4)
    if n == 1:
        columns = (tl.reshape(tile, [b]),)
    elif n == 2:
        columns = tl.split(tile)
    else:
        even, odd = tl.split(tl.reshape(tile, [b, 2, 2]))
        column_0, column_2 = tl.split(even)
        column_1, column_3 = tl.split(odd)
        columns = column_0, column_1, column_2, column_3
    return columns


@triton.jit
def _steps(tiles):
    """The columns of each of some tiles: for each a tuple of what every step takes."""
    steps = ()
    for k in tl.static_range(len(tiles)):
        steps += (_columns(tiles[k]),)
    return steps


@triton.jit
def _drop(h, v_h, resets, i: tl.constexpr):
    """The state before step i, zero where it is dropped; whatever it was, nan included."""
    if len(resets) > 0:
        dropped = resets[i] != 0
        h = tl.where(dropped, 0.0, h)
        v_h = tl.where(dropped, 0.0, v_h)
    return h, v_h


@triton.jit
def _exponent(A, v_A, dt, v_dt):
    """Tangent of dt A, where A is scaled."""
    return LN2 * (v_dt[:, None] * A + dt[:, None] * v_A)


@triton.jit
def _advance(
    h, v_h, A, v_A, bias, v_bias, u, delta, B, v_u, v_delta, v_B, resets, i: tl.constexpr, m_d,
    softplus: tl.constexpr, dual: tl.constexpr,
):  # fmt: skip
    """Step i: h <- exp(dt A) h + dt u B, and its tangent. The states before and after it, dt and its slope."""
    dt, v_dt, slope, v_slope = _time_step(delta + bias, v_delta + v_bias, m_d, softplus)
    before, v_before = _drop(h, v_h, resets, i)
    x = dt * u
    a = tl.exp2(dt[:, None] * A)
    if dual:
        v_x = v_dt * u + dt * v_u
        v_h = (
            a * (v_before + _exponent(A, v_A, dt, v_dt) * before)
            + v_x[:, None] * B[None, :]
            + x[:, None] * v_B[None, :]
        )
    return before, v_before, a * before + x[:, None] * B[None, :], v_h, dt, v_dt, slope, v_slope

"""Write tokens in order into a bank of slots, blending with what is similar, evicting what is least worth keeping.

A decaying buffer and a surprise-gated store are two settings of this one rule. Derivation: docs/ops/gated_write.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmem.ops import _dispatch
from fastmem.ops._gated_write_autograd import apply
from fastmem.ops._gated_write_reference import Bank, Rule, SurpriseStats, Written, reference

__all__ = ["Bank", "SurpriseStats", "Written", "gated_write"]


def gated_write(
    bank: Bank,
    keys: Tensor,
    values: Tensor,
    surprise: Tensor | None = None,
    stats: SurpriseStats | None = None,
    *,
    mask: Tensor | None = None,
    match_threshold: float = 0.5,
    alpha_match: float = 0.1,
    alpha_evict: float = 0.3,
    boost: float | None = 0.5,
    min_strength: float = 0.01,
    retention: tuple[float, float, float] = (1.0, 0.0, 0.0),
    z_threshold: float = 1.0,
    capacity_pressure: float = 0.5,
    ema_alpha: float = 0.1,
    conflict_weight: float = 2.0,
    conflict_floor: float = 0.3,
    update_stats: bool = True,
    backend: str = "auto",
) -> tuple[Bank, SurpriseStats | None, Written]:
    """Write T tokens in order into S slots; each token sees the writes before it.

    A slot is live where its strength is positive and at least min_strength. For each token, c is its largest cosine
    to the key of a live slot (the lowest slot on ties; none live: no match).

    1. Gate, only with `surprise`: s = max(surprise, conflict_weight * (1 - c if c > conflict_floor else 0)); the token
       is written where s > (mean + z_threshold * sqrt(var)) * (1 + capacity_pressure * live slots / S), a threshold
       that is 0 while count is 0. Then s enters the exponential mean and variance.
    2. Slot: c >= match_threshold: that slot, blended with alpha_match. Else the first dead slot, overwritten. Else the
       live slot with the lowest retention[0] * strength + retention[1] * log(1 + access) - retention[2] * age,
       blended with alpha_evict.
    3. Key and value become (1 - alpha) old + alpha new. Strength becomes min(1, old + boost), old being 0 for a dead
       slot; with boost=None it is the surprise s, the larger of old and s on a match. access is kept on a match,
       else 0; age becomes 0.

    A token that is masked, or holds a value that is not finite, changes nothing, the statistics included. A live slot
    whose key is not finite matches nothing; it can be evicted.

    Gradients reach keys, values, bank.keys, bank.values, bank.strength, and (boost=None, where it is the larger term
    of s) surprise. The decisions, the conflict term of s, the statistics, access and age are constants. Second and
    higher derivatives are exact.

    Args:
        bank: keys (B, S, E), values (B, S, F), strength, access, age (B, S); all float32 or all float64. Not changed.
            access and age must be finite.
        keys: (B, T, E), any float dtype; brought to the bank's.
        values: (B, T, F), likewise.
        surprise: (B, T) prediction surprise, or None to write every token.
        stats: running mean, var, count (B,), in the bank's dtype. None with surprise: nothing seen yet.
        mask: (B, T) bool, true where the token may be written; None: everywhere.
        match_threshold: cosine from which a token counts as known.
        alpha_match: blend in [0, 1] with a slot that matches.
        alpha_evict: blend in [0, 1] with a live slot that does not match.
        boost: what a write adds to the strength, >= 0; None: strength is the surprise.
        min_strength: >= 0, below it a slot is dead.
        retention: weights of strength, log(1 + access) and age.
        z_threshold: standard deviations above the mean.
        capacity_pressure: how much a full bank raises the threshold.
        ema_alpha: weight in [0, 1] of the newest surprise.
        conflict_weight: weight of the conflict term, >= 0.
        conflict_floor: cosine up to which nothing similar is stored.
        update_stats: false leaves the statistics alone (evaluation).
        backend: "auto", "cpp", "triton" or "reference".

    Returns:
        The new bank, the new statistics (`stats` as given without surprise), and what was written where.

    Raises:
        ValueError: a wrong shape, device or number, boost=None without surprise, or a backend that cannot serve this.
        TypeError: a wrong dtype or type.
    """
    rule = _rule(
        match_threshold,
        alpha_match,
        alpha_evict,
        boost,
        min_strength,
        retention,
        z_threshold,
        capacity_pressure,
        ema_alpha,
        conflict_weight,
        conflict_floor,
        update_stats,
    )
    bank = _check(bank, keys, values, surprise, stats, mask, boost)
    plan = _plan(backend, keys)
    if backend == "auto" and plan.chosen == "reference":
        _dispatch.warn_slow("gated_write", plan.refused["cpp" if keys.device.type == "cpu" else "triton"])
    dtype = bank.keys.dtype
    keys, values = keys.to(dtype), values.to(dtype)
    if surprise is not None:
        surprise = surprise.to(dtype)
        if stats is None:
            stats = SurpriseStats(*(keys.new_zeros(keys.shape[0]) for _ in range(3)))
    if plan.chosen == "reference":
        new_bank, new_stats, written = reference(bank, keys, values, surprise, stats, mask, rule)
        return new_bank, stats if surprise is None else new_stats, written
    gate = (None, None, None) if surprise is None or stats is None else tuple(stats)
    out = apply(*bank, keys, values, surprise, *gate, mask, rule)
    new_stats = stats if surprise is None else SurpriseStats(*out[5:8])
    return Bank(*out[:5]), new_stats, Written(*out[8:12])


def _plan(backend: str, keys: Tensor) -> _dispatch.Explanation:
    refusals = {"triton": _dispatch.no_triton(keys), "cpp": _dispatch.no_cpp(keys), "reference": None}
    return _dispatch.choose("gated_write", backend, refusals)


@_dispatch.explainer("gated_write")
def _explain(
    bank: Bank,
    keys: Tensor,
    values: Tensor,
    surprise: Tensor | None = None,
    stats: SurpriseStats | None = None,
    *,
    mask: Tensor | None = None,
    boost: float | None = 0.5,
    backend: str = "auto",
    **numbers: object,
) -> _dispatch.Explanation:
    _check(bank, keys, values, surprise, stats, mask, boost)
    return _plan(backend, keys)


def _number(name: str, x: object, low: float = -math.inf, high: float = math.inf) -> float:
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    if not (low <= x <= high and math.isfinite(x)):
        bounds = "a finite number" if low == -math.inf else f"a finite number >= {low:g}"
        raise ValueError(f"{name}: expected {bounds if high == math.inf else f'{low:g} to {high:g}'}, got {x}")
    return float(x)


def _rule(
    match_threshold: float,
    alpha_match: float,
    alpha_evict: float,
    boost: float | None,
    min_strength: float,
    retention: tuple[float, float, float],
    z_threshold: float,
    capacity_pressure: float,
    ema_alpha: float,
    conflict_weight: float,
    conflict_floor: float,
    update_stats: bool,
) -> Rule:
    if not isinstance(retention, tuple | list) or len(retention) != 3:
        raise ValueError(f"retention: expected weights of strength, log(1 + access) and age, got {retention!r}")
    r0, r1, r2 = (_number(f"retention[{i}]", x) for i, x in enumerate(retention))
    return Rule(
        match_threshold=_number("match_threshold", match_threshold),
        alpha_match=_number("alpha_match", alpha_match, 0, 1),
        alpha_evict=_number("alpha_evict", alpha_evict, 0, 1),
        boost=-1.0 if boost is None else _number("boost", boost, 0),
        min_strength=_number("min_strength", min_strength, 0),
        retain_strength=r0,
        retain_access=r1,
        retain_age=r2,
        z_threshold=_number("z_threshold", z_threshold),
        capacity_pressure=_number("capacity_pressure", capacity_pressure),
        ema_alpha=_number("ema_alpha", ema_alpha, 0, 1),
        conflict_weight=_number("conflict_weight", conflict_weight, 0),
        conflict_floor=_number("conflict_floor", conflict_floor),
        update_stats=1.0 if update_stats else 0.0,
    )


def _tensor(name: str, x: object, like: str, shape: tuple[int | str, ...], device: torch.device) -> Tensor:
    """x, if it is a tensor on the device with this shape; a letter in the shape is any size."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.ndim != len(shape) or any(want != n for want, n in zip(shape, x.shape, strict=True) if isinstance(want, int)):
        expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name}: expected ({expected}){like}, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected device {device}, where bank.keys is, got {x.device}")
    return x


def _check(
    bank: Bank,
    keys: Tensor,
    values: Tensor,
    surprise: Tensor | None,
    stats: SurpriseStats | None,
    mask: Tensor | None,
    boost: float | None,
) -> Bank:
    if not isinstance(bank, tuple) or len(bank) != 5:
        raise TypeError(f"bank: expected Bank(keys, values, strength, access, age), got {type(bank).__name__}")
    bank = Bank(*bank)
    if not isinstance(bank.keys, Tensor):
        raise TypeError(f"bank.keys: expected a tensor, got {type(bank.keys).__name__}")
    dtype, device = bank.keys.dtype, bank.keys.device
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"bank.keys: expected float32 or float64, got {dtype}; tokens may be of any float dtype")
    _tensor("bank.keys", bank.keys, "", ("B", "S", "E"), device)
    B, S, E = bank.keys.shape
    like_bank = f" to match bank.keys {tuple(bank.keys.shape)}"
    _tensor("bank.values", bank.values, like_bank, (B, S, "F"), device)
    F = bank.values.shape[2]
    _tensor("keys", keys, like_bank, (B, "T", E), device)
    T = keys.shape[1]
    _tensor("values", values, f" to match keys {tuple(keys.shape)} and bank.values", (B, T, F), device)
    same_dtype = {"bank.values": bank.values}
    for name, x in zip(("bank.strength", "bank.access", "bank.age"), bank[2:], strict=True):
        same_dtype[name] = _tensor(name, x, like_bank, (B, S), device)
    any_float = {"keys": keys, "values": values}
    like_keys = f" to match keys {tuple(keys.shape)}"
    if surprise is not None:
        any_float["surprise"] = _tensor("surprise", surprise, like_keys, (B, T), device)
    elif boost is None:
        raise ValueError("boost: expected a number, as there is no surprise to be the strength, got None")
    if stats is not None:
        if not isinstance(stats, tuple) or len(stats) != 3:
            raise TypeError(f"stats: expected SurpriseStats(mean, var, count), got {type(stats).__name__}")
        for name, x in zip(("stats.mean", "stats.var", "stats.count"), stats, strict=True):
            same_dtype[name] = _tensor(name, x, like_bank, (B,), device)
    if mask is not None and _tensor("mask", mask, like_keys, (B, T), device).dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool, true where a token may be written, got {mask.dtype}")
    for name, x in same_dtype.items():
        if x.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, the dtype of bank.keys, got {x.dtype}")
    for name, x in any_float.items():
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a float dtype, got {x.dtype}")
    return bank

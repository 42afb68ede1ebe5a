"""What gated_write means: its types, its rule, and the reference, one token after the other in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Bank(NamedTuple):
    """S slots for each of B memories."""

    keys: Tensor  # (B, S, E)
    values: Tensor  # (B, S, F)
    strength: Tensor  # (B, S) activation in [0, 1] (decaying buffer) or surprise (store)
    access: Tensor  # (B, S) reads counted
    age: Tensor  # (B, S) write calls since last written; the op only sets it to 0, ticking is the caller's


class SurpriseStats(NamedTuple):
    """Running mean and variance of the surprise."""

    mean: Tensor  # (B,)
    var: Tensor  # (B,)
    count: Tensor  # type: ignore[assignment]  # (B,) tokens seen; hides tuple.count


class Written(NamedTuple):
    """What became of each token. Not differentiable."""

    slot: Tensor  # (B, T) int64, -1 where nothing was written
    blend: Tensor  # (B, T) the alpha used, 0 where nothing was written
    surprise: Tensor  # (B, T) surprise of the token, 0 without a gate or where the token was skipped
    threshold: Tensor  # (B, T) threshold at its decision, 0 without a gate or where the token was skipped


class Rule(NamedTuple):
    """The numbers of the rule, all floats, in the order in which the kernels read them."""

    match_threshold: float
    alpha_match: float
    alpha_evict: float
    boost: float  # negative: none, strength is the surprise
    min_strength: float
    retain_strength: float
    retain_access: float
    retain_age: float
    z_threshold: float
    capacity_pressure: float
    ema_alpha: float
    conflict_weight: float
    conflict_floor: float
    update_stats: float  # 0 or 1


def _unit(x: Tensor) -> Tensor:
    """x / |x| along the last axis, zero for zero, not a number where x is not finite; safe for huge and tiny x."""
    if x.shape[-1] == 0:
        return x
    largest = x.abs().amax(-1, keepdim=True)
    x = x / torch.where(largest == 0, 1, largest)
    return x / torch.where(largest == 0, 1, torch.linalg.vector_norm(x, dim=-1, keepdim=True))


def reference(
    bank: Bank,
    keys: Tensor,  # (B, T, E)
    values: Tensor,  # (B, T, F)
    surprise: Tensor | None,  # (B, T)
    stats: SurpriseStats | None,
    mask: Tensor | None,  # (B, T) bool
    rule: Rule,
) -> tuple[Bank, SurpriseStats | None, Written]:
    """The definition of gated_write. Decisions are constants to autograd; everything else it differentiates itself."""
    (B, T), S = keys.shape[:2], bank.keys.shape[1]
    K, V, strength, access, age = *bank[:3], bank.access.detach(), bank.age.detach()
    k_constant = keys.detach()
    valid = k_constant.isfinite().all(-1) & values.detach().isfinite().all(-1)  # (B, T)
    if mask is not None:
        valid = valid & mask
    if surprise is not None:
        assert stats is not None
        mean, var, count = (x.detach() for x in stats)
        valid = valid & surprise.detach().isfinite()
    units, unit_keys = _unit(K.detach()), _unit(k_constant)  # (B, S, E), (B, T, E)
    row, zero = torch.arange(B, device=keys.device), bank.strength.new_zeros(B)
    minus_inf, nowhere = zero - torch.inf, row.new_full((B,), -1)
    log: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    for t in range(T):
        write, s, theta = valid[:, t], zero, zero
        now = strength.detach()
        live = (now >= rule.min_strength) & (now > 0)  # (B, S)

        # 1. The most similar live slot, the lowest one on ties; slots with a key that is not finite do not count.
        cosine = (units @ unit_keys[:, t, :, None])[..., 0]  # (B, S)
        cosine = cosine.masked_fill(~(live & ~cosine.isnan()), -torch.inf)
        c, best = cosine.max(1) if S else (minus_inf, nowhere)

        # 2. The gate.
        if surprise is not None:
            s_pred = surprise[:, t]
            s_conflict = rule.conflict_weight * torch.where(c > rule.conflict_floor, 1 - c, 0)
            predicted = s_pred.detach() >= s_conflict
            s = torch.where(predicted, s_pred.detach(), s_conflict)
            utilisation = live.to(zero).sum(1) / max(S, 1)
            theta = (mean + rule.z_threshold * var.sqrt()) * (1 + rule.capacity_pressure * utilisation)
            theta = torch.where(count == 0, 0, theta)
            write = write & (s > theta)
            if rule.update_stats:
                first, d, seen = count == 0, s - mean, valid[:, t]
                new_var = (1 - rule.ema_alpha) * (var + rule.ema_alpha * d * d)
                mean = torch.where(seen, torch.where(first, s, mean + rule.ema_alpha * d), mean)
                var = torch.where(seen, torch.where(first, 0, new_var), var)
                count = torch.where(seen, count + 1, count)
            s, theta = torch.where(valid[:, t], s, 0), torch.where(valid[:, t], theta, 0)
        if S == 0:
            log.append((nowhere, zero, s, theta))
            continue

        # 3. The slot: the best match, else the first dead one, else the one least worth keeping.
        matched = (c >= rule.match_threshold) & (c > -torch.inf)
        retention = rule.retain_strength * now + rule.retain_access * access.log1p() - rule.retain_age * age
        dead = (~live).to(torch.int8)
        some_dead = dead.any(1)
        slot = torch.where(matched, best, torch.where(some_dead, dead.argmax(1), retention.argmin(1)))
        alpha = torch.where(some_dead, zero + 1, rule.alpha_evict)
        alpha = torch.where(matched, rule.alpha_match, alpha)

        # 4. The write. With alpha = 1 the old content must not leak through, not even as nan * 0.
        at, a = (row, slot), alpha[:, None]
        old_k, old_v = K[at], V[at]
        new_k = torch.where(a == 1, keys[:, t], (1 - a) * old_k + a * keys[:, t])
        new_v = torch.where(a == 1, values[:, t], (1 - a) * old_v + a * values[:, t])
        old = torch.where(live[at], strength[at], 0)
        if rule.boost >= 0:
            new = torch.where(old + rule.boost <= 1, old + rule.boost, 1)
        else:
            new = torch.where(predicted, s_pred, s)
            new = torch.where(matched & (old >= s), old, new)
        K = K.index_put(at, torch.where(write[:, None], new_k, old_k))
        V = V.index_put(at, torch.where(write[:, None], new_v, old_v))
        units = units.index_put(at, torch.where(write[:, None], _unit(new_k.detach()), units[at]))
        strength = strength.index_put(at, torch.where(write, new, strength[at]))
        access = access.index_put(at, torch.where(write & ~matched, 0, access[at]))
        age = age.index_put(at, torch.where(write, 0, age[at]))
        log.append((torch.where(write, slot, -1), torch.where(write, alpha, 0), s, theta))

    if T:
        slots, blends, surprises, thresholds = (torch.stack(x, 1) for x in zip(*log, strict=True))
    else:
        slots, blends = row.new_zeros(B, 0), zero.new_zeros(B, 0)
        surprises, thresholds = blends.clone(), blends.clone()
    # Copies where nothing was written: the result never shares memory with the bank that came in.
    K, V, strength, access, age = (
        new.clone() if new is old or not T else new
        for new, old in zip((K, V, strength, access, age), bank, strict=True)
    )
    new_stats = None if surprise is None else SurpriseStats(mean, var, count)
    return Bank(K, V, strength, access, age), new_stats, Written(slots, blends, surprises, thresholds)

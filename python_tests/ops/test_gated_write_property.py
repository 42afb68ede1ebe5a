"""gated_write against a model of it in plain Python: lists, loops and math, written from the rule alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmem.ops.gated_write import Bank, SurpriseStats, gated_write


def cosine(x, y):
    lengths = math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(a * a for a in y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / lengths if lengths else 0.0


def model(bank, keys, values, surprise, stats, mask, n):
    """One memory; bank is a list of [key, value, strength, access, age], changed in place. Returns (slots, stats)."""
    slots = []
    mean, var, count = stats
    for t, (key, value) in enumerate(zip(keys, values, strict=True)):
        slots.append(-1)
        numbers = [*key, *value, *([] if surprise is None else [surprise[t]])]
        if not mask[t] or not all(map(math.isfinite, numbers)):
            continue
        live = [s for s, slot in enumerate(bank) if slot[2] > 0 and slot[2] >= n["min_strength"]]
        best = max(live, key=lambda s: cosine(key, bank[s][0]), default=None)
        c = -math.inf if best is None else cosine(key, bank[best][0])
        s = 0.0
        if surprise is not None:
            s = max(surprise[t], n["conflict_weight"] * (1 - c) if c > n["conflict_floor"] else 0.0)
            used = len(live) / len(bank) if bank else 0
            theta = (mean + n["z_threshold"] * math.sqrt(var)) * (1 + n["capacity_pressure"] * used) if count else 0.0
            if n["update_stats"]:
                d = s - mean
                if count:
                    mean, var = mean + n["ema_alpha"] * d, (1 - n["ema_alpha"]) * (var + n["ema_alpha"] * d * d)
                else:
                    mean, var = s, 0.0
                count += 1
            if s <= theta:
                continue
        if not bank:
            continue
        dead = [i for i in range(len(bank)) if i not in live]
        matched = best is not None and c >= n["match_threshold"]
        r0, r1, r2 = n["retention"]
        if matched:
            at, alpha = best, n["alpha_match"]
        elif dead:
            at, alpha = dead[0], 1.0
        else:
            at = min(live, key=lambda i: r0 * bank[i][2] + r1 * math.log1p(bank[i][3]) - r2 * bank[i][4])
            alpha = n["alpha_evict"]
        slot = bank[at]
        old = slot[2] if at in live else 0.0
        for part, new in ((0, key), (1, value)):
            if alpha == 1:
                slot[part] = list(new)
            else:
                slot[part] = [(1 - alpha) * x + alpha * y for x, y in zip(slot[part], new, strict=True)]
        if n["boost"] is not None:
            slot[2] = min(1.0, old + n["boost"])
        else:
            slot[2] = max(old, s) if matched else s
        slot[3] = slot[3] if matched else 0.0
        slot[4] = 0.0
        slots[-1] = at
    return slots, (mean, var, count)


@st.composite
def calls(draw):
    gated = draw(st.booleans())
    share = st.sampled_from([0.0, 0.1, 0.3, 1.0])
    numbers = {
        "match_threshold": draw(st.sampled_from([-2.0, 0.0, 0.35, 0.8, 2.0])),
        "alpha_match": draw(share),
        "alpha_evict": draw(share),
        "boost": draw(st.sampled_from([None, 0.0, 0.3, 2.0] if gated else [0.0, 0.3, 2.0])),
        "min_strength": draw(st.sampled_from([0.0, 0.01, 0.4])),
        "retention": draw(st.sampled_from([(1.0, 0.0, 0.0), (0.5, 0.3, 0.001), (0.0, 0.0, 1.0), (-1.0, 0.2, 0.0)])),
        "z_threshold": draw(st.sampled_from([-1.0, 0.0, 1.0])),
        "capacity_pressure": draw(st.sampled_from([0.0, 0.5])),
        "ema_alpha": draw(share),
        "conflict_weight": draw(st.sampled_from([0.0, 2.0])),
        "conflict_floor": draw(st.sampled_from([-1.0, 0.3])),
        "update_stats": draw(st.booleans()),
    }
    sizes = [draw(st.integers(low, high)) for low, high in ((1, 2), (0, 6), (0, 20), (2, 5), (1, 3))]
    return gated, numbers, sizes, draw(st.integers(0, 2**31)), draw(st.booleans())


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@settings(max_examples=60, deadline=None)
@given(call=calls())
def test_equals_the_model_in_plain_python(backend, call):
    gated, numbers, (B, S, T, E, F), seed, spoiled = call
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    strength = normal(B, S).clamp(0, 1)
    bank = Bank(normal(B, S, E), normal(B, S, F), strength, normal(B, S).abs().floor(), normal(B, S).abs())
    keys, values, surprise, mask = normal(B, T, E), normal(B, T, F), normal(B, T).abs(), normal(B, T) > -1.3
    for x in (keys, values):
        if spoiled:
            x[normal(*x.shape) < -2] = float("nan")
    stats = SurpriseStats(normal(B).abs(), normal(B).square(), (normal(B) > 0).double())
    gate = (surprise, stats) if gated else (None, None)
    new, new_stats, written = gated_write(bank, keys, values, *gate, mask=mask, backend=backend, **numbers)

    for b in range(B):
        slots = [list(slot) for slot in zip(*(x[b].tolist() for x in bank), strict=True)]
        token_surprise = surprise[b].tolist() if gated else None
        before = tuple(x[b].item() for x in stats)
        tokens = keys[b].tolist(), values[b].tolist(), token_surprise
        where, after = model(slots, *tokens, before, mask[b].tolist(), numbers)
        assert written.slot[b].tolist() == where
        for part, x in enumerate(new):
            expected = torch.tensor([slot[part] for slot in slots], dtype=torch.float64).reshape(x[b].shape)
            torch.testing.assert_close(x[b], expected, rtol=1e-9, atol=1e-9)
        if gated:
            torch.testing.assert_close(torch.stack([x[b] for x in new_stats]), torch.tensor(after, dtype=torch.float64))

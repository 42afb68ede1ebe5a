"""Data for the tests of gated_write: some tokens resemble earlier ones or slots, so that every branch is taken."""

import torch

from fastmem.ops.gated_write import Bank, SurpriseStats, gated_write

BUFFER = {"boost": 0.5, "min_strength": 0.01}
STORE = {
    "boost": None,
    "min_strength": 0.0,
    "alpha_match": 0.3,
    "alpha_evict": 1.0,
    "retention": (0.5, 0.3, 0.001),
    "match_threshold": 0.8,
}
# Name -> keyword arguments, with a gate or not. A low z lets enough tokens through to fill the bank.
SETTINGS = {
    "buffer": (BUFFER, False),
    "gated buffer": (BUFFER | {"z_threshold": 0.0}, True),
    "store": (STORE | {"z_threshold": 0.0}, True),
}


def make(B, S, T, E, F, dtype=torch.float32, seed=0, full=0.7):
    """(bank, keys, values, surprise, stats); about the share `full` of the slots is live. Made in float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    strength = torch.where(uniform(B, S) < full, 0.05 + 0.9 * uniform(B, S), 0.0)
    bank = Bank(normal(B, S, E), normal(B, S, F), strength, (uniform(B, S) * 5).floor(), (uniform(B, S) * 20).floor())
    keys = normal(B, T, E)
    for t in range(1, T):
        if t % 3 == 1:
            keys[:, t] = keys[:, t // 2] + 0.3 * keys[:, t]
        elif t % 3 == 2 and S:
            keys[:, t] = 2 * bank.keys[:, t % S] + 0.5 * keys[:, t]
    stats = SurpriseStats(uniform(B) * 0.5, uniform(B) * 0.1, (uniform(B) * 2).floor())
    surprise, values = -uniform(B, T).log(), normal(B, T, F)
    bank, stats = Bank(*(x.to(dtype) for x in bank)), SurpriseStats(*(x.to(dtype) for x in stats))
    return bank, keys.to(dtype), values.to(dtype), surprise.to(dtype), stats


def write(setting, data, **kwargs):
    """gated_write on what `make` returned, in one of SETTINGS."""
    numbers, gated = SETTINGS[setting]
    return gated_write(*(data if gated else data[:3]), **numbers, **kwargs)


def double(data):
    """The same in float64."""
    bank, keys, values, surprise, stats = data
    bank, stats = Bank(*(x.double() for x in bank)), SurpriseStats(*(x.double() for x in stats))
    return bank, keys.double(), values.double(), surprise.double(), stats


def flat(result):
    """Name -> tensor for everything that gated_write returned."""
    bank, stats, written = result
    named = {f"bank.{k}": v for k, v in bank._asdict().items()} | {
        f"written.{k}": v for k, v in written._asdict().items()
    }
    return named | ({} if stats is None else {f"stats.{k}": v for k, v in stats._asdict().items()})


def assert_same(result, expected, tolerance):
    """Same decisions, and everything else within a relative error (norm of the difference over the norm)."""
    result, expected = flat(result), flat(expected)
    assert result.keys() == expected.keys()
    different = (result["written.slot"] != expected["written.slot"]).nonzero()
    assert not len(different), f"decisions differ, first at (memory, token) {different[0].tolist()}"
    for name, x in result.items():
        y = expected[name].double()
        assert x.shape == y.shape, name
        error, size = (x.double() - y).norm(), y.norm()
        assert error <= tolerance * size, f"{name}: relative error {error / size:.2e}"

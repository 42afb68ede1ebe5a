"""Random operations on a registry and on the plain model of it, side by side."""

from __future__ import annotations

import random
from typing import Any

from eager_model import EagerRegistry

from fastmem.registry import ErrorSignature, ErrorType, Fix, FixRegistry, FixType, create_signature

TYPES = list(ErrorType)
CONFIGS = (
    {},
    {"exponential_rate": 1.0, "linear_rate": 0.125, "min_strength": 0.5},
    {"exponential_rate": 1.0, "linear_rate": 0.1, "min_strength": 0.2},  # ties but for rounding
    {"exponential_rate": 0.5, "linear_rate": 0.0, "min_strength": 0.25},
    {"exponential_rate": 1.0, "linear_rate": 0.0, "min_strength": 0.01},  # nothing decays
    {"exponential_rate": 0.9, "linear_rate": 0.01, "min_strength": 0.0},  # nothing dies
    {"exponential_rate": 0.0, "linear_rate": 0.0, "min_strength": 0.5},  # one epoch and gone
)


def signature(number: int) -> ErrorSignature:
    return create_signature(TYPES[number % 7], f"task {number}", ["spatial"] * (number % 3), number % 11 / 10)


def fix(number: int) -> Fix:
    return Fix(FixType.ADD_ELEMENTS, {f"element {number}": float(number)})


class Pair:
    """A registry and its model, fed with the same operations."""

    def __init__(self, registry: FixRegistry, seed: int, names: int) -> None:
        self.registry = registry
        self.model = EagerRegistry(registry.decay_config)
        self.random = random.Random(seed)
        self.signatures = [signature(number) for number in range(names)]

    def step(self) -> None:
        what = self.random.choices(
            ("register", "lookup", "success", "failure", "epoch", "many"), (20, 40, 14, 14, 4, 1)
        )[0]
        known = self.random.choice(self.signatures)
        if what == "register":
            value = fix(self.random.randrange(10**6))
            self.registry.register(known, value)
            self.model.register(known.text, value)
        elif what == "lookup":
            assert self.registry.lookup(known) == self.model.lookup(known.text)
        elif what == "success":
            assert self.registry.report_success(known) == self.model.report_success(known.text)
        elif what == "failure":
            assert self.registry.report_failure(known) == self.model.report_failure(known.text)
        elif what == "epoch":
            assert self.registry.advance_epoch() == self.model.advance_epoch()
        else:
            some = [self.random.choice(self.signatures) for _ in range(5)]
            values = [fix(self.random.randrange(10**6)) for _ in some]
            self.registry.register_many(some, values)
            for one, value in zip(some, values, strict=True):
                self.model.register(one.text, value)

    def compare(self, last_access: bool = True) -> None:
        """Everything that the registry holds, against the model."""
        entries: dict[str, Any] = self.registry.entries
        assert entries.keys() == self.model.entries.keys()
        for text, expected in self.model.entries.items():
            entry = entries[text]
            assert abs(entry.strength - expected.strength) <= 1e-9
            assert entry.fix == expected.fix
            assert (entry.success_count, entry.failure_count) == (expected.successes, expected.failures)
            assert (entry.creation_epoch, entry.last_success_epoch) == (expected.created, expected.last_success)
            assert not last_access or entry.last_access_epoch == expected.last_access
        stats = self.registry.get_stats()
        assert (stats["total_entries"], stats["current_epoch"]) == (len(entries), self.model.epoch)
        assert (stats["hits"], stats["misses"]) == (self.model.hits, self.model.misses)

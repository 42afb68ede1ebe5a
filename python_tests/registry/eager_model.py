"""The registry as one would write it down: a dictionary, and a loop over all entries for each epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastmem.registry import DecayConfig


@dataclass
class Entry:
    fix: Any
    strength: float
    successes: int
    failures: int
    created: int
    last_success: int | None
    last_access: int | None


class EagerRegistry:
    def __init__(self, config: DecayConfig, capacity: int | None = None) -> None:
        self.config, self.capacity = config, capacity
        self.epoch = self.hits = self.misses = 0
        self.entries: dict[str, Entry] = {}

    def register(self, text: str, fix: Any) -> None:
        known = self.entries.get(text)
        if known:
            known.fix, known.strength, known.last_access = fix, 1.0, self.epoch
        else:
            self.entries[text] = Entry(fix, 1.0, 0, 0, self.epoch, None, self.epoch)

    def lookup(self, text: str) -> Any:
        entry = self.entries.get(text)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        entry.last_access = self.epoch
        return entry.fix

    def report_success(self, text: str) -> bool:
        entry = self.entries.get(text)
        if entry is None:
            return False
        entry.strength = min(1.0, entry.strength + 0.05)
        entry.successes += 1
        entry.last_success = entry.last_access = self.epoch
        return True

    def report_failure(self, text: str) -> bool:
        entry = self.entries.get(text)
        if entry is None:
            return False
        entry.strength = max(0.0, entry.strength - 0.1)
        entry.failures += 1
        entry.last_access = self.epoch
        if entry.strength < self.config.min_strength:
            del self.entries[text]
        return True

    def advance_epoch(self) -> int:
        self.epoch += 1
        rate, linear = self.config.exponential_rate, self.config.linear_rate
        dead = []
        for text, entry in self.entries.items():
            entry.strength = max(0.0, entry.strength * rate - linear)
            if entry.strength < self.config.min_strength:
                dead.append(text)
        for text in dead:
            del self.entries[text]
        return len(dead)

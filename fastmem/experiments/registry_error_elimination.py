"""How quickly recurring errors are eliminated: a stream of errors, each looked up, and learnt where it is not known."""

from __future__ import annotations

import random
from dataclasses import dataclass

from fastmem.experiments.registry_command import Result, error, fix, main, option, positive, table
from fastmem.registry import FixRegistry


@dataclass(frozen=True)
class Config:
    """What `run` does; the help text of a field says what it is. A number that makes no sense is a ValueError."""

    length: int = option(1000, "errors in the stream")
    unique: int = option(50, "distinct errors")
    repeat_prob: float = option(0.7, "probability that an error is one seen before; otherwise any of the distinct ones")
    window: int = option(100, "errors in a window of the hit rate")
    seed: int = option(0, "the stream")

    def __post_init__(self) -> None:
        positive(self, "length", "unique", "window")
        if not 0 <= self.repeat_prob <= 1:
            raise ValueError(f"repeat_prob: expected a number, 0 to 1, got {self.repeat_prob}")


def run(config: Config) -> Result:
    """The hit rate of the registry, and beside it the best that any memory could have: all but first occurrences."""
    generator = random.Random(config.seed)
    registry = FixRegistry()
    seen: list[int] = []
    known: set[int] = set()
    hits: list[bool] = []
    firsts = 0
    for _ in range(config.length):
        if seen and generator.random() < config.repeat_prob:
            number = generator.choice(seen)
        else:
            number = generator.randrange(config.unique)
        if number not in known:
            firsts += 1
            known.add(number)
            seen.append(number)
        signature = error(number, generator.uniform(0.1, 0.9))
        found = registry.lookup(signature)
        if found is not None and found != fix(number):
            raise RuntimeError(f"{signature} got another error's fix")
        hits.append(found is not None)
        if found is not None:
            registry.report_success(signature)
        else:
            registry.register(signature, fix(number))
    history = [
        {
            "errors": end,
            "hit_rate": sum(hits[:end]) / end,
            "window_hit_rate": _rate(hits[max(0, end - config.window) : end]),
        }
        for end in sorted({max(1, config.length * part // 20) for part in range(1, 21)})
    ]
    final = {
        "hit_rate": _rate(hits),
        "hit_rate_possible": 1 - firsts / config.length,
        "first_50_hit_rate": _rate(hits[:50]),
        "last_window_hit_rate": _rate(hits[-config.window :]),
        "distinct_errors": float(firsts),
        "hit_rate_without_memory": 0.0,
    }
    rows = [[f"{r['errors']:,}", f"{r['hit_rate']:.1%}", f"{r['window_hit_rate']:.1%}"] for r in history]
    lines = [
        *table(["errors", "hit rate", f"last {config.window}"], rows),
        f"{firsts} distinct errors; {final['hit_rate']:.1%} hits of {final['hit_rate_possible']:.1%} possible, "
        f"{final['first_50_hit_rate']:.1%} in the first 50, {final['last_window_hit_rate']:.1%} in the last window",
    ]
    return Result(final, history, lines)


def _rate(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def command(arguments: list[str] | None = None) -> int:
    """`fastmem registry error-elimination`; its exit status."""
    return main("error-elimination", __doc__, Config, run, arguments)

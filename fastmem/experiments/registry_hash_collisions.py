"""Whether two errors ever share a key, and whether one would then get the other's fix."""

from __future__ import annotations

from dataclasses import dataclass

from fastmem.experiments.registry_command import Result, error, fix, main, option, positive
from fastmem.registry import ErrorSignature, FixRegistry


@dataclass(frozen=True)
class Config:
    """What `run` does; the help text of a field says what it is. A number that makes no sense is a ValueError."""

    num_errors: int = option(100_000, "distinct errors")
    seed: int = option(0, "kept for the results file; the errors are the first so many, nothing is drawn")

    def __post_init__(self) -> None:
        positive(self, "num_errors")


def run(config: Config) -> Result:
    """Keys of that many errors, no two the same; and a key shared on purpose, where the text has to decide."""
    keys: dict[int, str] = {}
    collisions = 0
    for number in range(config.num_errors):
        signature = error(number)
        collisions += keys.setdefault(signature.key, signature.text) != signature.text
    registry = FixRegistry()
    forced = [ErrorSignature._of(f"error {number}", 7, None) for number in range(100)]
    wrong = 0
    for number, one in enumerate(forced):
        wrong += registry.lookup(one) is not None
        registry.register(one, fix(number))
    wrong += sum(registry.lookup(one) != fix(number) for number, one in enumerate(forced))
    final = {
        "errors": float(config.num_errors),
        "distinct_keys": float(len(keys)),
        "collisions": float(collisions),
        "collisions_expected": config.num_errors * (config.num_errors - 1) / 2 / 2**64,
        "forced_collisions": float(len(forced) - 1),
        "wrong_fixes": float(wrong),
    }
    lines = [
        f"{config.num_errors:,} distinct errors, {len(keys):,} distinct keys, {collisions} collisions "
        f"(expected of 64 bits: {final['collisions_expected']:.1e})",
        f"{len(forced)} errors forced onto one key: {wrong} wrong fixes",
    ]
    return Result(final, [], lines)


def command(arguments: list[str] | None = None) -> int:
    """`fastmem registry hash-collisions`; its exit status."""
    return main("hash-collisions", __doc__, Config, run, arguments)

"""How long a lookup takes as the registry grows, one by one from Python, every key distinct."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass

from fastmem.experiments.registry_command import Result, error, fix, main, numbers, option, positive, table
from fastmem.registry import FixRegistry


@dataclass(frozen=True)
class Config:
    """What `run` does; the help text of a field says what it is. A number that makes no sense is a ValueError."""

    sizes: tuple[int, ...] = option((100, 1000, 10_000, 100_000, 1_000_000), "registry sizes, comma-separated", numbers)
    lookups: int = option(10_000, "lookups for each size")
    seed: int = option(0, "which entries are looked up")

    def __post_init__(self) -> None:
        positive(self, "sizes", "lookups")


def run(config: Config) -> Result:
    """For each size: any entry at random (the caches do not know it), and one of the same 100 (they do)."""
    clock = _clock_cost()
    history = []
    for size in config.sizes:
        generator = random.Random(config.seed)
        registry = FixRegistry()
        for start in range(0, size, 100_000):
            block = range(start, min(start + 100_000, size))
            registry.register_many([error(n) for n in block], [fix(n) for n in block])
        if len(registry) != size:
            raise RuntimeError(f"{size} distinct errors gave {len(registry)} entries")
        row: dict[str, float] = {"size": size}
        for kind, among in (("any", size), ("hot", min(100, size))):
            times: list[int] = []
            while len(times) < config.lookups:
                batch = min(500, config.lookups - len(times))
                asked = [error(generator.randrange(among), generator.random()) for _ in range(batch)]
                times += _time_each(registry, asked)
            times = sorted(max(0, t - clock) for t in times)
            row |= {
                f"{kind}_mean_ns": statistics.fmean(times),
                f"{kind}_p50_ns": times[len(times) // 2],
                f"{kind}_p99_ns": times[min(len(times) - 1, int(len(times) * 0.99))],
            }
        row["bytes_per_entry"] = registry.get_stats()["memory_bytes"] / size
        history.append(row)
    first = history[0]
    header = ["size", "any: mean ns", "p50", "p99", "vs first", "hot: mean ns", "p50", "p99", "vs first", "bytes/entry"]
    lines = list(
        table(
            header,
            [
                [f"{row['size']:,}"]
                + [
                    cell
                    for kind in ("any", "hot")
                    for cell in (
                        f"{row[f'{kind}_mean_ns']:.0f}",
                        f"{row[f'{kind}_p50_ns']:.0f}",
                        f"{row[f'{kind}_p99_ns']:.0f}",
                        f"{row[f'{kind}_mean_ns'] / max(1e-9, first[f'{kind}_mean_ns']):.2f}x",
                    )
                ]
                + [f"{row['bytes_per_entry']:.0f}"]
                for row in history
            ],
        )
    )
    lines.append(f"any: of all entries; hot: of the same 100. The clock's own {clock} ns are taken off each time.")
    return Result({key: value for key, value in history[-1].items()}, history, lines)


def _time_each(registry: FixRegistry, asked: list) -> list[int]:
    lookup, now, times = registry.lookup, time.perf_counter_ns, []
    for signature in asked:
        start = now()
        found = lookup(signature)
        end = now()
        times.append(end - start)
        if found is None:
            raise RuntimeError(f"{signature} was registered and is not found")
    return times


def _clock_cost() -> int:
    now, times = time.perf_counter_ns, []
    for _ in range(20_000):
        start = now()
        end = now()
        times.append(end - start)
    return sorted(times)[len(times) // 2]


def command(arguments: list[str] | None = None) -> int:
    """`fastmem registry lookup-latency`; its exit status."""
    return main("lookup-latency", __doc__, Config, run, arguments)

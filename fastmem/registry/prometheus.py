"""A registry's numbers in Prometheus' text exposition format, version 0.0.4."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from fastmem.registry.fix_registry import FixRegistry

STRENGTHS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # upper bounds of the histogram

# get_stats' name -> (metric, type, help); those that a registry does not keep are left out
_METRICS = {
    "total_entries": ("entries", "gauge", "Fixes that are held now."),
    "current_epoch": ("epoch", "gauge", "Epochs that have passed."),
    "hits": ("hits_total", "counter", "Lookups that found a fix."),
    "misses": ("misses_total", "counter", "Lookups that found none."),
    "registrations": ("registrations_total", "counter", "Fixes registered, known errors included."),
    "pruned": ("pruned_total", "counter", "Entries that died of decay or failure."),
    "capacity": ("capacity_entries", "gauge", "The most entries that are held."),
    "memory_bytes": (
        "memory_bytes",
        "gauge",
        "Memory of the table; for a registry in Redis estimated, fixes included.",
    ),
}


def metrics_text(registry: FixRegistry, labels: dict[str, str] | None = None) -> str:
    """What a scrape returns: entries, epoch, hits, misses, memory, and the histogram of strengths as they are now.

    Reads every entry: about a second for a million.

    Args:
        labels: put on every sample, such as {"registry": "agent 7"}; names are letters, digits and underscores.
    """
    fixed = "".join(f'{name}="{_escaped(value)}",' for name, value in (labels or {}).items())
    lines: list[str] = []
    stats = registry.get_stats()
    for name, (metric, kind, words) in _METRICS.items():
        if stats.get(name) is not None:
            lines += _described(metric, kind, words)
            lines.append(_sample(metric, fixed, stats[name]))
    lines += _described("strength", "histogram", "Strengths of the fixes that are held now.")
    lines += _histogram(fixed, (entry.strength for entry in registry.iter_entries()))
    return "\n".join(lines) + "\n"


def _histogram(fixed: str, strengths: Iterable[float]) -> Iterable[str]:
    counts = [0] * len(STRENGTHS)
    total = 0.0
    for strength in strengths:
        counts[bisect_left(STRENGTHS, strength)] += 1  # no strength is above 1
        total += strength
    below = 0
    for bound, count in zip(STRENGTHS, counts, strict=True):
        below += count
        yield _sample("strength_bucket", f'{fixed}le="{bound}"', below)
    yield _sample("strength_bucket", f'{fixed}le="+Inf"', below)
    yield _sample("strength_sum", fixed, total)
    yield _sample("strength_count", fixed, below)


def _described(metric: str, kind: str, words: str) -> list[str]:
    return [f"# HELP fastmem_registry_{metric} {words}", f"# TYPE fastmem_registry_{metric} {kind}"]


def _sample(metric: str, labels: str, value: float) -> str:
    inside = labels.rstrip(",")
    return f"fastmem_registry_{metric}{f'{{{inside}}}' if inside else ''} {value}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

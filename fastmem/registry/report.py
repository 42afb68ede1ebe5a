"""A registry on one page: HTML with its own style and drawings, nothing fetched, no scripts."""

from __future__ import annotations

import heapq
import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from html import escape
from pathlib import Path

from fastmem.registry.decay import DecayConfig
from fastmem.registry.fix import Fix
from fastmem.registry.fix_registry import FixEntry, FixRegistry
from fastmem.registry.report_charts import bars, by_epoch
from fastmem.registry.taxonomy import ErrorSeverity, ErrorType, parse_text

_MINUS, _NONE = "\N{MINUS SIGN}", "\N{EN DASH}"
STRENGTH_BINS = 20
SOON = 10  # epochs
_HOTTEST = 20
_FAR = 100_000  # epochs; deaths beyond are not told apart


def report(registry: FixRegistry) -> str:
    """The page as text: size, hit rate, epoch, strengths, births and deaths by epoch, hottest fixes.

    Reads every entry. Whatever the texts of a registry hold, they are shown as text.
    """
    seen = _gather(registry)
    stats = registry.get_stats()
    epoch = stats["current_epoch"]
    sections = [_tiles(stats, seen)]
    if seen.strengths:
        sections += [
            _strengths(seen),
            '<div class="two">' + _births(seen, epoch) + _deaths(seen, epoch) + "</div>",
            _kinds(seen),
            _hottest(seen.hottest, epoch, _lifetime(registry.decay_config)),
        ]
    else:
        sections.append('<section><p class="empty">No fix is held yet.</p></section>')
    where = "in memory" if registry.location is None else str(registry.location)
    rule = registry.decay_config
    about = (
        f"An epoch takes a strength s to {rule.exponential_rate:g} s {_MINUS} {rule.linear_rate:g}; "
        f"below {rule.min_strength:g} a fix is forgotten."
    )
    return _PAGE.format(
        title=escape(f"Fix registry {where}"),
        where=escape(where),
        about=escape(about),
        when=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        style=_STYLE,
        body="\n".join(sections),
    )


@dataclass
class _Seen:
    """What one pass over the entries gathers."""

    strengths: list[float] = field(default_factory=list)
    births: Counter[int] = field(default_factory=Counter)
    deaths: Counter[int | None] = field(default_factory=Counter)
    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    successes: int = 0
    failures: int = 0
    hottest: list[FixEntry] = field(default_factory=list)


def _gather(registry: FixRegistry) -> _Seen:
    seen = _Seen()
    epoch, lifetime = registry.current_epoch, _lifetime(registry.decay_config)

    def noted() -> Iterable[FixEntry]:
        for entry in registry.iter_entries():
            seen.strengths.append(entry.strength)
            seen.births[entry.creation_epoch] += 1
            life = lifetime(entry.strength)
            seen.deaths[None if life is None else epoch + life] += 1
            severity, error_type, _ = [*entry.signature.split(":", 2), "", ""][:3]
            seen.kinds[error_type, severity] += 1
            seen.successes += entry.success_count
            seen.failures += entry.failure_count
            yield entry

    seen.hottest = heapq.nlargest(_HOTTEST, noted(), key=lambda e: (e.success_count, e.strength, -e.failure_count))
    return seen


def _lifetime(rule: DecayConfig) -> Callable[[float], int | None]:
    """A function that says after how many epochs without events a strength falls below the minimum; None: never, or
    after more than 100,000."""
    limits = [rule.min_strength]  # with less than limits[k], an entry is dead after k epochs
    while limits[-1] <= 1.0 and len(limits) <= _FAR:
        rate = rule.exponential_rate
        before = (limits[-1] + rule.linear_rate) / rate if rate else float("inf")
        if rule.min_strength == 0.0 or before <= limits[-1]:
            return lambda strength: None
        limits.append(before)

    def lifetime(strength: float) -> int | None:
        epochs = bisect_right(limits, strength)
        return epochs if epochs < len(limits) else None

    return lifetime


def _tiles(stats: dict, seen: _Seen) -> str:
    lookups, reports = stats["hits"] + stats["misses"], seen.successes + seen.failures
    epoch = stats["current_epoch"]
    soon = sum(count for death, count in seen.deaths.items() if death is not None and death <= epoch + SOON)
    room = f"of {stats['capacity']:,} at most" if stats["capacity"] else "no bound"
    tiles = [
        ("Fixes", f"{stats['total_entries']:,}", room),
        ("Hit rate", _share(stats["hits"], lookups), f"{stats['hits']:,} of {lookups:,} lookups"),
        ("Epoch", f"{epoch:,}", "epochs have passed"),
        ("Median strength", f"{statistics.median(seen.strengths):.2f}" if seen.strengths else _NONE, "1 is fresh"),
        ("Fading", f"{soon:,}", f"gone within {SOON} epochs, if nothing happens"),
        ("Fixes that helped", _share(seen.successes, reports), f"{seen.successes:,} of {reports:,} reports"),
    ]
    inside = "".join(
        f'<div class="tile"><h2>{name}</h2><p class="value">{value}</p><p class="note">{note}</p></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{inside}</div>'


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else _NONE


def _strengths(seen: _Seen) -> str:
    counts = [0] * STRENGTH_BINS
    for strength in seen.strengths:
        counts[min(STRENGTH_BINS - 1, int(strength * STRENGTH_BINS))] += 1
    names = [f"{i / STRENGTH_BINS:.2f} to {(i + 1) / STRENGTH_BINS:.2f}" for i in range(STRENGTH_BINS)]
    ticks = [(i / 5, f"{i / 5:.1f}") for i in range(6)]
    return _chart("Strength", "How many fixes have which strength now.", bars("strength", counts, names, ticks))


def _births(seen: _Seen, epoch: int) -> str:
    note = "Fixes that live now, by the epoch they were first registered in. Those that are gone are not counted."
    return _chart("Births", note, by_epoch("births", seen.births, min(seen.births), epoch))


def _deaths(seen: _Seen, epoch: int) -> str:
    dated = {death: count for death, count in seen.deaths.items() if death is not None}
    note = "When the fixes that live now will go if nothing happens to them: a forecast, not a record."
    if never := seen.deaths[None]:
        note += f" {never:,} never will, or not within {_FAR:,} epochs."
    chart = by_epoch("deaths", dated, epoch + 1, max(dated)) if dated else ""
    return _chart("Deaths ahead", note, chart)


def _chart(title: str, note: str, chart: str) -> str:
    return f'<section><h2>{title}</h2><p class="note">{note}</p>{chart}</section>'


def _kinds(seen: _Seen) -> str:
    """Error types by severities, darker where there are more."""
    severities = [member.value for member in ErrorSeverity]
    most = max(seen.kinds.values())
    rows = []
    for error_type in (member.value for member in ErrorType):
        counts = [seen.kinds[error_type, severity] for severity in severities]
        cells = "".join(_cell(count, most) for count in counts)
        rows.append(f'<tr><th scope="row">{error_type}</th>{cells}<td class="sum">{sum(counts):,}</td></tr>')
    head = "".join(f'<th scope="col">{severity}</th>' for severity in severities)
    table = f'<table class="kinds"><tr><td></td>{head}<th scope="col">all</th></tr>{"".join(rows)}</table>'
    note = "How many fixes there are for which kind of error, and how bad it was."
    return f'<section><h2>What they mend</h2><p class="note">{note}</p><div class="scroll">{table}</div></section>'


def _cell(count: int, most: int) -> str:
    if not count:
        return '<td class="none">·</td>'
    depth = 0.08 + 0.92 * count / most
    return f'<td class="{"deep" if depth > 0.7 else "pale"}" style="--depth:{depth:.2f}">{count:,}</td>'


def _hottest(entries: list[FixEntry], epoch: int, lifetime: Callable[[float], int | None]) -> str:
    rows = "".join(_row(place, entry, epoch, lifetime(entry.strength)) for place, entry in enumerate(entries, 1))
    names = ("", "Error", "Fix", "Strength", "Helped", "Failed", "Last used", "Gone in")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        '<section><h2>Hottest fixes</h2><p class="note">Most successes first. Epochs ago, and epochs from now if '
        f'nothing happens.</p><div class="scroll"><table class="hot"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _row(place: int, entry: FixEntry, epoch: int, life: int | None) -> str:
    try:
        severity, error_type, context, categories = parse_text(entry.signature)
    except ValueError:
        severity, error_type, context, categories = "", "", entry.signature, []
    tags = "".join(f'<span class="tag">{escape(tag)}</span>' for tag in (severity, error_type, *categories) if tag)
    used = "never" if entry.last_access_epoch is None else f"{epoch - entry.last_access_epoch:,}"
    meter = f'<span class="meter"><span style="width:{100 * entry.strength:.0f}%"></span></span>'
    numbers = (
        ("Strength", f"{meter} {entry.strength:.2f}"),
        ("Helped", f"{entry.success_count:,}"),
        ("Failed", f"{entry.failure_count:,}"),
        ("Last used", used),
        ("Gone in", _NONE if life is None else f"{life:,}"),
    )
    cells = "".join(f'<td data-name="{name}">{value}</td>' for name, value in numbers)
    return (
        f'<tr><td class="place">{place}</td><td class="what"><div class="context">{_shown(context)}</div>{tags}</td>'
        f'<td class="what">{_fix(entry.fix)}</td>{cells}</tr>'
    )


def _fix(fix: Fix) -> str:
    parts = [
        *(f"+ {name} {_number(value)}" for name, value in fix.elements_to_add.items()),
        *(f"{_MINUS} {name}" for name in fix.elements_to_remove),
        *(f"{name} = {_number(value)}" for name, value in fix.value_adjustments.items()),
        *(f"{old} → {new}" for old, new in fix.category_moves.items()),
        *([f"“{fix.definition_supplement}”"] if fix.definition_supplement else []),
        *(fix.decomposition or []),
    ]
    more = f", and {len(parts) - 4} more" if len(parts) > 4 else ""
    return f'<span class="tag fix">{fix.fix_type.value}</span> {_shown(", ".join(parts[:4]))}{more}'


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown(text: str, most: int = 160) -> str:
    return escape(text if len(text) <= most else text[: most - 1] + "…") or '<span class="none">(empty)</span>'


_STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>Fix registry</h1><p class="where">{where}</p><p class="note">{about}</p></header>
<main>
{body}
</main>
<footer>As it was on {when}.</footer>
</body>
</html>
"""

"""A registry as a text file, to keep, to read elsewhere and to bring into another registry.

The first line is about the registry, the last one says how many entries there are, and each line between is one entry:

    {"fastmem": "fix registry", "schema": 1, "epoch": 12, "hits": 40, "misses": 2, "decay": {"exponential_rate": ...}}
    {"signature": "major:removal:task:['spatial']", "error_signature_hash": "...", "fix": {...}, "strength": 0.93, ...}
    {"entries": 1}

Strengths are as of the epoch of the first line, with all their digits.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any, TextIO

from fastmem.registry.decay import DecayConfig
from fastmem.registry.fix import Fix
from fastmem.registry.fix_registry import FixEntry, FixRegistry
from fastmem.registry.taxonomy import parse_text, text_key

SCHEMA = 1
_KIND = "fix registry"
_BLOCK = 10_000  # entries that are brought in, and in a file committed, together
_MOST = 2**31 - 1  # of epochs and counts
_FIELDS = {field.name for field in dataclasses.fields(FixEntry)}


def export(registry: FixRegistry, file: TextIO) -> int:
    """Write the registry to a text file. What others change meanwhile may or may not be in it.

    Returns:
        How many entries were written.
    """
    stats = registry.get_stats()
    about = {"fastmem": _KIND, "schema": SCHEMA, "epoch": stats["current_epoch"]}
    counts = {"hits": stats["hits"], "misses": stats["misses"]}
    _write(file, about | counts | {"decay": dataclasses.asdict(registry.decay_config)})
    count = 0
    for entry in registry.iter_entries():
        count += 1
        _write(file, {name: getattr(entry, name) for name in FixEntry.__slots__} | {"fix": entry.fix.to_dict()})
    _write(file, {"entries": count})
    return count


def load(registry: FixRegistry, file: Iterable[str]) -> int:
    """Bring the entries of an `export` into a registry.

    What the registry has wins: a signature that it knows keeps its fix and its history. A new entry comes with its
    strength and its counts, and as old as it was: its epochs are moved by the difference of the two clocks (at least to
    0). From then on the registry's own decay rule holds. A registry without entries, epochs and lookups takes over the
    clock and the counts of hits and misses too, so that it is as the exported one was.

    Entries are brought in by the ten thousand. After an error those of earlier blocks are there; loading the mended
    file again is harmless.

    Returns:
        How many entries are new.

    Raises:
        ValueError: a line that is not of an export, named by its number; a newer schema; a file cut short; or more
            entries than the registry's capacity.
    """
    lines = enumerate(file, 1)
    about = _header(lines)
    stats = registry.get_stats()
    if not any(stats[name] for name in ("total_entries", "current_epoch", "hits", "misses")):
        registry._start_at(about["epoch"], about["hits"], about["misses"])
    shift = registry.current_epoch - about["epoch"]
    new = number = 0
    block: list[FixEntry] = []

    def bring() -> int:
        try:
            done = registry._adopt(block)
        except ValueError as error:
            raise ValueError(f"line {number}, and up to {len(block) - 1} before it: {error}") from error
        registry._written()
        block.clear()
        return done

    for number, line in lines:
        value = _value(number, line)
        if "entries" in value:
            count = number - 2  # lines between the first one and this
            if value != {"entries": count}:
                raise ValueError(
                    f"line {number}: expected {count} entries, as there are lines, got {value['entries']!r}"
                )
            for number, line in lines:
                if line.strip():
                    raise ValueError(f"line {number}: expected nothing after the count of entries")
            return new + bring()
        block.append(_entry(number, value, about["epoch"], shift))
        if len(block) == _BLOCK:
            new += bring()
    raise ValueError(f"line {number + 1}: the file was cut short: its last line, the count of entries, is missing")


def decay_rule(file: Iterable[str]) -> DecayConfig:
    """The rule of the exported registry. Raises ValueError where the first line is not of an export."""
    return _header(enumerate(file, 1))["decay"]


def _write(file: TextIO, value: dict[str, Any]) -> None:
    file.write(json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n")


def _header(lines: Iterable[tuple[int, str]]) -> dict[str, Any]:
    for number, line in lines:
        about = _value(number, line)
        if about.get("fastmem") != _KIND:
            break
        schema = about.get("schema")
        if type(schema) is int and schema > SCHEMA:
            raise ValueError(f"line {number}: schema {schema} is of a newer fastmem; this one knows {SCHEMA}")
        for name in ("epoch", "hits", "misses"):
            _check(number, name, about.get(name), type(about.get(name)) is int and about[name] >= 0)
        _check(number, "epoch", about["epoch"], about["epoch"] <= _MOST)
        try:
            return about | {"decay": DecayConfig(**about["decay"])}
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"line {number}: decay: {error}") from None
    raise ValueError("line 1: not an export of a fix registry")


def _value(number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}") from None
    _check(number, "line", value, isinstance(value, dict))
    return value


def _entry(number: int, value: dict[str, Any], epoch: int, shift: int) -> FixEntry:
    if value.keys() != _FIELDS:
        odd = min(value.keys() ^ _FIELDS)
        raise ValueError(f"line {number}: {'unknown field' if odd in value else 'missing field'} {odd!r}")
    text, strength, fix_data = value["signature"], value["strength"], value["fix"]
    _check(number, "signature", text, isinstance(text, str))
    try:
        parse_text(text)
        key = f"{text_key(text):016x}"
        fix = Fix.from_dict(fix_data)
        fix.to_json()  # JSON's 1e999 is read as infinity, which no registry can write
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None
    _check(number, "error_signature_hash", value["error_signature_hash"], value["error_signature_hash"] == key)
    _check(number, "strength", strength, type(strength) in (int, float) and 0 <= strength <= 1)
    for name in ("success_count", "failure_count"):
        _check(number, name, value[name], type(value[name]) is int and 0 <= value[name] <= _MOST)

    def moved(name: str, may_be_none: bool) -> Any:
        past = value[name]
        _check(number, name, past, may_be_none if past is None else type(past) is int and 0 <= past <= epoch)
        return None if past is None else max(0, past + shift)

    return FixEntry(
        text,
        key,
        fix,
        float(strength),
        value["success_count"],
        value["failure_count"],
        moved("creation_epoch", False),
        moved("last_success_epoch", True),
        moved("last_access_epoch", True),
    )


def _check(number: int, name: str, value: Any, right: bool) -> None:
    if not right:
        raise ValueError(f"line {number}: {name}: unexpected {str(value)[:80]!r}")

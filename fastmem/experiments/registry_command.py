"""What the registry's experiments share: distinct errors, a command line from a Config, a results file."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastmem.experiments import results
from fastmem.registry import ErrorSeverity, ErrorSignature, ErrorType, Fix, FixType

SEVERITIES, TYPES = list(ErrorSeverity), list(ErrorType)
CATEGORIES = (["spatial"], ["temporal"], ["physical"], ["physical", "spatial"])
FIX_TYPES = dict(zip(TYPES, FixType, strict=False))


def error(number: int, delta: float = 0.5) -> ErrorSignature:
    """The error of this number; two numbers never share a signature."""
    return ErrorSignature(SEVERITIES[number % 4], TYPES[number % 7], f"task_{number}", CATEGORIES[number % 4], delta)


def fix(number: int) -> Fix:
    """A fix that no other number has."""
    return Fix(FIX_TYPES[TYPES[number % 7]], {f"element_{number}": 1.0})


@dataclasses.dataclass(frozen=True)
class Result:
    """What an experiment's `run` returns: numbers, their course, and what is printed."""

    final: Mapping[str, float]
    history: list[dict[str, Any]]
    lines: list[str]


def main(name: str, document: str, config_class: Any, run: Callable[[Any], Result], arguments: list[str] | None) -> int:
    """Read a Config from the command line, run, print, and write a results file where one is asked for.

    A field's metadata gives its help text ("help") and how its text is read ("type").
    """
    parser = argparse.ArgumentParser(f"fastmem registry {name}", description=document)
    for field in dataclasses.fields(config_class):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=field.metadata.get("type", type(field.default)),
            default=field.default,
            help=f"{field.metadata['help']} (default: {shown(field.default)})",
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a results file")
    options = vars(parser.parse_args(arguments))
    json_path = options.pop("json")
    config = config_class(**options)
    start = time.perf_counter()
    result = run(config)
    print("\n".join(result.lines))
    if json_path is not None:
        meta = results.meta(
            device="cpu", dtype=None, backend="cpp", wall_s=time.perf_counter() - start, chance={}, ceiling={}
        )
        parts = {"model": {"name": "FixRegistry"}, "task": config, "training": {}}
        results.write(json_path, parts, [results.Run(config.seed, result.final, result.history)], meta)
        print(f"written to {json_path}")
    return 0


def option(default: Any, help: str, type: Any = None) -> Any:
    """A field of a Config."""
    return dataclasses.field(default=default, metadata={"help": help} | ({"type": type} if type else {}))


def numbers(text: str) -> tuple[int, ...]:
    """ "100,1000" as numbers."""
    return tuple(int(part) for part in text.split(","))


def shown(value: Any) -> str:
    """A value of a field as one would type it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Lines of a table, columns aligned to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def positive(config: Any, *names: str) -> None:
    """Raise ValueError unless each of these fields, or each of its numbers, is above 0."""
    for name in names:
        value = getattr(config, name)
        if not all(item > 0 for item in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name}: expected more than 0, got {shown(value)}")

"""`fastmem registry`: a registry of fixes from the command line. Needs no torch; what it runs is imported when called.

A LOCATION is a file, or the redis:// address of a server, as for `FixRegistry`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from fastmem.registry import DecayConfig, FixRegistry

# The experiments: modules registry_NAME with a command(arguments).
EXPERIMENTS = {
    "lookup-latency": "how long a lookup takes, by the number of entries",
    "error-elimination": "how many errors come again once their fix is known",
    "memory-decay": "which fixes outlive how many epochs",
    "hash-collisions": "whether two signatures share a key",
    "dream-coverage": "how often a fix was dreamed of before its error came",
    "api-client": "a client of a JSON API whose broken answers are repaired by learnt fixes",
}
_PIPE = 1 << 20  # bytes; a larger pipe means larger blocks, which cost fewer commits


def main(arguments: list[str]) -> int:
    """Run `fastmem registry NAME ...`; the exit status."""
    if arguments and arguments[0] in _experiments():
        return import_module(_module(arguments[0])).command(arguments[1:]) or 0
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int | None] = options.run
    return run(options) or 0


_STREAM_LINES = """lines, each answered by one with "ok" (and "error", if false); an "id" comes back:
    {"op": "register", "signature": {"severity": "major", "error_type": "removal", "context": "task",
                                     "affected_categories": ["spatial"], "delta": 0.6}, "fix": {"fix_type": "add"}}
    {"op": "lookup", "signature": {...}, "id": 7}
    {"op": "success", ...} and "failure", with a signature; "epoch" and "stats", without one
the first one is wrapped here; docs/guides/fix_registry.md has all that may stand in them"""


def _module(experiment: str) -> str:
    return f"fastmem.experiments.registry_{experiment.replace('-', '_')}"


def _experiments() -> dict[str, str]:
    return {name: words for name, words in EXPERIMENTS.items() if find_spec(_module(name)) is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fastmem registry",
        description="A registry of fixes: from the failure to what mends it.",
        epilog="experiments, each with --help of its own:\n"
        + "\n".join(f"    {name:17} {words}" for name, words in _experiments().items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")

    def command(run: Callable[[argparse.Namespace], int | None], words: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__.strip("_"), help=words, description=words)
        sub.set_defaults(run=run)
        return sub

    def location(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("location", metavar="LOCATION", help="a registry's file or redis:// address")

    sub = command(_stream, "answer JSON lines from standard input on standard output")
    sub.formatter_class = argparse.RawDescriptionHelpFormatter
    sub.epilog = _STREAM_LINES
    sub.add_argument("location", metavar="LOCATION", nargs="?", help="a file or redis:// address; none: in memory")
    sub.add_argument("--capacity", type=int, help="the most entries to hold")
    sub.add_argument("--durability", choices=("full", "normal"), default="full", help="what a power cut may cost")
    sub = command(_report, "write one page that shows a registry")
    location(sub)
    sub.add_argument("-o", "--output", default="report.html", metavar="FILE", help="the page (default: report.html)")
    location(command(_metrics, "print a registry's numbers for Prometheus"))
    sub = command(_export, "write a registry as JSON lines")
    location(sub)
    sub.add_argument("file", metavar="FILE", help="where to; -: standard output")
    sub = command(_import, "bring exported entries into a registry; what it knows already stays")
    location(sub)
    sub.add_argument("file", metavar="FILE", help="an export; -: standard input")
    location(command(_check, "read a registry's file from end to end and say what is wrong with it"))
    return parser


def _stream(options: argparse.Namespace) -> None:
    from fastmem.registry import FixRegistry
    from fastmem.registry.stream import serve

    if sys.stdin is None or sys.stdout is None:
        raise ValueError("registry stream: standard input or output is closed")
    for pipe in (sys.stdin.fileno(), sys.stdout.fileno()):
        os.set_blocking(pipe, True)  # a caller may have left its end otherwise, and "nothing yet" is not the end
        _widen(pipe)
    with FixRegistry(options.location, capacity=options.capacity, durability=options.durability) as registry:
        serve(registry, sys.stdin.buffer, sys.stdout.buffer)


def _widen(pipe: int) -> None:
    with contextlib.suppress(ImportError, AttributeError, OSError):  # no pipe, not Linux, or too many of them
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)  # type: ignore[attr-defined]


def _report(options: argparse.Namespace) -> None:
    from fastmem._files import atomic_write
    from fastmem.registry.report import report

    _other_than(options.location, options.output)
    with _existing(options.location) as registry:
        page = report(registry)
    atomic_write(options.output, page.encode(errors="backslashreplace"))
    print(options.output)


def _metrics(options: argparse.Namespace) -> None:
    from fastmem.registry.prometheus import metrics_text

    with _existing(options.location) as registry:
        print(metrics_text(registry), end="")


def _export(options: argparse.Namespace) -> None:
    from fastmem.registry.json_lines import export

    _other_than(options.location, options.file)
    with _existing(options.location) as registry, _text(options.file, "w") as file:
        count = export(registry, file)
        file.flush()
    print(f"{count} entries", file=sys.stderr)


def _import(options: argparse.Namespace) -> None:
    from fastmem.registry.json_lines import decay_rule, load

    with _text(options.file, "r") as file:
        first = file.readline()  # read once, since standard input cannot be read again
        with _target(options.location, decay_rule([first])) as registry:
            new = load(registry, _after(first, file))
            print(f"{new} new entries, {len(registry)} in all", file=sys.stderr)


def _check(options: argparse.Namespace) -> int:
    from fastmem.registry.sqlite_registry import check

    if "://" in options.location:
        raise ValueError(f"check: expected a registry's file, got {options.location}")
    found = check(options.location)
    print("\n".join([*found.problems, f"{found.entries} sound entries, epoch {found.epoch}"]))
    return 1 if found.problems else 0


def _other_than(location: str, file: str | os.PathLike[str]) -> None:
    """Refuse to write over the registry that is read."""
    if os.path.exists(location) and os.path.exists(file) and os.path.samefile(location, file):
        raise ValueError(f"{file} is the registry itself")


def _existing(location: str) -> FixRegistry:
    """The registry there; reading from a name that was mistyped must not make one."""
    from fastmem.registry import FixRegistry

    if not _in_redis(location) and not os.path.exists(location):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), location)
    return FixRegistry(location)


def _target(location: str, rule: DecayConfig) -> FixRegistry:
    """The registry there, with its own rule, or a new one with this rule."""
    from fastmem.registry import FixRegistry

    if not _in_redis(location):
        return FixRegistry(location, None if os.path.exists(location) else rule)
    try:
        return FixRegistry(location, rule)
    except ValueError:  # there is one, with another rule; what else may be wrong, this call will say
        return FixRegistry(location)


def _in_redis(location: str) -> bool:
    return location.startswith(("redis://", "rediss://", "unix://"))


def _text(name: str, mode: str) -> Any:
    if name == "-":
        return contextlib.nullcontext(sys.stdin if mode == "r" else sys.stdout)
    return open(name, mode, encoding="utf-8", newline="\n")


def _after(first: str, file: TextIO) -> Iterator[str]:
    yield first
    yield from file

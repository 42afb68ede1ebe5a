"""The results file of an experiment: one JSON per experiment and configuration, schema 1.

    {"schema": 1,
     "config": {"model": {...}, "task": {...}, "training": {...}},
     "runs": [{"seed": 0, "history": [{...}, ...], "final": {"accuracy": 0.98}}, ...],
     "aggregate": {"num_runs": 3, "accuracy_mean": 0.98, "accuracy_std": 0.004},
     "meta": {"git", "versions", "device", "dtype", "backend", "wall_s", "command", "chance", "ceiling"}}

Standard deviations are those of a sample (ddof = 1), null for a single run. What is not a number in Python (NaN,
infinity) is null in the file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmem import _native, _system
from fastmem._files import atomic_write

if TYPE_CHECKING:
    import torch

SCHEMA = 1
CONFIG_KEYS = {"model", "task", "training"}
META_KEYS = {"git", "versions", "device", "isa", "dtype", "backend", "wall_s", "command", "chance", "ceiling"}


class ResultsError(ValueError):
    """A file or a dict that is not a results file of this schema; one line that says what is wrong."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One seed of an experiment.

    Attributes:
        seed: the seed that set everything.
        final: metric -> its value at the end, a number.
        history: one dict per evaluation, in order.
    """

    seed: int
    final: Mapping[str, float]
    history: Sequence[Mapping[str, Any]] = ()


def aggregate(runs: Sequence[Run]) -> dict[str, Any]:
    """Mean and sample standard deviation of every final metric over the runs.

    Returns:
        {"num_runs": n, "<metric>_mean": ..., "<metric>_std": ...}; the deviation of one run is None, and both are None
        where a run's value is not finite.

    Raises:
        ValueError: if there are no runs, two share a seed, or they do not have the same metrics.
    """
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    seeds = [run.seed for run in runs]
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"runs: expected distinct seeds, got {seeds}")
    summary: dict[str, Any] = {"num_runs": len(runs)}
    for run in runs:
        if run.final.keys() != runs[0].final.keys():
            raise ValueError(f"runs: seed {run.seed} has metrics {sorted(run.final)}, others {sorted(runs[0].final)}")
    for metric in runs[0].final:
        values = [float(run.final[metric]) for run in runs]
        finite = all(map(math.isfinite, values))
        summary[f"{metric}_mean"] = statistics.fmean(values) if finite else None
        summary[f"{metric}_std"] = statistics.stdev(values) if finite and len(values) > 1 else None
    return summary


def meta(
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    backend: str | Mapping[str, str],
    wall_s: float,
    chance: float | Mapping[str, float],
    ceiling: float | Mapping[str, float],
    command: str | None = None,
) -> dict[str, Any]:
    """How a result was made, for the file's "meta".

    Args:
        device: where it ran; written as the hardware's name.
        dtype: type of the parameters; None where torch has no part in it.
        backend: the backend used, or op -> backend.
        wall_s: seconds that the whole experiment took.
        chance, ceiling: what guessing and what perfect memory reach; a number, or metric -> number.
        command: what reproduces it; by default this process's command line.
    """
    name = _system.gpu_name() if str(device).startswith("cuda") else None
    threads = 1
    if dtype is not None:
        import torch

        threads = torch.get_num_threads()
    return {
        "git": _system.git_commit(),
        "versions": _system.versions(),
        "device": name or _system.cpu_device(threads),
        "isa": _native.isa,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "backend": backend if isinstance(backend, str) else dict(backend),
        "wall_s": round(wall_s, 3),
        "command": command or this_command(),
        "chance": chance,
        "ceiling": ceiling,
    }


def this_command() -> str:
    """The command line of this process, as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name:
        name = spec.name.removesuffix(".__main__")
        return shlex.join(["python", "-m", name, *sys.argv[1:]])
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def build(config: Mapping[str, Any], runs: Sequence[Run], meta: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a results file, as `read` gives it back.

    Args:
        config: "model", "task" and "training", each a dict or a dataclass.
        runs: one per seed.
        meta: what `meta()` returns.

    Raises:
        ResultsError, ValueError: if a part is missing or wrong.
    """
    content = plain(
        {
            "schema": SCHEMA,
            "config": config,
            "runs": [{"seed": r.seed, "history": list(r.history), "final": r.final} for r in runs],
            "aggregate": aggregate(runs),
            "meta": meta,
        }
    )
    check(content, "results")
    return content


def write(path: str | Path, config: Mapping[str, Any], runs: Sequence[Run], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Write a results file; an older file stays whole until the new one is complete.

    Args:
        path: where to; its folder is made.
        config, runs, meta: as `build` takes them.

    Returns:
        what was written.

    Raises:
        ResultsError, ValueError: as `build`; nothing is written.
        OSError: if it cannot be written; the old file is intact.
    """
    content = build(config, runs, meta)
    write_json(path, content)
    return content


def read(path: str | Path) -> dict[str, Any]:
    """Read a results file and check it.

    Raises:
        ResultsError: if it is no results file of this schema.
        OSError: if it cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path}: not JSON ({error})") from None
    check(content, str(path))
    return content


def check(content: Any, name: str) -> None:
    """Raise ResultsError unless `content` has the schema's parts, and its aggregate is that of its runs."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        got = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ResultsError(f"{name}: expected schema {SCHEMA}, got {got!r}")
    for key, wanted in (("config", CONFIG_KEYS), ("meta", META_KEYS - {"isa"})):  # older files do not name it
        part = content.get(key)
        if not isinstance(part, dict) or not wanted <= part.keys():
            got = sorted(part) if isinstance(part, dict) else type(part).__name__
            raise ResultsError(f"{name}: {key}: expected {', '.join(sorted(wanted))}, got {got}")
    try:
        runs = [
            Run(r["seed"], {k: math.nan if v is None else v for k, v in r["final"].items()}, r["history"])
            for r in content["runs"]
        ]
        expected = aggregate(runs)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ResultsError(f"{name}: runs: {error!r}") from None
    got = content.get("aggregate")
    if not isinstance(got, dict) or got.keys() != expected.keys():
        raise ResultsError(f"{name}: aggregate: expected {sorted(expected)}")
    for key, value in expected.items():
        close = got[key] == value or (None not in (value, got[key]) and math.isclose(got[key], value, rel_tol=1e-9))
        if not close:
            raise ResultsError(f"{name}: aggregate: {key} is {got[key]}, but the runs give {value}")


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: dataclasses and mappings become dicts, what is not finite None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, bool | int | str | None):
        return value
    if hasattr(value, "item"):  # a numpy or torch scalar
        return plain(value.item())
    if isinstance(value, Path) or type(value).__module__ == "torch":  # a dtype or device; torch may be missing
        return str(value).removeprefix("torch.")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise TypeError(f"results: cannot write a {type(value).__name__} as JSON")


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON in one step: a crash or a full disk leaves the old file as it was."""
    atomic_write(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

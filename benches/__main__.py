"""python -m benches rows                             time every row with pytest-benchmark
python -m benches ratios [OUT] [--only TEXT]      measure every claimed ratio, candidates interleaved
python -m benches evidence                        put the tables of all committed results into the README
python -m benches report FILE [BASE] [--png PNG]   print the tables of a results file, against an older one

FILE and BASE are files that `ratios` or `pytest benches --benchmark-json=FILE` wrote.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benches import _evidence, _harness, _report
from fastmem import _native, _system

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benches", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    rows = commands.add_parser("rows", help="time every row with pytest-benchmark")
    rows.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    ratios = commands.add_parser("ratios", help="measure every claimed ratio")
    ratios.add_argument("out", nargs="?", type=Path, help="default: benches/results/<device>.json; kept entries stay")
    ratios.add_argument("--only", default="", help="groups whose name contains this")
    ratios.add_argument("--device", choices=["cpu", "cuda"], help="default: both, where there is a GPU")
    ratios.add_argument("--seconds", type=float, help="about how long to measure each claim")
    ratios.add_argument(
        "--keep-memory", action="store_true", help="malloc keeps what is freed (glibc); into <device>-memory-kept.json"
    )
    report = commands.add_parser("report", help="print the tables of a results file")
    report.add_argument("file", type=Path)
    report.add_argument("base", nargs="?", type=Path)
    report.add_argument("--png", type=Path, help="default: FILE with .png, where matplotlib is installed")
    commands.add_parser("evidence", help="put the tables of all committed results into the README")
    options = parser.parse_args(arguments)
    if options.command == "evidence":
        return _evidence.rewrite()
    if options.command == "report":
        return _report.report(options.file, options.base, options.png or options.file.with_suffix(".png"))
    if options.command == "rows":
        return run_rows(options.device)
    return run_ratios(options)


def run_rows(device: str) -> int:
    """`pytest benches --benchmark-only` on one device, kept in benches/results/<device>-rows.json."""
    out = default_file(device)
    out = out.with_name(f"{out.stem}-rows.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        str(HERE),
        "-m",
        "gpu" if device == "cuda" else "not gpu",
        "--benchmark-only",
    ]
    return subprocess.run([*pytest, f"--benchmark-json={out}"], cwd=HERE.parent).returncode


def claims() -> list[_harness.Ratio]:
    """The `RATIOS` of every benches/<op>.py."""
    found: list[_harness.Ratio] = []
    for path in sorted(HERE.glob("[a-z]*.py")):
        if path.stem != "conftest":
            found += getattr(importlib.import_module(f"benches.{path.stem}"), "RATIOS", [])
    return found


def run_ratios(options: argparse.Namespace) -> int:
    chosen = [r for r in claims() if options.only in r.group.name and options.device in (None, r.group.device)]
    if not chosen:
        print(f"no claim matches {options.only!r}", file=sys.stderr)
        return 2
    if options.keep_memory and not keep_memory():
        print("--keep-memory: this system's malloc cannot be told to", file=sys.stderr)
        return 2
    suffix, flag = ("-memory-kept", " --keep-memory") if options.keep_memory else ("", "")
    failed = 0
    for ratio in chosen:
        if not _harness.available(ratio.group):
            print(f"{ratio.group.name}: left out, no CUDA device")
            continue
        out = options.out or default_file(ratio.group.device, suffix)
        if options.seconds:
            ratio = dataclasses.replace(ratio, seconds=options.seconds)
        try:
            entry = _harness.measure_ratio(ratio)
        except _harness.WrongResult as error:
            print(f"WRONG RESULT {error}", file=sys.stderr)
            failed += 1
            continue
        save(out, entry, f"python -m benches ratios{flag}")
        print(_report.claim(entry), flush=True)
    return 1 if failed else 0


def keep_memory() -> bool:
    """Whether malloc keeps freed memory from now on, instead of asking the system for fresh pages, one fault each.

    Candidates that make tensors of many megabytes spend most of their time on these faults, so it decides ratios.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def default_file(device: str, suffix: str = "") -> Path:
    """benches/results/<device>.json; the CPU's carries its instruction set and thread count."""
    name = _system.gpu_name() if device == "cuda" else f"{_system.cpu_name()} {_native.isa} {torch.get_num_threads()}t"
    return HERE / "results" / f"{_system.slug(name or device)}{suffix}.json"


def save(path: Path, entry: dict[str, Any], command: str = "python -m benches ratios") -> None:
    """Put one claim's entry into the file of a command, in place of an older one of the same name."""
    content = json.loads(path.read_text()) if path.exists() else {"schema": 1, "command": command}
    entries = {e["name"]: e for e in content.get("ratios", [])} | {entry["name"]: entry}
    content["ratios"] = [entries[name] for name in sorted(entries)]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())

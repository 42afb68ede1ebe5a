"""Tables and pictures of results files, those of `python -m benches ratios` and of pytest-benchmark alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


def load(path: Path) -> list[Entry]:
    """One entry per group: name, device, ours, floor_s, median_s per candidate, peers (bar and met where claimed)."""
    content = json.loads(path.read_text())
    if "ratios" in content:
        return content["ratios"]
    groups: dict[str, Entry] = {}
    for row in content["benchmarks"]:
        info = row["extra_info"]
        first = {"name": row["group"], "ours": info["candidate"], "median_s": {}, "peers": {}}
        entry = groups.setdefault(row["group"], {**first, **info})
        entry["median_s"][info["candidate"]] = row["stats"]["median"]
    for entry in groups.values():
        mine = entry["median_s"][entry["ours"]]
        entry["peers"] = {n: {"ratio": t / mine} for n, t in entry["median_s"].items() if n != entry["ours"]}
    return list(groups.values())


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def claim(entry: Entry) -> str:
    """One group's table as Markdown, the claim's bar beside each ratio."""
    floor = entry["floor_s"]
    lines = [
        f"### {entry['name']}",
        f"{entry['device']}; floor {seconds(floor)}",
        "",
        "| candidate | time | % of floor | ratio to ours | quartiles | wanted |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, time in entry["median_s"].items():
        peer = entry["peers"].get(name, {})
        ratio = f"{peer['ratio']:.2f}x" if peer else "1 (ours)"
        spread = f"{peer['low']:.2f} to {peer['high']:.2f}" if "low" in peer else ""
        bar = peer.get("bar")
        wanted = "" if bar is None else f">= {bar:g}x: {'met' if peer['met'] else 'NOT MET'}"
        if name == entry["ours"] and entry.get("time_bar_s"):
            wanted = f"<= {seconds(entry['time_bar_s'])}: {'met' if entry['time_met'] else 'NOT MET'}"
        lines.append(f"| {name} | {seconds(time)} | {100 * floor / time:.1f} | {ratio} | {spread} | {wanted} |")
    return "\n".join([*lines, ""])


def against(entries: list[Entry], base: list[Entry]) -> str:
    """Our time now over our time in an older file."""
    old = {e["name"]: e for e in base}
    lines = [
        "### against the older file",
        "",
        "| group | ours before | ours now | faster by |",
        "| --- | --- | --- | --- |",
    ]
    for entry in entries:
        before = old.get(entry["name"], {}).get("median_s", {}).get(entry["ours"])
        if before is None:
            lines.append(f"| {entry['name']} | not in it | | |")
            continue
        now = entry["median_s"][entry["ours"]]
        lines.append(f"| {entry['name']} | {seconds(before)} | {seconds(now)} | {before / now:.2f}x |")
    return "\n".join([*lines, ""])


def draw(entries: list[Entry], png: Path) -> bool:
    """Bars of each peer's time over ours; False where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    bars = [(e["name"], n, p["ratio"], p.get("bar")) for e in entries for n, p in e["peers"].items()]
    figure, axes = plt.subplots(figsize=(10, 1 + 0.35 * len(bars)), layout="constrained")
    positions = range(len(bars))
    axes.barh(positions, [b[2] for b in bars], color=["#2a7" if b[2] >= (b[3] or 1) else "#c54" for b in bars])
    axes.scatter([b[3] or float("nan") for b in bars], positions, marker="|", s=150, color="black", label="wanted")
    axes.set_yticks(positions, [f"{b[0]}: {b[1]}" for b in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("time of the peer over ours (log scale)")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.xaxis.set_minor_formatter("")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(png, dpi=120)
    plt.close(figure)
    return True


def report(file: Path, base: Path | None, png: Path) -> int:
    entries = load(file)
    if not entries:
        print(f"{file}: no results")
        return 1
    for entry in entries:
        print(claim(entry))
    if base:
        print(against(entries, load(base)))
    print(f"drawn in {png}" if draw(entries, png) else "matplotlib is not installed: no picture drawn")
    return 0

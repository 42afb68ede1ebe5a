"""The README's tables of evidence, made from committed results alone: `python -m benches evidence` rewrites them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benches._report import seconds

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MEMORY = ROOT / "results" / "llm_memory.json"
BEGIN, END = "<!-- {} -->", "<!-- end {} -->"

# metric, what it is, bar, whether more is better, how it is shown, the control's metric and name
MEMORY_ROWS: tuple[tuple[str, str, float, bool, str, tuple[str, str] | None], ...] = (
    ("name", "a name, told in one process and asked in another, {num_names} held-out names", 0.99, True, "%", None),
    ("cleared", "the same, memory cleared", 0.01, False, "%", None),
    ("other_session_own_name", "the same, another session's memory: own name", 0.01, False, "%", None),
    ("other_session_its_name", "the same, another session's memory: its name", 0.95, True, "%", None),
    ("unseen_phrasing", "told and asked in words that training never showed", 0.95, True, "%", None),
    ("unusual_name", "names unlike the training list", 0.90, True, "%", None),
    ("corrected_at_once", "corrected name, at once", 0.95, True, "%", None),
    ("corrected_after_turns", "corrected name, other turns between and after", 0.95, True, "%", None),
    ("ten_facts", "ten facts in one conversation", 0.95, True, "%", ("ten_facts_base", "base model")),
    (
        "held_out_kinds",
        "nine facts of kinds that training never showed",
        0.80,
        True,
        "%",
        ("held_out_kinds_base", "base model"),
    ),
    (
        "distractors",
        "three facts, then {distractors} turns about other things",
        0.90,
        True,
        "%",
        ("distractors_ring", "ring of equal size"),
    ),
    ("decay_monotone", "recall from the buffer falls monotonically with decay (1: yes)", 1, True, "x", None),
    ("decay_200_live_buffer_slots", "live buffer slots after 200 decay cycles", 0, False, "x", None),
    ("perplexity_empty_ratio", "perplexity of English text, empty memory / base", 1.01, False, "x", None),
    ("perplexity_full_ratio", "perplexity of English text, full memory / base", 1.03, False, "x", None),
    ("disabled_identical", "memory disabled: bits identical to the base (1: yes)", 1, True, "x", None),
    (
        "unrelated_reply_perplexity_ratio",
        "perplexity of 100 unrelated answers, full memory / base",
        1.03,
        False,
        "x",
        None,
    ),
    ("unrelated_intrusions", "stored values that intrude in 100 unrelated answers", 0, False, "x", None),
    ("generate_speed_ratio", "tokens per second of generate(), with memory / base", 0.85, True, "x", None),
    ("write_read_speedup", "512 tokens written and read, kernels / Python loop", 100, True, "x", None),
)


def _shown(value: float, style: str) -> str:
    if style == "%":
        return f"{100 * value:.1f} %"
    return f"{value:.0f}" if value >= 20 else f"{value:.3g}"


def memory_table(path: Path = MEMORY) -> str:
    """Bar, worst seed, mean and control of every row that results/llm_memory.json holds."""
    content = json.loads(path.read_text())
    runs, task = [run["final"] for run in content["runs"]], content["config"]["task"]
    lines = ["| | bar | worst seed | mean | control | |", "| --- | --- | --- | --- | --- | --- |"]
    for metric, text, bar, more, style, control in MEMORY_ROWS:
        values = [run[metric] for run in runs]
        worst = min(values) if more else max(values)
        met = worst >= bar if more else worst <= bar
        beside = ""
        if control is not None:
            name, label = control
            beside = f"{label}: {_shown(max(run[name] for run in runs), style)}"
        sign = "≥" if more else "≤"
        lines.append(
            f"| {text.format(**task)} | {sign} {_shown(bar, style)} | {_shown(worst, style)} "
            f"| {_shown(sum(values) / len(values), style)} | {beside} | {'met' if met else '**missed**'} |"
        )
    meta = content["meta"]
    lines += ["", f"{meta['device']}, {meta['dtype']} base, {len(runs)} seeds; `{meta['command']}`."]
    return "\n".join(lines)


def kernel_table(folder: Path = ROOT / "benches" / "results") -> str:
    """Every claimed ratio in benches/results/, a table for each device."""
    tables = []
    for path in sorted(folder.glob("*.json")):
        content: dict[str, Any] = json.loads(path.read_text())
        lines = ["| op and size | against | ratio | bar | |", "| --- | --- | --- | --- | --- |"]
        devices = {entry["device"] for entry in content.get("ratios", [])}
        for entry in content.get("ratios", []):
            if bar := entry.get("time_bar_s"):
                time, verdict = entry["median_s"][entry["ours"]], "met" if entry["time_met"] else "**missed**"
                lines.append(f"| {entry['name']} | its time | {seconds(time)} | ≤ {seconds(bar)} | {verdict} |")
            for peer, row in entry["peers"].items():
                if row["bar"] is not None:
                    verdict = "met" if row["met"] else "**missed**"
                    lines.append(f"| {entry['name']} | {peer} | {row['ratio']:.3g} | {row['bar']:g} | {verdict} |")
        if devices:
            named = f"{', '.join(sorted(devices))} ({path.stem})"
            tables.append([f"{named}; medians, candidates interleaved; `{content['command']}`:", "", *lines])
    return "\n\n".join("\n".join(table) for table in tables)


def registry_table(folder: Path = ROOT / "benches" / "results") -> str:
    """Every claim of benches/fix_registry.py, a table for each device."""
    tables = []
    for path in sorted(folder.glob("fix_registry-*.json")):
        rows = json.loads(path.read_text())["benchmarks"]
        claims = [claim for row in rows for claim in row["extra_info"].get("claims", ())]
        lines = ["| | measured | bar | |", "| --- | --- | --- | --- |"]
        for claim in claims:
            value = f"{claim['value']:.3g}" if abs(claim["value"]) < 1000 else f"{claim['value']:,.0f}"
            bar = "" if claim["met"] is None else f"{'≥' if claim['more'] else '≤'} {claim['bar']:g}"
            verdict = {None: "", True: "met", False: "**missed**"}[claim["met"]]
            lines.append(f"| {claim['name']} | {value} {claim['unit']} | {bar} | {verdict} |")
        device = next(row["extra_info"]["device"] for row in rows if "device" in row["extra_info"])
        command = f"pytest benches/fix_registry.py --benchmark-only --benchmark-json=benches/results/{path.name}"
        tables.append([*lines, "", f"{device}; `{command}`."])
    return "\n\n".join("\n".join(table) for table in tables)


def filled(text: str) -> str:
    """A README whose marked tables are those of the results."""
    for name, table in (("memory", memory_table), ("kernels", kernel_table), ("registry", registry_table)):
        begin, end = BEGIN.format(name), END.format(name)
        pattern = re.escape(begin) + r".*?" + re.escape(end)
        new = f"{begin}\n{table()}\n{end}"
        text, found = re.subn(pattern, lambda _, new=new: new, text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"README.md: expected one {begin} ... {end}, found {found}")
    return text


def rewrite() -> int:
    """Put the tables into the README."""
    README.write_text(filled(README.read_text()))
    return 0

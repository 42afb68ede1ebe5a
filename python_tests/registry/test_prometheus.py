from __future__ import annotations

import math
import re

import pytest
from operations import fix, signature

from fastmem import cli
from fastmem.registry import FixRegistry
from fastmem.registry.prometheus import metrics_text

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"'


def parsed(text: str) -> tuple[dict[str, str], dict[tuple[str, tuple], float]]:
    """(type of each metric, samples), by the rules of the format; an AssertionError where one is broken."""
    assert text.endswith("\n") and not text.endswith("\n\n")
    types: dict[str, str] = {}
    helps: set[str] = set()
    samples: dict[tuple[str, tuple], float] = {}
    current = None
    for line in text[:-1].split("\n"):
        if match := re.fullmatch(rf"# HELP ({NAME}) (.+)", line):
            assert match[1] not in helps
            helps.add(match[1])
        elif match := re.fullmatch(rf"# TYPE ({NAME}) (counter|gauge|histogram)", line):
            assert match[1] not in types  # once, and before the metric's samples
            current = match[1]
            types[current] = match[2]
        else:
            match = re.fullmatch(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (\S+)", line)
            assert match, line
            assert current is not None and current in helps
            suffixes = ("_bucket", "_sum", "_count") if types[current] == "histogram" else ("",)
            assert match[1] in {current + suffix for suffix in suffixes}, line  # a metric's lines stand together
            labels = tuple(re.findall(LABEL, match[2] or ""))
            assert len({name for name, _ in labels}) == len(labels)
            assert (match[1], labels) not in samples
            samples[match[1], labels] = float(match[match.re.groups])
    for name, kind in types.items():
        assert (kind == "counter") == name.endswith("_total")
        if kind == "histogram":
            check_histogram(name, samples)
    return types, samples


def check_histogram(name, samples):
    buckets = [(float(dict(labels)["le"]), value) for (n, labels), value in samples.items() if n == f"{name}_bucket"]
    assert buckets == sorted(buckets) and buckets[-1][0] == math.inf
    assert [value for _, value in buckets] == sorted(value for _, value in buckets)
    (count,) = [value for (n, _), value in samples.items() if n == f"{name}_count"]
    assert buckets[-1][1] == count
    assert any(n == f"{name}_sum" for n, _ in samples)


@pytest.fixture(params=["memory", "redis"])
def filled(request):
    server = request.getfixturevalue("redis_server") if request.param == "redis" else None
    registry = FixRegistry(server.url if server else None)
    registry.register_many([signature(n) for n in range(30)], [fix(n) for n in range(30)])
    for _ in range(10):
        registry.advance_epoch()
    registry.register(signature(30), fix(30))
    for number in range(40):
        registry.lookup(signature(number))
    return registry


def test_the_format_and_the_numbers(filled):
    types, samples = parsed(metrics_text(filled))
    expected = {"entries": 31, "epoch": 10, "hits_total": 31, "misses_total": 9, "strength_count": 31}
    if "registrations" in filled.get_stats():
        expected |= {"registrations_total": 31, "pruned_total": 0}
    for name, value in expected.items():
        assert samples[f"fastmem_registry_{name}", ()] == value
    assert samples["fastmem_registry_memory_bytes", ()] > 1000
    strength = filled.entry(signature(0)).strength
    for bound in (0.1, 0.7, 0.8, 0.9):
        below = samples["fastmem_registry_strength_bucket", (("le", str(bound)),)]
        assert below == (30 if strength <= bound else 0)
    assert samples["fastmem_registry_strength_sum", ()] == pytest.approx(1 + 30 * strength)
    assert types["fastmem_registry_strength"] == "histogram"
    assert "fastmem_registry_capacity_entries" not in types


def test_labels_are_escaped():
    value = 'a"b\\c\nd'
    _, samples = parsed(metrics_text(FixRegistry(capacity=5), {"registry": value, "agent": "7"}))
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    labels = (("registry", escaped), ("agent", "7"))
    assert samples["fastmem_registry_capacity_entries", labels] == 5
    assert samples["fastmem_registry_strength_bucket", (*labels, ("le", "+Inf"))] == 0


def test_the_command(tmp_path, capsys):
    with FixRegistry(tmp_path / "fixes.db") as registry:
        registry.register(signature(1), fix(1))
        registry.lookup(signature(1))
    assert cli.main(["registry", "metrics", str(tmp_path / "fixes.db")]) == 0
    _, samples = parsed(capsys.readouterr().out)
    assert samples["fastmem_registry_entries", ()] == samples["fastmem_registry_hits_total", ()] == 1

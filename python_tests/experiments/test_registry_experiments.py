from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fastmem.experiments import (
    registry_dream_coverage,
    registry_error_elimination,
    registry_hash_collisions,
    registry_lookup_latency,
    registry_memory_decay,
    results,
)
from fastmem.experiments.registry_command import error


def test_numbers_give_distinct_errors():
    assert len({error(number).text for number in range(50_000)}) == 50_000


def test_lookup_latency(tmp_path, capsys):
    file = tmp_path / "latency.json"
    assert registry_lookup_latency.command(["--sizes", "10,2000", "--lookups", "600", "--json", str(file)]) == 0
    content = results.read(file)
    sizes = [row["size"] for row in content["runs"][0]["history"]]
    assert sizes == [10, 2000] and content["config"]["task"]["lookups"] == 600
    assert all(row["any_p50_ns"] > 0 for row in content["runs"][0]["history"])
    assert "2,000" in capsys.readouterr().out


def test_error_elimination():
    """With nothing forgotten, every error but the first of its kind is a hit, and no memory can do better."""
    final = registry_error_elimination.run(registry_error_elimination.Config(length=1000, unique=30)).final
    assert final["hit_rate"] == final["hit_rate_possible"] >= 0.96
    assert final["last_window_hit_rate"] >= 0.97 and final["distinct_errors"] <= 30


def test_memory_is_bounded_as_calculated():
    """A fix lives 105 epochs by the default rule (0.97, 0.001, 0.01), so rate x 105 are alive at most."""
    result = registry_memory_decay.run(registry_memory_decay.Config(epochs=300, rate=10))
    strength, life = 1.0, 0
    while strength >= 0.01:
        strength, life = max(0.0, strength * 0.97 - 0.001), life + 1
    assert result.final["peak_size"] == 10 * life
    assert result.final["last_quarter_std"] == 0
    more = registry_memory_decay.run(registry_memory_decay.Config(epochs=300, rate=10, reinforce=0.2))
    assert more.final["final_size"] > result.final["final_size"]


def test_dreams_cover_failures():
    final = registry_dream_coverage.run(registry_dream_coverage.Config(concepts=30, seed=4)).final
    assert final["failures"] > 400 and final["hit_rate"] >= final["restored_rate"] >= 0.9
    assert final["failures_left_out_as_dreamed"] > 0
    assert final["restored_rate_by_another_concept"] < 0.05 and final["restored_rate_without_dreams"] == 0
    few = registry_dream_coverage.run(registry_dream_coverage.Config(concepts=30, seed=4, variants=1)).final
    assert few["hit_rate"] < final["hit_rate"]


def test_collisions():
    final = registry_hash_collisions.run(registry_hash_collisions.Config(num_errors=20_000)).final
    assert (final["distinct_keys"], final["collisions"], final["wrong_fixes"]) == (20_000, 0, 0)


@pytest.mark.parametrize(
    "module, arguments",
    [
        (registry_lookup_latency, ["--sizes", "0"]),
        (registry_error_elimination, ["--repeat-prob", "2"]),
        (registry_memory_decay, ["--rate", "-1"]),
        (registry_hash_collisions, ["--num-errors", "0"]),
        (registry_dream_coverage, ["--strategies", "hope"]),
    ],
)
def test_bad_values_are_named(module, arguments):
    with pytest.raises(ValueError, match=arguments[0].strip("-").replace("-", "_")):
        module.command(arguments)


def test_they_run_without_torch(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from fastmem.experiments.registry_hash_collisions import command\n"
        "command(['--num-errors', '10', '--json', sys.argv[1]])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "r.json")], check=True, capture_output=True, text=True
    ).stdout
    assert "0 wrong fixes" in out
    assert json.loads((tmp_path / "r.json").read_text())["meta"]["dtype"] is None

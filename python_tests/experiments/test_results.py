import dataclasses
import json
import math
import os
import statistics

import numpy as np
import pytest
import torch

from fastmem.experiments import results
from fastmem.experiments.results import ResultsError, Run


@dataclasses.dataclass(frozen=True)
class Model:
    width: int = 8
    dtype: torch.dtype = torch.bfloat16


CONFIG = {"model": Model(), "task": {"name": "copy", "seeds": (1, 2)}, "training": {"lr": 1e-3}}
RUNS = [
    Run(0, {"accuracy": 0.9, "loss": 1.0}, [{"step": 1, "loss": math.nan}]),
    Run(1, {"accuracy": np.float32(0.75), "loss": torch.tensor(2.0)}),
    Run(2, {"accuracy": 1.0, "loss": 4.5}),
]


@pytest.fixture
def meta():
    made = results.meta(device="cpu", dtype=torch.float32, backend="cpp", wall_s=1.23456, chance=0.1, ceiling=1.0)
    return made


def test_round_trip(tmp_path, meta):
    path = tmp_path / "new" / "r.json"
    written = results.write(path, CONFIG, RUNS, meta)
    assert results.read(path) == written
    assert written["config"]["model"] == {"width": 8, "dtype": "bfloat16"}
    assert written["runs"][0]["history"] == [{"step": 1, "loss": None}]
    assert [run["seed"] for run in written["runs"]] == [0, 1, 2]
    assert meta.keys() == results.META_KEYS
    assert meta["wall_s"] == 1.235 and meta["versions"]["torch"] == torch.__version__
    assert "NaN" not in path.read_text()


def test_aggregate_is_the_sample_deviation():
    summary = results.aggregate(RUNS)
    values = [0.9, float(np.float32(0.75)), 1.0]
    assert summary["num_runs"] == 3
    assert summary["accuracy_mean"] == pytest.approx(np.mean(values))
    assert summary["accuracy_std"] == pytest.approx(np.std(values, ddof=1))
    assert summary["loss_std"] == pytest.approx(statistics.stdev([1.0, 2.0, 4.5]))


def test_aggregate_of_one_run_and_of_a_diverged_one():
    assert results.aggregate(RUNS[:1])["accuracy_std"] is None
    diverged = results.aggregate([RUNS[0], Run(1, {"accuracy": 0.5, "loss": math.nan})])
    assert diverged["loss_mean"] is None and diverged["accuracy_mean"] == 0.7


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "at least one"),
        ([Run(1, {"a": 1}), Run(1, {"a": 2})], "distinct seeds"),
        ([Run(1, {"a": 1}), Run(2, {"b": 2})], "seed 2 has metrics"),
    ],
)
def test_runs_that_do_not_fit(runs, message):
    with pytest.raises(ValueError, match=message):
        results.aggregate(runs)


def test_wrong_parts_write_nothing(tmp_path, meta):
    path = tmp_path / "r.json"
    with pytest.raises(ResultsError, match="config: expected model, task, training"):
        results.write(path, {"model": {}}, RUNS, meta)
    with pytest.raises(ResultsError, match="meta"):
        results.write(path, CONFIG, RUNS, {"git": None})
    with pytest.raises(TypeError, match="cannot write a object"):
        results.write(path, {**CONFIG, "task": object()}, RUNS, meta)
    assert list(tmp_path.iterdir()) == []


def test_reading_what_is_no_results_file(tmp_path, meta):
    path = tmp_path / "r.json"
    content = results.write(path, CONFIG, RUNS, meta)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ResultsError, match="not JSON"):
        results.read(path)
    path.write_text("[1]")
    with pytest.raises(ResultsError, match="schema 1, got 'list'"):
        results.read(path)
    path.write_text(json.dumps({**content, "schema": 2}))
    with pytest.raises(ResultsError, match="got 2"):
        results.read(path)
    path.write_text(json.dumps({**content, "runs": [{"seed": 1}]}))
    with pytest.raises(ResultsError, match="runs"):
        results.read(path)
    content["aggregate"]["accuracy_mean"] += 0.01  # edited by hand
    path.write_text(json.dumps(content))
    with pytest.raises(ResultsError, match="accuracy_mean is"):
        results.read(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, meta, monkeypatch):
    path = tmp_path / "r.json"
    results.write(path, CONFIG, RUNS, meta)
    before = path.read_bytes()

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        results.write(path, CONFIG, RUNS[:1], meta)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_command(monkeypatch):
    import __main__

    monkeypatch.setattr(__main__, "__spec__", None, raising=False)
    monkeypatch.setattr("sys.argv", ["/some/where/fastmem", "memory", "train", "--name", "a b"])
    assert results.this_command() == "fastmem memory train --name 'a b'"

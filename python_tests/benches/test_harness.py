"""The benchmark harness: it refuses wrong results, rotates tensors, interleaves, and reports what it measured."""

import json
import platform
import subprocess
import sys
import time

import pytest
import torch

from benches import _evidence, _harness, _report
from benches.__main__ import save
from benches._harness import Candidate, Group, Ratio, Work, WrongResult


def inputs(device, generator):
    return (torch.randn(64, 64, generator=generator, device=device),)


def group(candidates, **more):
    settings = {"reference": lambda a: a.double() * 2, **more}
    return Group("double N64", inputs, candidates, Work(bytes=2 * 64 * 64 * 4, ops=64 * 64), **settings)


@pytest.fixture(autouse=True)
def known_floors(monkeypatch):
    """Measuring the machine takes seconds and is not what these tests are about."""
    monkeypatch.setattr(_harness, "bandwidth", lambda device, threads: 1e9)
    monkeypatch.setattr(_harness, "matmul_rate", lambda device, threads, dtype: 1e9)


def test_wrong_results_are_refused():
    wrong = {
        "far": lambda a: a * 2.001,
        "shape": lambda a: (a * 2)[:-1],
        "nan": lambda a: a * torch.nan,
        "two": lambda a: (a * 2, a),
    }
    for name, message in {"far": "relative error", "shape": "shape", "nan": "nan", "two": "expected 1 results"}.items():
        with pytest.raises(WrongResult, match=f"double N64, {name}: .*{message}"):
            _harness.Sets(group(wrong)).calls(name)
    with pytest.raises(WrongResult):
        _harness.measure_ratio(Ratio(group({"ours": lambda a: a * 2, **wrong}), "ours", seconds=0))


def test_check_replaces_the_reference():
    def positive(result, args):
        assert (result >= 0).all(), "negative"

    both = group({"abs": torch.abs, "same": lambda a: a}, reference=None, check=positive)
    _harness.Sets(both).calls("abs")
    with pytest.raises(WrongResult, match="same: negative"):
        _harness.Sets(both).calls("same")
    with pytest.raises(ValueError, match="a reference or a check"):
        group({}, reference=None)


def test_sets_rotate_and_prepare_runs_once_per_set(monkeypatch):
    monkeypatch.setattr(_harness, "ROTATED_BYTES", 3 * 64 * 64 * 4)
    prepared, seen = [], []

    def prepare(a):
        prepared.append(a)
        return a, len(prepared)

    def run(a, number):
        seen.append(number)
        return (a * 2).numpy()

    sets = _harness.Sets(group({"ours": Candidate(run, prepare, torch.from_numpy)}))
    call = sets.calls("ours")
    for _ in range(5):
        call()
    assert len(sets.inputs) == len(prepared) == 3
    assert seen == [1, 2, 3, 1, 2, 3]
    assert not torch.equal(sets.inputs[0][0], sets.inputs[1][0])


def test_forward_backward():
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    out, grad_a, grad_b = _harness.forward_backward(torch.matmul)(a, b)
    assert torch.equal(out, a @ b)
    torch.testing.assert_close(grad_a, out @ b.T)
    torch.testing.assert_close(grad_b, a.T @ out)
    assert not a.requires_grad


def test_interleaving_takes_turns():
    order = []
    calls = {name: lambda name=name: (order.append(name), time.sleep(0.002))[0] for name in "abc"}
    samples = _harness.interleave(calls, seconds=0, min_rounds=4)
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert "".join(order[-12:]) == "abcbcacababc"
    assert all(0.002 <= t < 2 for times in samples.values() for t in times)


def test_ratio_file_and_report(tmp_path, capsys):
    slow = Candidate(lambda a: (time.sleep(0.01), a * 2)[1])
    claim = Ratio(group({"ours": lambda a: a * 2, "slow": slow}), "ours", {"slow": 2.0}, seconds=0)
    entry = _harness.measure_ratio(claim)
    peer = entry["peers"]["slow"]
    assert peer["ratio"] == entry["median_s"]["slow"] / entry["median_s"]["ours"] > 2 and peer["met"]
    assert entry["floor_s"] == pytest.approx(2 * 64 * 64 * 4 / 1e9)
    assert entry["percent_of_floor"] == pytest.approx(100 * entry["floor_s"] / entry["median_s"]["ours"])

    path = tmp_path / "device.json"
    save(path, {**entry, "name": "another"})
    save(path, {**entry, "rounds": 0})
    save(path, entry)
    assert [(e["name"], e["rounds"]) for e in _report.load(path)] == [("another", 5), ("double N64", 5)]
    base = tmp_path / "base.json"
    older = {**entry, "median_s": {"ours": 4 * entry["median_s"]["ours"]}}
    base.write_text(json.dumps({"ratios": [older]}))
    assert _report.report(path, base, tmp_path / "p.png") == 0
    text = capsys.readouterr().out
    assert "| >= 2x: met |" in text and "| 4.00x |" in text and "| another | not in it | | |" in text
    assert "NOT MET" in _report.claim({**entry, "peers": {"slow": {**peer, "met": False}}})


@pytest.mark.parametrize("bar,met", [(60.0, True), (1e-9, False)])
def test_a_bar_on_our_own_time(bar, met, tmp_path):
    slow = Candidate(lambda a: (time.sleep(0.001), a * 2)[1])
    claim = Ratio(group({"ours": slow, "peer": slow}), "ours", at_most_s=bar, seconds=0)
    entry = _harness.measure_ratio(claim)
    assert (entry["time_bar_s"], entry["time_met"]) == (bar, met)
    shown = f"<= {_report.seconds(bar)}: {'met' if met else 'NOT MET'}"
    assert _report.claim(entry).count(shown) == 1
    save(tmp_path / "device.json", entry)
    row = f"≤ {_report.seconds(bar)} | {'met' if met else '**missed**'} |"
    assert row in _evidence.kernel_table(tmp_path) and "peer" not in _evidence.kernel_table(tmp_path)


def test_ratio_of_an_unknown_candidate():
    with pytest.raises(ValueError, match="no candidate 'eager' among ours"):
        Ratio(group({"ours": torch.neg}), "ours", {"eager": 2})


def test_seconds():
    assert [_report.seconds(s) for s in (2.5, 0.0123, 4.56e-5, 7e-9)] == ["2.5 s", "12.3 ms", "45.6 us", "7 ns"]


KEPT = """
import resource, torch
from benches.__main__ import keep_memory
assert keep_memory()
faults = []
for _ in range(16):  # until a freed block fits, with its alignment, some are new
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(1 << 24)  # 64 MiB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told to keep memory")
def test_kept_memory_is_not_asked_for_again():
    faults = subprocess.run(
        [sys.executable, "-c", KEPT], cwd=_evidence.ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert int(faults) < 1000

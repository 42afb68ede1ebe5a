from __future__ import annotations

import shutil

import pytest

from fastmem.experiments import registry_api_client
from fastmem.experiments.registry_api_client import (
    FIELDS,
    Config,
    candidates,
    checksum,
    command,
    damages,
    problems,
    repair,
    run,
    served,
    signature_of,
)


def test_undamaged_answers_are_right_and_damaged_ones_are_not():
    for endpoint in FIELDS:
        for number in range(200):
            for late in (False, True):
                answer = served(endpoint, number, late)
                assert problems(endpoint, answer) == []
                assert all(problems(endpoint, damage(answer)) for damage in damages(endpoint, late))


def test_every_damage_has_a_repair_and_a_signature_of_its_own():
    for endpoint in FIELDS:
        answer = served(endpoint, 7, False)
        broken = [damage(answer) for damage in damages(endpoint, False)]
        assert len({signature_of(endpoint, problems(endpoint, one)).text for one in broken}) == len(broken)
        for one in broken:
            assert any(checksum(repair(one, fix)) == checksum(answer) for fix in candidates(endpoint, one))


def test_errors_are_eliminated_and_relearnt():
    final = (result := run(Config(requests=400, seed=3))).final
    assert final["wrong_answers"] == 0
    assert final["slow"] <= 12 and final["repaired_at_once_rate"] > 0.9
    assert final["slow_in_last_window"] == 0 < final["slow_in_last_window_control"]
    assert final["slow_control"] == final["damaged"]
    assert final["failed_fixes"] >= 1  # of before the change
    after_change = [row["slow"] for row in result.history[4:]]
    assert after_change[0] > 0 == after_change[-1]


def test_the_fixes_are_there_next_time(tmp_path):
    path = str(tmp_path / "fixes.db")
    run(Config(requests=200, registry=path))
    again = run(Config(requests=100, registry=path, seed=5)).final
    assert again["repaired_by_others_fixes"] > 10 and again["wrong_answers"] == 0


@pytest.mark.skipif(not shutil.which("redis-server"), reason="no redis-server is installed")
def test_two_processes_share_what_they_learn():
    final = run(Config(requests=300, processes=2)).final
    assert final["repaired_by_others_fixes"] > 10
    assert final["wrong_answers"] == 0 and final["slow_in_last_window"] <= 1


def test_the_picture_shows_both(tmp_path, capsys):
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "client.png"
    assert command(["--requests", "200", "--plot", str(path)]) == 0
    pixels = image.imread(path)[..., :3]
    green = (abs(pixels - (0x22 / 255, 0xAA / 255, 0x77 / 255)).max(-1) < 0.02).sum()
    grey = (abs(pixels - 0x99 / 255).max(-1) < 0.02).sum()
    assert green > 300 and grey > 300
    assert "no registry" in capsys.readouterr().out


def test_bad_values_are_named(monkeypatch):
    with pytest.raises(ValueError, match="requests"):
        Config(requests=0)
    with pytest.raises(ValueError, match="registry"):
        Config(processes=2, registry="fixes.db")
    monkeypatch.setattr(registry_api_client.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="no redis-server"):
        run(Config(requests=10, processes=2))

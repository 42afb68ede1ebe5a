"""Where `fastmem memory evaluate` leaves its numbers. What it measures is replaced here by fixed numbers."""

from types import SimpleNamespace

import pytest
import torch

from fastmem import cli
from fastmem.experiments import llm_memory_evaluate, results
from fastmem.nn import MemoryConfig

pytest.importorskip("transformers")
pytest.importorskip("tyro")


@pytest.fixture
def evaluate(monkeypatch, tmp_path, capsys):
    """Runs `fastmem memory evaluate ...` in a folder that looks like a checkout: (status, stdout)."""
    model = SimpleNamespace(base=torch.nn.Linear(1, 1), config=MemoryConfig())
    bench = SimpleNamespace(model=model, chat=None)
    monkeypatch.setattr(llm_memory_evaluate, "open_bench", lambda *_: bench)
    monkeypatch.setattr(llm_memory_evaluate, "base_replies", lambda *_: [])
    for name, metric in (
        ("recall_names", "name"),
        ("phrasings", "unseen_phrasing"),
        ("corrections", "corrected_at_once"),
        ("ten_facts", "ten_facts"),
        ("distractors", "distractors"),
        ("harmless", "unrelated_intrusions"),
        ("generation_speed", "generate_speed_ratio"),
        ("loop_speed", "write_read_speedup"),
    ):
        monkeypatch.setattr(llm_memory_evaluate, name, lambda *_, m=metric: {m: 0.25})
    monkeypatch.setattr(
        llm_memory_evaluate, "decay", lambda b, c, seed: ({"decay_monotone": float(seed)}, [{"cycles": 0}])
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "llm_memory.json").write_text("what was committed")

    def run(*arguments):
        status = cli.main(["memory", "evaluate", *map(str, arguments)])
        return status, capsys.readouterr().out

    return run


def files(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_without_a_file_the_numbers_are_printed_and_nothing_is_written(evaluate, tmp_path):
    status, out = evaluate()
    assert status == 0 and files(tmp_path) == {"results/llm_memory.json": "what was committed"}
    lines = out.splitlines()
    assert lines[0].split() == ["metric", "mean", "deviation", "(3", "seeds)"] and len(lines) == 10
    assert "name                                       0.25          0" in lines
    assert lines[7].split() == ["decay_monotone", "1", "1"]
    assert evaluate("--seeds", 5)[1].splitlines()[7].split() == ["decay_monotone", "5", "-"]


def test_with_a_file_both(evaluate, tmp_path):
    status, out = evaluate("--json", "results/llm_memory.json", "--seeds", 1, 2)
    assert status == 0 and out.endswith("results in results/llm_memory.json\n")
    content = results.read(tmp_path / "results" / "llm_memory.json")
    assert content["aggregate"]["decay_monotone_mean"] == 1.5 and content["config"]["task"]["seeds"] == [1, 2]
    assert out.splitlines()[:-1] == llm_memory_evaluate.summary(content)


def test_the_help_says_so(evaluate, capsys):
    with pytest.raises(SystemExit, match="0"):
        evaluate("--help")
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "the numbers are printed only" in said and "results/llm_memory.json" not in said


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--batch", 0], "batch: expected at least 1"),
        (["--num-names", 201], "num_names: expected 2 to 200"),
        (["--num-conversations", -1], "num_conversations: expected at least 1"),
        (["--distractors", -5], "distractors: expected at least 0"),
        (["--checkpoints", "a", "b"], "checkpoints: expected one, or one per seed (3), got 2"),
    ],
)
def test_a_wrong_number_is_named_before_anything_is_loaded(evaluate, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(llm_memory_evaluate, "open_bench", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["memory", "evaluate", *map(str, arguments)])
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())

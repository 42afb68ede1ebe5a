"""The embedding experiment: what is recalled in each phase, what surprises, what decays, and files."""

import json
import re

import pytest
import torch
from tiny_chat import one_thread

from fastmem.experiments import llm_memory_embedding as experiment
from fastmem.experiments import results
from fastmem.experiments.llm_memory_embedding import Config, EmbeddingMemory, embed, run

__all__ = ["one_thread"]


def phases(content):
    return {row["phase"]: row for row in content["runs"][0]["history"]}


def test_reinforced_corrected_decayed(tmp_path):
    content = run(Config(output_dir=tmp_path))
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("embedding_experiment_results_") and results.read(file) == content
    rows, final = phases(content), content["runs"][0]["final"]
    assert rows["recall"]["similarity"]["Alice"] > 0.9 > 0.3 > rows["recall"]["similarity"]["Sarah"]
    for name in ("recall after the correction", "recall after 10 decay cycles"):
        assert rows[name]["similarity"]["Sarah"] > 0.9 > 0.3 > rows[name]["similarity"]["Alice"]
        assert rows[name]["similarity"]["other names"] < 0.3
    assert set(rows["control: no memory"]["similarity"].values()) == {0.0}
    # What is repeated surprises less and less; the correction more than any repetition, and enough to be kept.
    surprise = [rows[f"reinforcement {i}"]["surprise"] for i in range(1, 6)]
    assert surprise[-1] < 0.6 * surprise[0]
    assert rows["correction"]["surprise"] > max(surprise) and rows["correction"]["stored"]
    assert final["surprise_correction"] > 2 * final["surprise_last_reinforcement"]
    assert not any(rows[f"reinforcement {i}"]["stored"] for i in range(2, 6))
    # Ten cycles later the buffer is weaker by 0.95^10, the store as it was.
    before, after = (rows[f"recall after {x}"]["strength"] for x in ("the correction", "10 decay cycles"))
    assert after["buffer"][0] == pytest.approx(before["buffer"][0] * 0.95**10, rel=1e-3)
    assert after["store"] == before["store"]
    assert content["meta"]["chance"] < 0.3 and content["meta"]["ceiling"] == 1.0


def test_the_store_outlives_the_buffer(tmp_path):
    rows = phases(run(Config(output_dir=tmp_path, decay_cycles=200)))
    later = rows["recall after 200 decay cycles"]
    assert later["strength"]["buffer"] == [] and later["strength"]["store"]
    assert later["similarity"]["Sarah"] > 0.8


@pytest.mark.parametrize("names", [("Alice", "Alicia"), ("Mary Ann", "Jean-Luc"), ("Şule", "Ødegård")])
def test_names_of_all_kinds(tmp_path, names):
    first, second = names
    content = run(Config(output_dir=tmp_path, initial_name=first, corrected_name=second, reinforcement_turns=1))
    rows = phases(content)
    assert rows["recall"]["similarity"][first] > rows["recall"]["similarity"][second]
    after = rows["recall after the correction"]["similarity"]
    assert after[second] > after[first] and after[second] > 0.9


def test_memory_kept_and_loaded(tmp_path, capsys):
    kept = tmp_path / "memory"
    run(Config(output_dir=tmp_path / "a", save_memory=kept, auto_save=True))
    (auto,) = (tmp_path / "a").glob("embedding_*.memory")
    held = []
    for path in (kept, auto):
        memory = EmbeddingMemory()
        assert memory.memory.load(path) == (experiment.SESSION,)
        held.append([x for part in memory.memory.states_of(experiment.SESSION)[0] for x in part])
    assert all(torch.equal(x, y) for x, y in zip(*held, strict=True))
    config = Config(output_dir=tmp_path / "b", load_memory=kept, initial_name="Nora", corrected_name="Sarah")
    rows = phases(run(config))
    assert next(iter(rows)) == "loaded"
    assert rows["loaded"]["similarity"]["Sarah"] > 0.9 > 0.3 > rows["loaded"]["similarity"]["Nora"]
    assert f"memory kept in {kept}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="of another model"):
        run(Config(output_dir=tmp_path / "c", load_memory=kept, seed=1))
    assert not (tmp_path / "c").exists()


def test_interactive_asks_for_the_numbers(tmp_path, monkeypatch):
    answers = iter(["Ada", "", "2", "3"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    content = run(Config(output_dir=tmp_path, interactive=True))
    task = content["config"]["task"]
    assert (task["initial_name"], task["corrected_name"]) == ("Ada", "Sarah")
    assert (task["reinforcement_turns"], task["decay_cycles"]) == (2, 3)
    answers = iter(["", "", "many"])
    with pytest.raises(ValueError, match="reinforcement_turns: expected a number, got 'many'"):
        experiment.ask(Config())


def test_the_command_has_the_documents_flags(tmp_path, capsys):
    pytest.importorskip("tyro")
    from fastmem import cli

    flags = ["--initial-name", "Ada", "--corrected-name", "Bo", "--reinforcement-turns", "1", "--decay-cycles", "2"]
    files = ["--output-dir", str(tmp_path / "out"), "--save-memory", str(tmp_path / "m")]
    assert cli.main(["memory", "embedding", *flags, *files, "--auto-save"]) == 0
    assert re.search(r"Bo \+(0\.9|1\.)", capsys.readouterr().out)
    (file,) = (tmp_path / "out").glob("*.json")
    assert json.loads(file.read_text())["config"]["task"]["initial_name"] == "Ada"
    assert cli.main(["memory", "embedding", "--load-memory", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_configurations_that_make_no_sense():
    for name, value in (("decay_cycles", -1), ("reinforcement_turns", -1), ("initial_name", " ")):
        with pytest.raises(ValueError, match=name):
            Config(**{name: value})
    with pytest.raises(ValueError, match="another name than Alice"):
        Config(corrected_name="Alice")


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    first, second = (run(Config(output_dir=tmp_path / name))["runs"] for name in "ab")
    assert first == second


def test_embeddings_know_letters_and_nothing_else():
    def cosine(a, b):
        return torch.cosine_similarity(embed(a), embed(b), dim=0).item()

    assert cosine("Sarah", "sarah") == pytest.approx(1)
    assert cosine("Sarah", "Sara") > 0.5 > cosine("Sarah", "Alice") and abs(cosine("king", "queen")) < 0.3
    assert embed("x").square().mean().item() == pytest.approx(1, abs=1e-4)


def test_an_empty_memory_recalls_nothing():
    memory = EmbeddingMemory()
    assert memory.recall(["my", "name", "is"]).eq(0).all()
    memory.tell(["my", "name", "is", "Alice"])
    assert memory.recall(["my", "name", "is"]).abs().max() > 0

import dataclasses
import io
import json
import subprocess
import sys

import pytest
from tiny_chat import make_model, one_thread, save_adapter, save_base

from fastmem import cli
from fastmem.experiments import (
    llm_memory,
    llm_memory_chat,
    llm_memory_demo,
    llm_memory_full,
    llm_memory_train,
    results,
)
from fastmem.models import MemoryDirectory

pytest.importorskip("transformers")
__all__ = ["one_thread"]
pytest.importorskip("tyro")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Flags that name a tiny base and its adapter."""
    folder = tmp_path_factory.mktemp("tiny")
    save_adapter(folder / "checkpoints" / "best_step50")
    flags = ["--model", str(save_base(folder / "base")), "--checkpoint", str(folder / "checkpoints" / "best_step*")]
    return [*flags, "--device", "cpu"]


@pytest.fixture
def memory(capsys, monkeypatch, tmp_path):
    """Runs `fastmem memory ...` in an empty folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = cli.main(["memory", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_help_needs_neither_torch_nor_tyro():
    code = (
        "import sys; from fastmem import cli\n"
        "try: cli.main(['memory', '--help'])\n"
        "except SystemExit: assert not {'torch', 'tyro', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, text in llm_memory.COMMANDS.items():
        assert f"{name:10} {text}" in done.stdout


def test_wrong_calls(memory, capsys):
    for arguments in ([], ["fly"], ["chat", "--fly"], ["train", "--epochs", "0"], ["full", "--decay-cycles", "-1"]):
        with pytest.raises(SystemExit, match="2"):
            memory(*arguments)
        assert capsys.readouterr().err


def test_tyro_missing_is_one_line(memory, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    status, _, err = memory("chat")
    assert status == 1 and err.startswith("error: fastmem memory chat needs tyro: pip install tyro rich matplotlib (")


def test_every_flag_of_training():
    flags = (
        "--model m --lr 1e-4 --epochs 50 --batch-size 1 --grad-accum 4 --eval-every 5 --save-every 20 "
        "--checkpoint-dir c --resume r --memory-layers 3,6,9 --num-train 50 --num-val 10 --memory.buffer-slots 8"
    )
    config = llm_memory.parse(llm_memory_train.TrainingConfig, flags.split(), "train")
    got = dataclasses.asdict(config)
    expected = {
        "model": "m",
        "lr": 1e-4,
        "epochs": 50,
        "batch_size": 1,
        "grad_accum": 4,
        "eval_every": 5,
        "save_every": 20,
        "memory_layers": "3,6,9",
        "num_train": 50,
        "num_val": 10,
    }
    assert {k: got[k] for k in expected} == expected
    assert (str(config.checkpoint_dir), str(config.resume), config.memory.buffer_slots) == ("c", "r", 8)


@pytest.mark.parametrize("flag", ["-i", "--interactive"])
def test_every_flag_of_the_experiment(memory, monkeypatch, flag):
    seen = []
    monkeypatch.setattr(llm_memory_full, "run", seen.append)
    memory(
        *("full", flag, "-s", "--model", "m", "--checkpoint", "c/best_step*", "--memory-layers", "3,6,9"),
        *("--initial-name", "Ann", "--corrected-name", "Eve", "--decay-cycles", "3", "--output-dir", "o"),
    )
    config = seen[0]
    assert config.interactive and config.simple and config.decay_cycles == 3 and str(config.output_dir) == "o"
    assert (config.initial_name, config.corrected_name, config.memory_layers) == ("Ann", "Eve", "3,6,9")
    memory("simple", "--initial-name", "Ann")
    assert seen[1].simple and not seen[1].interactive


def test_training_writes_logs_and_checkpoints(memory, tiny, tmp_path):
    flags = [*tiny[:2], "--device", "cpu", "--dtype", "float32", "--batch-size", 2, "--num-train", 4, "--epochs", 1]
    flags += ["--num-val", 2, "--eval-every", 1, "--save-every", 1, "--memory-layers", "1,3"]
    flags += ["--memory.buffer-slots", 16, "--memory.store-slots", 8, "--memory.memory-dim", 16]
    status, _, err = memory("train", *flags)
    assert status == 0 and "step 1 " in err
    (log,) = (tmp_path / "training_logs").glob("training_*.log")
    assert "step 2 " in log.read_text()
    history = json.loads((tmp_path / "training_logs" / "training_history.json").read_text())
    assert [row["step"] for row in history] == [1, 2]
    assert history == json.loads((tmp_path / "checkpoints" / "training_history.json").read_text())
    names = {p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()}
    assert {"checkpoint_step1", "checkpoint_step2", "final_step2"} <= names
    assert len([n for n in names if n.startswith("best_step")]) == 1
    resumed = [*flags, "--resume", tmp_path / "checkpoints" / "checkpoint_step1*"]
    assert memory("train", *resumed, "--checkpoint-dir", "again")[0] == 0
    again = json.loads((tmp_path / "again" / "training_history.json").read_text())
    assert again[1]["loss"] == pytest.approx(history[1]["loss"], rel=1e-5)
    status, out, _ = memory("simple", *tiny[:2], "--device", "cpu", "--checkpoint", "./checkpoints/best_step*.pt")
    assert status in (0, 1) and "asked:    What is my name?" in out


def test_piped_chat(memory, tiny, tmp_path):
    lines = ["hello my name is alice", "", "/memory", "/decay 3", "/memory", "/session bob", "/memory", "hello"]
    lines += [
        "/save bob.memory",
        "/session alice",
        "/clear",
        "/memory",
        "/load bob.memory",
        "/help",
        "/quit",
        "unheard",
    ]
    status, out, err = memory("chat", *tiny, "--session", "alice", "--max-new-tokens", 3, stdin="\n".join(lines))
    assert status == 1 and err.startswith("loading ")  # /memory of sessions that hold nothing
    assert "alice> hello my name is alice\n" in out and "bob> hello\n" in out and "unheard" not in out
    assert "'alice'" in out and "3 decay cycles have passed" in out and " 0.86 " in out
    assert "error: unknown session 'bob'; known: alice\n" in out
    assert "error: unknown session 'alice'; known: bob\n" in out
    assert "loaded 'bob'" in out and "/session NAME" in out
    assert (tmp_path / "bob.memory").is_file()


def test_chat_with_a_store(memory, tiny, tmp_path):
    chat = ["chat", *tiny, "--store", tmp_path / "store", "--max-new-tokens", 3]
    assert memory(*chat, "--session", "alice", stdin="my name is alice\n/session bob\nmy dog is rex")[0] == 0
    status, out, _ = memory(*chat, "--session", "alice", stdin="/memory\n/save a.memory\n/decay 200\n/memory\n/clear\n")
    assert status == 0 and "'alice'" in out and "'rex'" not in out and "live slots 0/24, 0/24" in out
    assert [p.name.split("-")[0] for p in (tmp_path / "store").glob("*.memory")] == ["bob"]
    status, out, _ = memory(*chat, stdin="/load a.memory\n/session alice\n/memory\n")
    assert status == 0 and "session 'alice'\n" in out and "'alice'  " in out


def test_chat_saves_and_loads_under_the_sessions_lock(tmp_path):
    model, other = (make_model(save_adapter(tmp_path / "adapter"), max_new_tokens=2) for _ in range(2))
    chat = llm_memory_chat.Chat(model, tmp_path / "store", "alice")
    chat.store.patience = 0.1
    said = []

    def talk(*lines):
        said.clear()
        return chat.talk(lines, lambda text, style="": said.append(text))

    file = tmp_path / "a.memory"
    assert talk("my dog is rex", f"/save {file}") == 0
    before, kept = file.read_bytes(), chat.store.file_of("alice").read_bytes()
    with MemoryDirectory(tmp_path / "store", other).open("alice"):  # another process in the middle of a turn
        assert talk(f"/save {file}", f"/load {file}") == 1
        assert len(said) == 2 and all("session 'alice' has been in use elsewhere for 0.1 s" in line for line in said)
        assert file.read_bytes() == before and chat.store.file_of("alice").read_bytes() == kept
        other.generate("i live in lisbon", session="alice")
    assert talk(f"/save {tmp_path / 'b.memory'}", "/memory") == 0 and "lisbon" in "".join(said)
    assert talk(f"/load {file}", "/memory") == 0 and "rex" in "".join(said) and "lisbon" not in "".join(said)
    assert model.model.memory.names == ()  # the store has them
    assert talk("/load nowhere", "/session bob", f"/save {file}") == 1
    assert said[0] == "error: nowhere: no memory file here"
    assert said[2] == "error: unknown session 'bob'; known: alice"


def test_chat_commands_that_fail_are_one_line(memory, tiny, tmp_path):
    (tmp_path / "foreign").write_text("hello")
    lines = [
        "/fly",
        "/decay",
        "/decay x",
        "/quit now",
        "/load nothing",
        "/load foreign",
        "/save /no/such/place",
        "/clear",
    ]
    status, out, _ = memory("chat", *tiny, stdin="\n".join(lines))
    assert status == 1
    for said in (
        "unknown command /fly; /help lists them",
        "expected /decay N",
        "/decay: expected a number of cycles, got 'x'",
        "expected /quit",
        "nothing: no memory file here",
        "foreign: damaged or not a memory file",
        "unknown session 'default'; known: none",
    ):
        assert f"error: {said}" in out
    assert out.count("error: ") == len(lines) == out.count("default> ")


def test_chat_without_a_terminal_and_no_input(memory, tiny):
    assert memory("chat", *tiny)[0] == 0
    assert memory("full", "-i", *tiny)[0] == 0


def test_errors_are_one_line(memory, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("fastmem.models.memory_augmented_model.PACKAGED_ADAPTER", tmp_path / "missing")
    for arguments, said in (
        (["chat"], "missing: no memory adapter here"),
        (["chat", *tiny[:2]], "needs --checkpoint; train one with `fastmem memory train`"),
        (["simple", *tiny[:2], "--checkpoint", "none*"], "none*: no memory adapter here"),
        (["full", *tiny, "--memory-layers", "0,1"], "this adapter stands after blocks (1, 3), asked for (0, 1)"),
        (["full", *tiny, "--memory-layers", "a,1"], "memory_layers: expected numbers such as \"3,6,9\", got 'a,1'"),
        (["chat", *tiny, "--model", "./nowhere"], "./nowhere: no such folder"),
        (["demo", "--checkpoint", "nowhere"], "nowhere: no memory adapter here"),
        (["train", *tiny[:2], "--resume", "none"], "none: no memory adapter here"),
        (["train", *tiny[:2], "--init", "none"], "none: no memory adapter here"),
    ):
        status, _, err = memory(*arguments)
        lines = [line for line in err.splitlines() if not line.startswith("loading ")]
        assert status == 1 and len(lines) == 1 and said in lines[0], err


def test_full_writes_results_and_log(memory, tiny, tmp_path):
    status, out, _ = memory("full", *tiny, "--decay-cycles", 4, "--output-dir", "out")
    (file,) = (tmp_path / "out").glob("llm_experiment_results_*.json")
    (log,) = (tmp_path / "out").glob("llm_experiment_*.log")
    assert log.read_text() == out
    content = results.read(file)
    phases = content["runs"][0]["history"]
    assert [p["phase"] for p in phases] == [
        "introduction",
        "recall",
        "correction",
        "recall after the correction",
        "4 decay cycles",
        "recall in a new conversation",
        "control: memory cleared",
    ]
    told, cleared = phases[0], phases[-1]
    assert told["memory"]["buffer"]["live"] == told["info"]["live"]["buffer"] > 0
    assert cleared["memory"]["buffer"]["live"] == 0 and not cleared["recalled"]
    faded = phases[4]["memory"]["buffer"]["mean_strength"] / phases[3]["memory"]["buffer"]["mean_strength"]
    assert faded == pytest.approx(0.95**4, rel=1e-3)
    final = content["runs"][0]["final"]
    assert status == 1 - final["recalled_after_decay"] and final["recalled_when_cleared"] == 0
    assert content["config"]["task"]["corrected_name"] == "Sarah"


def test_simple_is_0_only_if_recalled(capsys, tmp_path, monkeypatch):
    model = make_model(save_adapter(tmp_path / "adapter"))
    answers = iter(["hello", "your name is alice .", "i do not know"])
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: (next(answers), generate(*a, **k)[1]))
    assert llm_memory_full.simple(model, llm_memory_full.Config()) == 0
    assert capsys.readouterr().out.endswith("answered: i do not know\nrecalled\n")
    answers = iter(["hello", "your name is bob .", "your name is alice ."])
    assert llm_memory_full.simple(model, llm_memory_full.Config()) == 1
    assert capsys.readouterr().out.endswith("not recalled\n")


def test_a_name_counts_as_a_word_of_its_own():
    says = llm_memory_full.says
    assert says("Your name is alice.", "Alice") and says("Alice", "Alice") and says("It's Anne-Marie!", "Anne-Marie")
    assert not says("Your name is Alicette.", "Alice") and not says("", "Alice")


def test_demo(memory, tiny, monkeypatch):
    monkeypatch.setattr(llm_memory_demo, "TOLD", {"alice": ("my name is alice",), "bob": ("my name is bob",)})
    monkeypatch.setattr(llm_memory_demo, "ASKED", (("what is my name ?", "alice"), ("where do i live ?", "lisbon")))
    status, out, _ = memory("demo", *tiny, "--skip-kernels")
    assert status == 0
    assert "7. Kernels" not in out and "saved: alice-" in out and "after 200 cycles:   0 buffer slots" in out
    assert f"{out.count('    yes  ')} of {out.count('    yes  ') + out.count('    NO   ')} expectations held." in out


def test_demo_of_a_first_process_that_fails(memory, tiny, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    status, _, err = memory("demo", *tiny)
    assert status == 1 and err.startswith("error: the first process failed: no message")


def test_kernel_table():
    lines = llm_memory_demo.kernel_table(seconds=0.0)
    assert len(lines) == 4 and all(line.endswith("x") for line in lines[1:])


def test_commands_name_modules():
    for name in ("chat", "demo", "full"):
        module = getattr(sys.modules["fastmem.experiments"], f"llm_memory_{name}")
        assert dataclasses.is_dataclass(module.Config) and callable(module.run)
    assert llm_memory_chat.Config().store is None

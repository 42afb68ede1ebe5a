"""Training of memory layers on a tiny base: it learns, resumes, accumulates, runs in two processes, saves safely."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_chat import one_thread
from tiny_training import make_base, make_config, make_trainer, names, some_talks

from fastmem.experiments import llm_memory_train as training
from fastmem.experiments.memory_training import Question, chatter_pool, draw_training_conversation

__all__ = ["one_thread"]
pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def config(base, tmp_path):
    return make_config(base, tmp_path / "run")


def weights_of(folder):
    return load_file(folder / "memory_adapter.safetensors")


def assert_equal(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


@torch.no_grad()
def away_from_zero(model):
    """What begins at zero hides what lies behind it from the first gradient."""
    for layer in model.memory_layers:
        layer.attention.out_gain.fill_(0.05)
        layer.store.predictor[2].weight.normal_(std=0.1)


def test_the_loss_falls_and_every_part_of_it(config):
    model, trainer = make_trainer(config)
    optimizer = training.make_optimizer(model, config)
    talks, rows = some_talks(), []
    trainer.train()
    for _ in range(15):
        terms = trainer(talks, random.Random(0))
        optimizer.zero_grad()
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.layers.parameters(), 1.0)
        optimizer.step()
        rows.append({k: v.item() for k, v in terms.items()})
    for term in ("answer", "surprise", "address", "loss"):
        assert rows[-1][term] < 0.95 * rows[0][term], term
    assert rows[0]["stay"] == pytest.approx(0, abs=1e-5)  # at first memory adds nothing


def test_gradients_reach_every_trained_parameter_and_nothing_else(config):
    model, trainer = make_trainer(config)
    away_from_zero(model)
    trainer(some_talks(6), random.Random(0))["loss"].backward()
    for name, p in model.layers.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    assert all(p.grad is None for p in model.base.parameters())


def test_the_answer_alone_teaches_what_wrote(config):
    """Without the auxiliary terms: the cross-entropy of the answer reaches keys, and the surprise predictor."""
    model, trainer = make_trainer(config)
    away_from_zero(model)
    talks = some_talks(4)
    states, _ = trainer.tell(talks)
    questions = [Question(f.question, f.answer, i) for i, talk in enumerate(talks) for f in talk.facts]
    trainer.ask(questions, states, True)[0].backward()
    for i, layer in enumerate(model.memory_layers):
        for name in (
            "key_proj.weight",
            "attention.q_proj.weight",
            "store.context_proj.weight",
            "store.predictor.2.bias",
        ):
            assert layer.get_parameter(name).grad.abs().max() > 0, f"layer {i}: {name}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resuming_gives_the_numbers_of_a_run_that_never_stopped(base, tmp_path, dtype):
    whole = training.train(make_config(base, tmp_path / "whole", dtype=dtype))
    middle = tmp_path / "whole" / "checkpoint_step2"
    rest = training.train(make_config(base, tmp_path / "rest", resume=middle, dtype=dtype))
    assert len(whole["history"]) == 4 and rest["history"] == whole["history"]
    ends = [tmp_path / name / "final_step4" for name in ("whole", "rest")]
    assert_equal(*map(weights_of, ends))
    assert_equal(*(load_file(end / "training_state.safetensors") for end in ends))
    assert not torch.equal(weights_of(middle)["0.key_proj.weight"], weights_of(ends[0])["0.key_proj.weight"])
    history = json.loads((tmp_path / "rest" / "training_history.json").read_text())
    assert history == whole["history"] and set(history[-1]) >= {"val_name", "val_facts", "val_corrected", "grad_norm"}


def test_what_passes_the_base_together_does_not_depend_on_the_process(config, monkeypatch):
    """Python shuffles sets of strings from process to process; rows of a batch must not follow."""
    _, trainer = make_trainer(config)
    passed, record = [], trainer.reader.record
    monkeypatch.setattr(trainer.reader, "record", lambda texts: passed.extend(texts) or record(texts))
    texts = [f"Nothing to say {letter}." for letter in "qwertyuiopasdfghjklzxcvbnm"]
    trainer.reader.learn([*texts, "Short.", *texts])
    assert passed == ["Short.", *sorted(texts)]


def run_in_two_processes(script, *arguments):
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, *map(str, (script, *arguments))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_accumulated_batches_are_one_batch_mean(base, tmp_path):
    config = make_config(base, tmp_path, batch_size=2, grad_accum=2, num_train=4)
    assert config.steps == 1
    training.train(config)
    model, trainer = make_trainer(config)
    optimizer = training.make_optimizer(model, config)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * training.rate(1, config)
    chatter = chatter_pool(random.Random(f"{config.seed} chatter"))
    trainer.reader.learn(chatter)
    trainer.train()
    for micro in range(2):
        rng = random.Random(f"{config.seed} 1 {micro} 0")
        talks = [draw_training_conversation(rng, names(), chatter) for _ in range(2)]
        (trainer(talks, rng)["loss"] / 2).backward()
    torch.nn.utils.clip_grad_norm_(model.layers.parameters(), config.max_grad_norm)
    optimizer.step()
    end = weights_of(tmp_path / "final_step1")
    for name, x in model.layers.state_dict().items():
        torch.testing.assert_close(end[name], x, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


TWO = """
import os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from tiny_training import make_config
from fastmem.experiments import llm_memory_train as training

base, folder = map(Path, sys.argv[1:])
rank = int(os.environ["RANK"])
made, original = [], training.new_model
training.new_model = lambda *arguments: made.append(original(*arguments)) or made[0]
history = training.train(make_config(base, folder, num_train=9))["history"]
weights = {name: p.detach().contiguous() for name, p in made[0].layers.named_parameters()}
save_file(weights, folder / f"rank{rank}.safetensors", metadata={"loss": str(history[-1]["loss"])})
"""


def test_two_processes_agree(base, tmp_path):
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    script = tmp_path / "two.py"
    script.write_text(TWO)
    run_in_two_processes(script, base, tmp_path / "run")
    ranks = [load_file(tmp_path / "run" / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert_equal(*ranks)
    end = weights_of(tmp_path / "run" / "final_step3")
    assert_equal(ranks[0], {name: end[name] for name in ranks[0]})
    alone = make_config(base, tmp_path / "alone", num_train=9)
    training.train(alone)
    single = weights_of(tmp_path / "alone" / "final_step3")  # one process sees half of the conversations
    assert not torch.equal(single["0.key_proj.weight"], end["0.key_proj.weight"])


class Stop(BaseException):
    pass


@pytest.mark.parametrize("file", range(4))
def test_a_killed_save_leaves_the_old_checkpoint(config, monkeypatch, file):
    """Stopped at any of its four files, and with no chance to clean up."""
    model, _ = make_trainer(config)
    optimizer = training.make_optimizer(model, config)
    folder = config.checkpoint_dir / "checkpoint_step1"
    training.save_checkpoint(folder, model, optimizer, {"step": 1})
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert len(before) == 4
    for p in model.layers.parameters():
        p.data.add_(1.0)
    count, replace = [0], os.replace

    def kill(*arguments):
        count[0] += 1
        if count[0] > file:
            raise Stop
        replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        patch.setattr(shutil, "rmtree", lambda *arguments, **more: None)
        with pytest.raises(Stop):
            training.save_checkpoint(folder, model, optimizer, {"step": 2})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    fresh, _ = make_trainer(config)
    assert training.load_checkpoint(folder, fresh, training.make_optimizer(fresh, config)) == {"step": 1}
    training.save_checkpoint(folder, model, optimizer, {"step": 3})
    assert training.load_checkpoint(folder, fresh, training.make_optimizer(fresh, config)) == {"step": 3}
    assert_equal(dict(fresh.layers.state_dict()), dict(model.layers.state_dict()))
    left = [p.name for p in config.checkpoint_dir.iterdir()]
    assert sorted(left) == ["base_replies.json", "checkpoint_step1"]


def test_only_the_best_checkpoint_is_kept(config):
    model, _ = make_trainer(config)
    optimizer = training.make_optimizer(model, config)
    for step in (1, 5):
        training._replace_best(config.checkpoint_dir, step, model, optimizer, {"step": step})
    assert [p.name for p in config.checkpoint_dir.glob("best_step*")] == ["best_step5"]


def test_what_is_no_checkpoint(config, tmp_path):
    model, _ = make_trainer(config)
    optimizer = training.make_optimizer(model, config)
    model.save_pretrained(tmp_path / "adapter")
    before = {k: v.clone() for k, v in model.layers.state_dict().items()}
    for folder in (tmp_path / "nowhere", tmp_path / "adapter"):
        with pytest.raises(ValueError, match="not a training checkpoint") as caught:
            training.load_checkpoint(folder, model, optimizer)
        assert str(folder) in str(caught.value)
    assert_equal(dict(model.layers.state_dict()), before)


def test_a_run_begins_with_the_adapter_that_a_glob_means(config, tmp_path):
    model, _ = make_trainer(config)
    with torch.no_grad():
        for step in (1, 12, 3):
            for parameter in model.layers.parameters():
                parameter.fill_(step / 100)
            model.save_pretrained(tmp_path / f"best_step{step}")
        for parameter in model.layers.parameters():
            parameter.zero_()
    training.begin_with(model, tmp_path / "best_step*")
    assert {round(p.max().item(), 4) for p in model.layers.parameters()} == {0.12}
    with pytest.raises(ValueError, match="nowhere"):
        training.begin_with(model, tmp_path / "nowhere*")


def test_validation_changes_nothing(config):
    model, trainer = make_trainer(config)
    trainer.train()
    before = {k: v.clone() for k, v in model.layers.state_dict().items()}
    scores = training.validate(trainer, 2, 0)
    assert scores == training.validate(trainer, 2, 0)
    assert set(scores) == {"name", "facts", "held_out_kinds", "corrected"}
    assert trainer.training and model.memory.names == ()
    assert_equal(dict(model.layers.state_dict()), before)


def test_the_base_speaks_for_itself(config):
    """What memory must not change is what the base says, not what the adapter makes of it."""
    model, trainer = make_trainer(config)
    prompts = ("Why is the sky blue?", "Tell me a joke.")
    expected = training.base_replies(model, trainer.chat, prompts, length=5)
    model.unload()
    assert training.base_replies(model, trainer.chat, prompts, length=5) == expected
    assert [p for p, _ in expected] == list(prompts) and all(reply for _, reply in expected)


def test_configurations_that_make_no_sense(base, tmp_path):
    for name, value in (
        ("epochs", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("dtype", "int8"),
        ("grad_accum", 0),
        ("max_grad_norm", float("inf")),
        ("weight_decay", -1.0),
        ("warmup_steps", -1),
    ):
        with pytest.raises(ValueError, match=name):
            make_config(base, tmp_path, **{name: value})

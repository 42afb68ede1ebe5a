import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_chat import make_base, make_model, make_tokenizer, one_thread, save_adapter, save_base

from fastmem.models import ExperimentConfig, MemoryAugmentedModel, MemoryModel
from fastmem.models.memory_augmented_model import find_checkpoint

pytest.importorskip("transformers")
__all__ = ["one_thread"]


@pytest.fixture
def adapter(tmp_path):
    return save_adapter(tmp_path / "checkpoints" / "best_step50")


def flat(model, session):
    return [x for s in model.model.memory.states_of(session) for part in s for x in part]


def test_the_documents_own_example(adapter, tmp_path):
    base = save_base(tmp_path / "base")
    config = ExperimentConfig(model_name=str(base), memory_layer_positions=[1, 3], device="cpu")
    model = MemoryAugmentedModel(config)
    model.load_checkpoint(adapter.with_name("best_step*.pt"))
    response, info = model.generate("Hello! My name is Alice.", update_memory=True)
    assert isinstance(response, str) and info["written"]["buffer"] > 0
    model.clear_memory()
    response, info = model.generate("What is my name?", update_memory=False)
    assert info["live"] == info["written"] == {"buffer": 0, "store": 0}


def test_only_the_users_words_are_stored(adapter):
    model = make_model(adapter)
    text = "hello my name is alice"
    _, info = model.generate(text, session="a")
    batch = model.chat.batch([text])
    assert batch.user.sum() == 5
    assert info["prompt_tokens"] == batch.input_ids.shape[1] > 5
    held = {row["token"] for row in model.held("a", 100)}
    assert held <= set(text.split()) and "alice" in held
    assert info["live"]["buffer"] <= 5 * 2  # two memory layers


def test_info(adapter):
    model = make_model(adapter)
    _, info = model.generate("my name is alice", session="a", max_new_tokens=3)
    assert info["session"] == "a" and 1 <= info["new_tokens"] <= 3
    assert info["seconds"] > 0 and info["tokens_per_second"] > 0
    surprise = [s for _, s in info["surprising"]]
    assert surprise == sorted(surprise, reverse=True) and 0 < len(surprise) <= 4
    assert {t for t, _ in info["surprising"]} <= {"my", "name", "is", "alice"}
    _, info = model.generate("what is my name ?", update_memory=False, session="a")
    assert info["surprising"] == [] and info["written"] == {"buffer": 0, "store": 0}
    assert info["live"]["buffer"] > 0


def test_threads_wait_for_each_other(adapter):
    model, alone, errors = make_model(adapter), make_model(adapter), []
    told = {f"user {i}": "my dog is rex . " * (i + 1) + "hello" for i in range(3)}
    expected = {name: alone.generate(text, session=name)[1] for name, text in told.items()}

    def talk(name, text):
        try:
            for _ in range(4):
                model.clear_memory(name) if name in model.model.memory else None
                info = model.generate(text, session=name)[1]
                assert {k: info[k] for k in same} == {k: expected[name][k] for k in same}
        except BaseException as error:
            errors.append(error)

    same = ("session", "prompt_tokens", "written", "live", "surprising")
    threads = [threading.Thread(target=talk, args=item) for item in told.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_an_error_after_the_answer_leaves_memory_as_it_was(adapter, monkeypatch):
    model = make_model(adapter)
    model.generate("my name is alice", session="a")
    before = [x.clone() for x in flat(model, "a")]

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_most_surprising", fail)
    for session in ("a", "new"):
        with pytest.raises(KeyboardInterrupt):
            model.generate("my dog is rex", session=session)
    assert "new" not in model.model.memory
    assert all(torch.equal(x, y) for x, y in zip(flat(model, "a"), before, strict=True))


def test_each_call_stands_alone(adapter):
    model = make_model(adapter)
    first, _ = model.generate("where do i live ?", update_memory=False)
    model.generate("my name is alice", session="other")
    assert model.generate("where do i live ?", update_memory=False)[0] == first
    assert "default" not in model.model.memory


def test_asking_changes_nothing(adapter):
    model = make_model(adapter)
    model.generate("my name is alice")
    before = [x.clone() for x in flat(model, "default")]
    model.generate("what is my name ?", update_memory=False)
    assert all(torch.equal(a, b) for a, b in zip(before, flat(model, "default"), strict=True))


def test_memory_changes_answers_and_survives_a_file(adapter, tmp_path):
    model = make_model(adapter)
    path = tmp_path / "m.memory"
    model.generate("my name is alice", session="a")
    model.generate("i live in lisbon", session="b")
    batch = model.chat.batch(["what is my name ?"])

    def logits(m, session):
        with torch.no_grad():
            return m.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                sessions=[session],
                update_memory=False,
            ).logits

    told, empty = logits(model, "a"), logits(model, "nobody")
    assert not torch.equal(told, empty)
    model.save_memory(path, "a")
    other = make_model(adapter)
    assert other.load_memory(path) == ("a",)
    assert torch.equal(logits(other, "a"), told)
    assert torch.equal(logits(other, "b"), empty)


def test_decay_and_clear(adapter):
    model = make_model(adapter)
    model.generate("my name is alice", session="a")
    model.generate("my name is bob", session="b")
    model.decay(200, "a")
    layers = model.model.memory.inspect("a")["layers"]
    assert sum(x["buffer"]["live"] for x in layers) == 0
    assert sum(x["buffer"]["live"] for x in model.model.memory.inspect("b")["layers"]) > 0
    model.clear_memory("a")
    assert model.model.memory.names == ("b",)
    for call in (model.clear_memory, lambda s: model.decay(1, s), model.held, lambda s: model.save_memory("x", s)):
        with pytest.raises(KeyError, match="unknown session 'a'; known: b"):
            call("a")


def test_held_names_the_tokens_and_their_strength(adapter):
    model = make_model(adapter)
    model.generate("my name is alice")
    model.decay(3)
    rows = model.held(top=2)
    assert [r["tier"] for r in rows].count("buffer") == 2
    for row in rows:
        assert row["token"] in ("my", "name", "is", "alice") and row["layers"] in (1, 2) and row["age"] == 3
        if row["tier"] == "buffer":
            assert row["strength"] == pytest.approx(0.95**3)


def test_untrained_layers_answer_as_the_base():
    model = make_model(memory_layer_positions=[0, 2])
    assert model.model.positions == (0, 2)
    model.generate("my name is alice")
    batch = model.chat.batch(["what is my name ?"])
    with torch.no_grad():
        said = make_base().generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=5, do_sample=False
        )
    expected = make_tokenizer().decode(said[0, batch.input_ids.shape[1] :], skip_special_tokens=True).strip()
    assert model.generate("what is my name ?", update_memory=False)[0] == expected


def test_generation_arguments_and_the_longest_answer(adapter):
    model = make_model(adapter, max_new_tokens=2)
    assert model.generate("hello")[1]["new_tokens"] <= 2
    assert model.generate("hello", max_new_tokens=7, min_new_tokens=7)[1]["new_tokens"] == 7
    torch.manual_seed(0)
    drawn = {model.generate("hello", do_sample=True, temperature=9.0, update_memory=False)[0] for _ in range(5)}
    assert len(drawn) > 1
    text, info = model.generate("hello my name is alice", num_beams=2, session="beams")
    assert isinstance(text, str) and info["written"]["buffer"] > 0


def test_a_checkpoint_replaces_the_layers(adapter, tmp_path):
    model = make_model()
    model.generate("hello")
    model.load_checkpoint(adapter)
    assert model.model.positions == (1, 3) and model.config.checkpoint == adapter
    assert model.model.memory.names == ()
    blocks = model.model.base.model.layers
    assert [len(block._forward_hooks) for block in blocks] == [0, 1, 0, 1]  # the old ones are gone
    answer = model.generate("hello my name is alice", update_memory=False)[0]
    assert answer == make_model(adapter).generate("hello my name is alice", update_memory=False)[0]


def test_a_checkpoint_that_does_not_fit_changes_nothing(adapter, tmp_path):
    model = make_model(adapter)
    model.generate("my name is alice")
    before = [len(block._forward_hooks) for block in model.model.base.model.layers]
    damaged = save_adapter(tmp_path / "damaged")
    weights = damaged / "memory_adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    far = save_adapter(tmp_path / "far")
    text = (far / "memory_config.json").read_text()
    (far / "memory_config.json").write_text(text.replace("3\n", "29\n"))
    save_file(load_file(far / weights.name), far / weights.name)  # without the configuration that belongs to it
    mixed = save_adapter(tmp_path / "mixed", decay_rate=0.9)
    (mixed / weights.name).write_bytes((adapter / weights.name).read_bytes())
    for folder, said in (
        (tmp_path / "nothing", "nothing: no memory adapter here"),
        (tmp_path, "no memory adapter here .memory_config.json is missing"),
        (damaged, "damaged: not a memory adapter"),
        (far, "the base has blocks 0 to 3, got 29"),
        (mixed, r"mixed: \S+ and \S+ are of two adapters \(decay_rate: 0.9 and 0.95\)"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            model.load_checkpoint(folder)
        assert "\n" not in str(caught.value)
        assert model.model.memory.names == ("default",)
        assert [len(block._forward_hooks) for block in model.model.base.model.layers] == before


def test_wrong_calls(adapter):
    with pytest.raises(ValueError, match=r"stands after blocks \(1, 3\), asked for \(2, 0\)"):
        make_model(adapter, memory_layer_positions=(2, 0))
    with pytest.raises(ValueError, match="the base has blocks 0 to 3, got 6"):
        make_model(memory_layer_positions=[3, 6, 9])
    with pytest.raises(ValueError, match="base, tokenizer: expected both or neither"):
        MemoryAugmentedModel(ExperimentConfig(), make_base())
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1"):
        ExperimentConfig(max_new_tokens=0)
    with pytest.raises(TypeError, match="max_new_tokens: expected an int"):
        ExperimentConfig(max_new_tokens=1.5)
    with pytest.raises(ValueError, match="dtype: expected auto, float32"):
        ExperimentConfig(dtype="int8")
    with pytest.raises(TypeError, match="text: expected str, got list"):
        make_model(adapter).generate(["hello"])
    with pytest.raises(TypeError, match="session: expected str, got list"):
        make_model(adapter).generate("hello", session=["a"])
    with pytest.raises(TypeError, match="return_dict_in_generate: a turn is text"):
        make_model(adapter).generate("hello", return_dict_in_generate=True)
    with pytest.raises(FileNotFoundError, match="no-such: no such folder"):
        MemoryAugmentedModel(ExperimentConfig("./no-such"))
    with pytest.raises(ValueError, match="no memory adapter here"):  # before a base is loaded
        MemoryAugmentedModel(ExperimentConfig("./no-such", checkpoint="nowhere/best*"))


def test_the_highest_step_of_a_glob(tmp_path):
    for step in (50, 100, 9):
        save_adapter(tmp_path / f"best_step{step}")
    (tmp_path / "best_step999").mkdir()  # not an adapter
    assert find_checkpoint(tmp_path / "best_step*").name == "best_step100"
    assert find_checkpoint(tmp_path / "best_step*.pt").name == "best_step100"
    assert find_checkpoint(tmp_path / "best_step9.pt").name == "best_step9"
    assert find_checkpoint(tmp_path / "best_step50").name == "best_step50"


def test_the_memory_model_below(adapter):
    model = make_model(adapter)
    assert isinstance(model.model, MemoryModel) and not model.model.training

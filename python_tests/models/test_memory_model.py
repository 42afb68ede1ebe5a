"""MemoryModel on one small Llama: ways of generating, what is written, errors, adapter files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_bases import ATTENTION, SIZES, assert_same_memory, config, make_base, make_model, prompt, tensors_of
from tiny_chat import one_thread

from fastmem import _files
from fastmem._files import atomic_write
from fastmem.models import MemoryModel, get_memory_model
from fastmem.models.kv_cache import cache_among, cache_name
from fastmem.models.memory_model import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from fastmem.nn import MemoryConfig

__all__ = ["one_thread"]
pytest.importorskip("transformers")
NEW = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
EVERY_TOKEN = {"buffer_slots": 30, "novelty_threshold": 1.01}  # a slot each


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def reference(model):
    """What greedy decoding says and leaves in memory, after another prompt."""
    model(input_ids=prompt(1))
    said = model.generate(prompt(0), **NEW)
    held = tensors_of(model, "default")
    model.memory.clear()
    model(input_ids=prompt(1))
    return said, held


@pytest.mark.parametrize(
    "way",
    [{"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 1}],
    ids=lambda way: next(iter(way)),
)
def test_every_way_of_greedy_decoding_writes_the_prompt_once(model, reference, way):
    said = model.generate(prompt(0), **NEW, **way)
    if "use_cache" not in way:  # without a cache the prompt's end passes again and reads what the prompt wrote
        assert torch.equal(said, reference[0])
    assert_same_memory(model, "default", reference[1])


def test_static_cache_with_left_padding(model):
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.int64), prompt(0, 7)], 1)
    mask = (ids > 0).long()
    alone = model.generate(prompt(0, 7), sessions=["alone"], **NEW)
    said = model.generate(ids, attention_mask=mask, sessions=["padded"], cache_implementation="static", **NEW)
    assert torch.equal(said[:, 10:], alone[:, 7:])
    assert_same_memory(model, "padded", tensors_of(model, "alone"))


def test_streamer_gets_every_token(model, reference):
    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, tokens):
            self.tokens += tokens.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    model.generate(prompt(0), streamer=streamer, **NEW)
    assert streamer.tokens == reference[0][0].tolist() and streamer.ended


def test_samples_of_one_prompt_share_its_session(model, reference):
    said = model.generate(prompt(0), do_sample=True, num_return_sequences=3, max_new_tokens=6, pad_token_id=0)
    assert said.shape == (3, 16)
    assert_same_memory(model, "default", reference[1], 1e-3)


@torch.no_grad()
def test_generating_behind_a_cache_writes_only_the_new_tokens():
    model = make_model(**EVERY_TOKEN)
    first = model.generate(prompt(0), return_dict_in_generate=True, **NEW)
    before = model.memory.inspect()["layers"][0]["buffer"]["live"]
    ids = torch.cat([first.sequences, prompt(1, 3)], 1)
    model.generate(ids, **{cache_name(model.base): cache_among(first)}, **NEW)
    after = model.memory.inspect()["layers"][0]["buffer"]
    # 3 told tokens and the last one said are new to the cache; the first of them has no state before it
    fresh = [s for s, age in zip(after["strength"], after["age"], strict=True) if age == 0]
    assert len(fresh) == 3 and before == 9


@torch.no_grad()
def test_inputs_embeds_write_what_their_tokens_write(model):
    ids = prompt(0)
    model(input_ids=ids, sessions=["ids"])
    embeddings = model.base.get_input_embeddings()(ids)
    model(inputs_embeds=embeddings, sessions=["embeds"])
    model.generate(inputs_embeds=embeddings, sessions=["generated"], num_beams=2, **NEW)
    for name in ("embeds", "generated"):
        assert_same_memory(model, name, tensors_of(model, "ids"))


@torch.no_grad()
def test_write_mask_says_what_is_stored():
    model = make_model(**EVERY_TOKEN)
    ids, mask = prompt(0, batch=2), torch.zeros(2, 10, dtype=torch.bool)
    mask[0, 4:7] = True
    mask[1, 2] = True
    model(input_ids=ids, sessions=["a", "b"], write_mask=mask)
    for name, count in (("a", 3), ("b", 1)):
        assert [layer["buffer"]["live"] for layer in model.memory.inspect(name)["layers"]] == [count] * 3
    content = torch.nn.functional.rms_norm(model.base.get_input_embeddings()(ids), (64,), eps=1e-6)
    assert torch.equal(model.memory.states_of("b")[0].buffer.values[0, 0], content[1, 2])
    model.memory.clear()
    model.generate(ids, sessions=["a", "b"], write_mask=mask, num_beams=3, **NEW)
    assert model.memory.inspect("a")["layers"][0]["buffer"]["live"] == 3
    model.memory.clear()
    model(input_ids=ids, write_mask=torch.zeros(2, 10))
    assert all(not layer["buffer"]["live"] for layer in model.memory.inspect("default-1")["layers"])


@pytest.mark.parametrize("shape", [(2, 9), (1, 10), (3, 10), (10,)])
def test_a_write_mask_of_another_shape(model, shape):
    with pytest.raises(ValueError, match=r"write_mask: expected \(2, 10\) like the prompt, got"):
        model.generate(prompt(0, batch=2), write_mask=torch.ones(shape, dtype=torch.bool), **NEW)
    assert model.memory.names == ()


def test_sessions_that_do_not_fit_the_batch(model):
    with pytest.raises(ValueError, match="sessions: expected 2, one per prompt, got 1"):
        model.generate(prompt(0, batch=2), sessions=["a"], **NEW)
    with pytest.raises(ValueError, match="each once"):
        model.generate(prompt(0, batch=2), sessions=["a", "a"], **NEW)
    assert model.memory.names == ()
    expected = model.base.generate(prompt(0), **NEW)
    assert torch.equal(model.generate(prompt(0), update_memory=False, **NEW), expected)


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["between memory layers", "after the prompt"])
def test_an_error_inside_generate_leaves_the_model_usable(model, reference, where):
    held = tensors_of(model, "default")
    calls = []

    def fail(*args):
        calls.append(args)
        if where == "between memory layers" or len(calls) == 3:
            raise Stop

    handle = model.base.model.layers[2].register_forward_pre_hook(fail)  # memory stands after blocks 1, 2 and 3
    with pytest.raises(Stop):
        model.generate(prompt(0), **NEW)
    handle.remove()
    assert_same_memory(model, "default", held, 0)
    assert torch.equal(model.generate(prompt(0), **NEW), reference[0])
    assert_same_memory(model, "default", reference[1])
    with model.disable_memory():
        assert torch.equal(model.generate(prompt(0), **NEW), model.base.generate(prompt(0), **NEW))


def test_an_error_inside_disable_memory(model, reference):
    with pytest.raises(Stop), model.disable_memory():
        raise Stop
    assert torch.equal(model.generate(prompt(0), **NEW), reference[0])


@torch.no_grad()
def test_two_models_on_one_base(model):
    other = make_model(model.base, seed=5)
    model(input_ids=prompt(1))
    assert other.memory.names == ()
    expected = model(input_ids=prompt(0), update_memory=False).logits
    other(input_ids=prompt(1))
    assert torch.equal(model(input_ids=prompt(0), update_memory=False).logits, expected)
    assert not torch.equal(other(input_ids=prompt(0), update_memory=False).logits, expected)


@torch.no_grad()
def test_unload_and_attach(model):
    plain = model.base(input_ids=prompt(0)).logits
    model(input_ids=prompt(1))
    expected = model(input_ids=prompt(0), update_memory=False).logits
    assert torch.equal(model.unload()(input_ids=prompt(0)).logits, plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.base.modules())
    model.attach()
    assert torch.equal(model(input_ids=prompt(0), update_memory=False).logits, expected)


def test_only_the_memory_is_trained(model, capsys):
    assert not any(p.requires_grad for p in model.base.parameters())
    adapter = sum(p.numel() for p in model.layers.parameters())
    base = sum(p.numel() for p in model.base.parameters())
    assert model.trainable_parameters() == (adapter, adapter + base)
    model.print_trainable_parameters()
    said = capsys.readouterr().out
    percent = 100 * adapter / (adapter + base)
    assert said == f"trainable params: {adapter:,} || all params: {adapter + base:,} || trainable%: {percent:.4f}\n"


def test_gradients_reach_the_adapter_and_not_the_base(model):
    model(input_ids=prompt(1))
    model(input_ids=prompt(0), update_memory=False).logits.square().mean().backward()
    for layer in model.memory_layers:
        assert layer.attention.q_proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.base.parameters())


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"buffer_slots": 0}, {"store_slots": 0}, {"buffer_slots": 0, "store_slots": 0}])
def test_a_memory_without_one_of_its_tiers(changes, tmp_path):
    model = make_model(**changes)
    expected = model.base.generate(prompt(0), **NEW)
    model.generate(prompt(1), **NEW)
    model.memory.save(tmp_path / "m")
    model.memory.load(tmp_path / "m")
    said = model(input_ids=prompt(0), update_memory=False).logits
    assert torch.equal(said, model.base(input_ids=prompt(0)).logits) == (len(changes) == 2)
    for part in changes:
        assert model.memory.inspect()["layers"][0][part.split("_")[0]]["slots"] == 0
    if len(changes) == 2:
        assert torch.equal(model.generate(prompt(0), **NEW), expected)


def test_bases_that_do_not_fit():
    base = make_base()
    with pytest.raises(ValueError, match="hidden_dim: expected 64, the base's width, got 32"):
        MemoryModel(base, config(hidden_dim=32))
    with pytest.raises(ValueError, match="the base has blocks 0 to 3, got 4"):
        MemoryModel(base, config(memory_layer_positions=(1, 4)))
    with pytest.raises(ValueError, match="expected distinct blocks"):
        MemoryModel(base, config(memory_layer_positions=(1, 1)))
    base.model.layers = torch.nn.ModuleList(list(base.model.layers)[:3])
    with pytest.raises(ValueError, match="a ModuleList of 4 blocks, found none in LlamaForCausalLM"):
        MemoryModel(base, config())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_generation_cut_off_half_way_leaves_memory_as_it_was(model, error):
    """The prompt has been written by then; neither a session that was told before nor a new one keeps it."""

    class CutOff:
        def __init__(self):
            self.tokens = 0

        def put(self, ids):
            self.tokens += 1
            if self.tokens == 4:
                assert "bob" in model.memory  # the prompt is through
                raise error

        def end(self):
            raise AssertionError

    model(input_ids=prompt(1), sessions=["alice"])
    expected = tensors_of(model, "alice")
    with pytest.raises(error):
        model.generate(prompt(2), sessions=["bob"], streamer=CutOff(), **NEW)
    assert model.memory.names == ("alice",)
    model.memory.put(["bob"], model.memory.states_of("alice"))
    with pytest.raises(error):
        model.generate(prompt(2), sessions=["bob"], streamer=CutOff(), **NEW)
    for session in ("alice", "bob"):
        assert_same_memory(model, session, expected, 0)


def test_get_memory_model_takes_the_bases_width():
    model = get_memory_model(make_base())
    assert model.config.hidden_dim == 64 and model.positions == (1, 2, 3)
    assert get_memory_model(make_base(), config(memory_layer_positions=[2, 0])).positions == (0, 2)


def without_config(folder):
    """Make an adapter one whose weights do not carry the configuration."""
    save_file(load_file(folder / ADAPTER_WEIGHTS), folder / ADAPTER_WEIGHTS)


class TestAdapterFiles:
    @pytest.fixture
    def folder(self, model, tmp_path):
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    def load(self, folder, base=None):
        base = make_base() if base is None else base
        try:
            return MemoryModel.from_pretrained(base, folder)
        except ValueError as error:
            assert "\n" not in str(error), "one line"
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules()), "nothing is left behind"
            raise

    def test_only_adapter_weights_are_in_it(self, model, folder):
        assert set(load_file(folder / ADAPTER_WEIGHTS)) == set(model.layers.state_dict())

    def test_float16_halves_the_file_and_keeps_counts(self, model, folder, tmp_path):
        model.memory_layers[0].store.count.fill_(1e6)
        model.save_pretrained(tmp_path / "half", torch.float16)
        sizes = [(f / ADAPTER_WEIGHTS).stat().st_size for f in (folder, tmp_path / "half")]
        assert sizes[1] < 0.65 * sizes[0]
        again = self.load(tmp_path / "half")
        assert again.memory_layers[0].store.count == 1e6
        assert all(p.dtype == torch.float32 for p in again.parameters())
        for name, p in model.layers.named_parameters():
            torch.testing.assert_close(again.layers.get_parameter(name), p, rtol=1e-3, atol=1e-3)

    def test_missing(self, folder, tmp_path):
        with pytest.raises(ValueError, match=f"no memory adapter here .{ADAPTER_CONFIG} is missing"):
            self.load(tmp_path / "nowhere")
        (folder / ADAPTER_WEIGHTS).unlink()
        with pytest.raises(ValueError, match=f"{ADAPTER_WEIGHTS} is missing"):
            self.load(folder)

    def test_truncated(self, folder):
        file = folder / ADAPTER_WEIGHTS
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match="not a memory adapter"):
            self.load(folder)

    def test_foreign_json(self, folder):
        (folder / ADAPTER_CONFIG).write_text('{"peft_type": "LORA"}')
        with pytest.raises(ValueError, match="not a memory adapter"):
            self.load(folder)

    def test_a_newer_format(self, folder):
        entry = json.loads((folder / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps(entry | {"format": 2}))
        with pytest.raises(ValueError, match=r"not a memory adapter .*format 2, this version"):
            self.load(folder)

    def test_a_save_cut_off_between_its_files(self, folder, monkeypatch):
        other = make_model(decay_rate=0.5)

        def cut_off(path, content, **_):
            if path.name == ADAPTER_WEIGHTS:
                raise KeyboardInterrupt
            atomic_write(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(_files, "atomic_write", cut_off)
            with pytest.raises(KeyboardInterrupt):
                other.save_pretrained(folder)
        said = f"adapter: {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} are of two adapters .decay_rate: 0.5 and 0.95.; save"
        with pytest.raises(ValueError, match=said):
            self.load(folder)
        other.save_pretrained(folder)
        assert self.load(folder).config == other.config

    def test_the_weights_alone_from_another_folder(self, model, folder, tmp_path):
        make_model(memory_layer_positions=(0, 1, 2)).save_pretrained(tmp_path / "other")
        (folder / ADAPTER_WEIGHTS).write_bytes((tmp_path / "other" / ADAPTER_WEIGHTS).read_bytes())
        with pytest.raises(ValueError, match=r"two adapters \(memory_layer_positions: \[1, 2, 3\] and \[0, 1, 2\]\)"):
            self.load(folder)

    def test_a_newer_versions_setting_in_the_weights(self, folder):
        weights, entry = load_file(folder / ADAPTER_WEIGHTS), json.loads((folder / ADAPTER_CONFIG).read_text())
        entry["config"]["new"] = 1
        save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"memory_config": json.dumps(entry)})
        with pytest.raises(ValueError, match=r"two adapters \(new: None and 1\)"):
            self.load(folder)

    @pytest.mark.parametrize("text", ["{", "5", "{}"])
    def test_metadata_that_is_no_configuration(self, folder, text):
        save_file(load_file(folder / ADAPTER_WEIGHTS), folder / ADAPTER_WEIGHTS, metadata={"memory_config": text})
        with pytest.raises(ValueError, match="not a memory adapter"):
            self.load(folder)

    def test_weights_without_a_configuration_of_their_own(self, model, folder):
        """As they were written before, and as the packaged adapter is."""
        without_config(folder)
        loaded = self.load(folder)
        assert loaded.config == model.config
        for name, x in model.layers.state_dict().items():
            assert torch.equal(loaded.layers.state_dict()[name], x)

    def test_weights_of_another_size(self, folder):
        without_config(folder)
        entry = json.loads((folder / ADAPTER_CONFIG).read_text())
        entry["config"]["memory_dim"] = 16
        (folder / ADAPTER_CONFIG).write_text(json.dumps(entry))
        with pytest.raises(ValueError, match="the weights do not fit their configuration"):
            self.load(folder)

    def test_a_missing_weight(self, folder):
        weights = load_file(folder / ADAPTER_WEIGHTS)
        weights.pop("0.key_proj.weight")
        save_file(weights, folder / ADAPTER_WEIGHTS)
        with pytest.raises(ValueError, match=r"the weights do not fit their configuration .*0\.key_proj\.weight"):
            self.load(folder)

    def test_another_base(self, folder):
        from transformers import LlamaConfig, LlamaForCausalLM

        wide = LlamaForCausalLM(LlamaConfig(**(SIZES | ATTENTION | {"hidden_size": 32})))
        with pytest.raises(ValueError, match="expected 32, the base's width, got 64"):
            self.load(folder, wide)
        flat = LlamaForCausalLM(LlamaConfig(**(SIZES | ATTENTION | {"num_hidden_layers": 2})))
        with pytest.raises(ValueError, match="the base has blocks 0 to 1"):
            self.load(folder, flat)


def test_config_refuses_nonsense():
    for name, value in (("hidden_dim", 0), ("store_slots", -1), ("decay_rate", 1.5), ("temperature", 0), ("top_k", 0)):
        with pytest.raises(ValueError, match=name):
            MemoryConfig(**{name: value})
    with pytest.raises(ValueError, match="memory_dim: expected a multiple of num_heads 5"):
        MemoryConfig(hidden_dim=10, memory_dim=12, num_heads=5)
    for name, value in (("hidden_dim", 64.0), ("top_k", 1.5), ("memory_layer_positions", ("1", "2"))):
        with pytest.raises(ValueError, match=f"{name}: expected .*integer"):
            MemoryConfig(**{name: value})

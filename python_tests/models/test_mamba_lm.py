import copy
import json

import pytest
import torch
from tiny_chat import one_thread  # noqa: F401

from fastmem.models import MambaLM, MambaLMConfig

CONFIG = MambaLMConfig(vocab_size=31, d_model=12, n_layer=2, d_state=4)


def make(seed=0, **more):
    torch.manual_seed(seed)
    model = MambaLM(MambaLMConfig(**{**vars(CONFIG), **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.2 if parameter.ndim == 2 else 0.05) * torch.randn_like(parameter))
    return model.eval()


def prompt(*shape, seed=1):
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))


def error(ours, truth):
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


def hugging_face(**more):
    from transformers.models.mamba import MambaConfig, MambaForCausalLM

    torch.manual_seed(2)
    config = MambaConfig(vocab_size=31, hidden_size=12, num_hidden_layers=2, state_size=4, **more)
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.2 if parameter.ndim == 2 else 0.05) * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_bias": True, "use_conv_bias": False, "expand": 3, "conv_kernel": 3, "time_step_rank": 5},
        {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-2, "residual_in_fp32": False},
    ],
)
@torch.no_grad()
def test_logits_are_those_of_transformers_with_its_weights(more):
    theirs, ids = hugging_face(**more), prompt(2, 17)
    ours = MambaLM.from_state_dict(
        theirs.state_dict(),
        norm_eps=more.get("layer_norm_epsilon", 1e-5),
        residual_in_fp32=more.get("residual_in_fp32", True),
    )
    assert error(ours(ids), theirs(ids).logits) < 1e-5
    assert error(ours.get_features(ids), theirs.backbone(ids).last_hidden_state) < 1e-5
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert torch.equal(ours.generate(ids, 20), expected)
    headless = MambaLM.from_state_dict(theirs.backbone.state_dict(), norm_eps=more.get("layer_norm_epsilon", 1e-5))
    assert headless.config.tie_embeddings and error(headless.get_features(ids), ours.get_features(ids)) < 1e-5


@torch.no_grad()
def test_weights_of_mamba_ssm_load_by_name():
    """Its names are ours; a tied head may be there or not."""
    model, ids = make(), prompt(1, 9)
    weights = model.state_dict()
    assert {
        "backbone.embedding.weight",
        "backbone.layers.1.mixer.A_log",
        "backbone.layers.0.norm.weight",
        "backbone.norm_f.weight",
        "lm_head.weight",
    } <= set(weights)
    loaded = MambaLM.from_state_dict(weights)
    assert loaded.config == MambaLMConfig(**{**vars(CONFIG), "dt_rank": 1})
    assert torch.equal(loaded(ids), model(ids))
    assert loaded.lm_head.weight is loaded.backbone.embedding.weight
    del weights["lm_head.weight"]
    assert torch.equal(MambaLM.from_state_dict(weights)(ids), model(ids))
    loaded.backbone.norm_f.weight.zero_()  # a copy
    assert model.backbone.norm_f.weight.any()
    assert loaded.backbone.layers[1].mixer.D._no_weight_decay and all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("prompt_length", [1, 2, 6])
@torch.no_grad()
def test_pieces_and_steps_equal_one_pass(prompt_length):
    model, ids = make(), prompt(3, 9)
    whole, end = model(ids, return_state=True)
    logits, state = model(ids[:, :prompt_length], return_state=True)
    outs = [logits]
    for token in ids[:, prompt_length:].unbind(1):
        logits, state = model.step(token, state)
        outs.append(logits[:, None])
    assert error(torch.cat(outs, 1), whole) < 1e-5
    torch.testing.assert_close(state, end, rtol=1e-4, atol=1e-6)
    first, state = model(ids[:, :4], return_state=True)
    assert error(torch.cat([first, model(ids[:, 4:], state)], 1), whole) < 1e-5
    assert error(model.step(ids[:, 0], model.empty_state(3))[0], whole[:, 0]) < 1e-5


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other():
    model, ids = make(), prompt(1, 10)
    expected = torch.cat([model(part) for part in ids.split((3, 1, 6), 1)], 1)
    assert error(model(ids, cu_seqlens=torch.tensor([0, 3, 4, 10])), expected) < 1e-5
    reset = torch.zeros(1, 10, dtype=torch.bool)
    reset[0, [3, 4]] = True
    assert error(model(ids, reset=reset), expected) < 1e-5


def test_it_learns():
    torch.manual_seed(0)
    model, ids = MambaLM(CONFIG), prompt(4, 12)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def loss():
        return torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    before = loss().item()
    for _ in range(80):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert before > 3 and loss().item() < 0.2
    assert torch.equal(model.generate(ids[:, :4], 8), ids)


def test_greedy_generation_is_what_full_passes_say():
    model, ids = make(), prompt(2, 5)
    grown = ids
    for _ in range(12):
        grown = torch.cat([grown, model(grown)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, 12), grown) and len(grown.unique()) > 5
    assert torch.equal(model.generate(ids, 0), ids)


def test_rows_end_with_eos():
    model, ids = make(), prompt(2, 5)
    free = model.generate(ids, 12)[:, 5:]
    first = {row: free[row].tolist() for row in range(2)}
    eos = next(t for t in first[0] if t not in first[1])
    out = model.generate(ids, 12, eos=eos)[:, 5:]
    end = first[0].index(eos)
    assert out[0].tolist() == first[0][: end + 1] + [eos] * (11 - end) and out[1].tolist() == first[1]
    assert model.generate(ids[:1], 12, eos=eos).shape == (1, 5 + end + 1)


def test_draws_follow_the_distribution_and_the_seed():
    model, ids = make(), prompt(1, 4).expand(4000, -1)

    def draw(seed=0, **options):
        return model.generate(ids, 1, generator=torch.Generator().manual_seed(seed), **options)[:, -1]

    probabilities = (model(ids[:1])[0, -1] / 0.7).softmax(-1)
    drawn = draw(temperature=0.7)
    assert torch.equal(drawn, draw(temperature=0.7)) and not torch.equal(drawn, draw(1, temperature=0.7))
    frequencies = torch.bincount(drawn, minlength=31) / 4000
    assert (frequencies - probabilities).abs().max() < 0.04
    order = probabilities.argsort(descending=True)
    assert set(draw(temperature=0.7, top_k=3).tolist()) == set(order[:3].tolist())
    enough = int((probabilities[order].cumsum(0) < 0.6).sum()) + 1
    assert 1 < enough < 31
    assert set(draw(temperature=0.7, top_p=0.6).tolist()) <= set(order[:enough].tolist())
    assert set(draw(temperature=0.7, top_p=1e-6).tolist()) == {order[0].item()}
    assert set(draw(temperature=1e-4).tolist()) == {order[0].item()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, dtype, tied):
    model, ids = make(tie_embeddings=tied, norm_eps=1e-3, residual_in_fp32=False).to(dtype), prompt(1, 6)
    model.save_pretrained(tmp_path / "model")
    loaded = MambaLM.from_pretrained(tmp_path / "model")
    assert vars(loaded.config) == {**vars(model.config), "dt_rank": 1}
    assert torch.equal(loaded(ids), model(ids)) and loaded(ids).dtype == dtype
    assert MambaLM.from_pretrained(tmp_path / "model", dtype=torch.float64)(ids).dtype == torch.float64
    entry = json.loads((tmp_path / "model" / "config.json").read_text())
    assert entry["config"]["d_model"] == 12
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("shard", ["5GB", "4KB"])
@torch.no_grad()
def test_a_folder_of_hugging_face(tmp_path, shard):
    theirs, ids = hugging_face(layer_norm_epsilon=1e-2), prompt(1, 8)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "4KB")
    ours = MambaLM.from_pretrained(tmp_path)
    assert ours.config.norm_eps == 1e-2 and error(ours(ids), theirs(ids).logits) < 1e-5


def test_half_precision_keeps_its_residual_in_float32():
    model, ids = make().bfloat16(), prompt(2, 9)
    truth = copy.deepcopy(model).double()(ids)
    seen = []
    layer = model.backbone.layers[1]
    layer.mixer.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    logits = model(ids)
    assert logits.dtype == torch.bfloat16 and seen == [torch.bfloat16]
    assert model._residual(logits).dtype == torch.float32
    assert error(logits, truth) < 2e-2
    assert model.generate(ids, 3).shape == (2, 12)


def test_the_start_is_that_of_mamba_ssm():
    torch.manual_seed(0)
    model = MambaLM(MambaLMConfig(vocab_size=500, d_model=64, n_layer=9, bias=True))
    assert model.backbone.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    bound = 128**-0.5 / 3  # a Linear's usual one, over the root of n_layer
    weight = model.backbone.layers[4].mixer.out_proj.weight
    assert 0.95 * bound < weight.abs().max() <= bound
    assert not model.backbone.layers[4].mixer.in_proj.bias.any()


def config(**change):
    return lambda _: MambaLMConfig(**{**vars(CONFIG), **change})


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda m: m(torch.zeros(2, 3)), TypeError, "ids: expected a tensor of int64, got torch.float32"),
        (lambda m: m(prompt(3)), ValueError, r"ids: expected \(B, L\), got \(3,\)"),
        (lambda m: m.step(prompt(3, 1), m.empty_state(3)), ValueError, r"ids: expected \(B,\), got \(3, 1\)"),
        (
            lambda m: m(prompt(1, 2), m.empty_state(1)[:1]),
            ValueError,
            "state: expected one for each of 2 layers, got 1",
        ),
        (lambda m: m.generate(prompt(1, 0), 2), ValueError, "ids: expected at least one token"),
        (lambda m: m.generate(prompt(1, 2), -1), ValueError, "max_new_tokens"),
        (lambda m: m.generate(prompt(1, 2), 1, temperature=-1.0), ValueError, "temperature"),
        (lambda m: m.generate(prompt(1, 2), 1, temperature=1.0, top_k=0), ValueError, "top_k"),
        (lambda m: m.generate(prompt(1, 2), 1, temperature=1.0, top_p=1.5), ValueError, "top_p"),
        (config(vocab_size=0), ValueError, "^vocab_size: expected at least 1, got 0"),
        (config(n_layer="2"), TypeError, "^n_layer: expected an int, got '2'"),
        (config(d_model=12.0), TypeError, "^d_model: expected an int, got 12.0"),
        (config(dt_rank=0), ValueError, "^dt_rank: expected at least 1, got 0"),
        (config(dt_rank="most"), ValueError, "^dt_rank: expected 'auto' or an int, got 'most'"),
        (config(expand=0.05), ValueError, "^expand: expected at least one inner channel"),
        (config(norm_eps=0.0), ValueError, "^norm_eps: expected a finite number above 0, got 0.0"),
        (config(norm_eps="1e-5"), TypeError, "^norm_eps: expected a number, got '1e-5'"),
        (config(tie_embeddings="no"), TypeError, "^tie_embeddings: expected a bool, got 'no'"),
        (lambda m: m(prompt(1, 2), m.empty_state(2)), ValueError, "^state.conv: expected"),
        (lambda m: MambaLM.from_state_dict({"backbone.norm_f.weight": torch.zeros(2)}), ValueError, "weights"),
        (lambda m: MambaLM.from_state_dict({**m.state_dict(), "backbone.x": torch.zeros(2)}), ValueError, "backbone.x"),
        (lambda m: MambaLM.from_pretrained("/nowhere"), ValueError, "expected a folder with a model"),
    ],
)
def test_wrong_arguments_are_named(call, exception, message):
    with pytest.raises(exception, match=message):
        call(make())


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    make().save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(ValueError, match="not a Mamba language model"):
        MambaLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type: expected 'mamba', got 'llama'"):
        MambaLM.from_pretrained(tmp_path)

import copy
import logging
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from tiny_chat import one_thread  # noqa: F401
from tiny_mambas import MAKERS, make, prompt
from transformers import DataCollatorWithFlattening

from fastmem.integrations import transformers as integration
from fastmem.integrations.transformers import accelerate, accelerated, restore

KINDS = list(MAKERS)


def error(ours, truth):
    return ((ours - truth).norm() / truth.norm()).item()


def gradients(model, **inputs):
    """The loss and the gradient of every parameter that it reaches."""
    loss = model(**inputs, use_cache=False).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    return loss, [g for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None]


def assert_same_gradients(ours, truth, bound=1e-4):
    assert error(ours[0], truth[0]) < bound and len(ours[1]) == len(truth[1]) > 10
    for a, b in zip(ours[1], truth[1], strict=True):
        assert (a - b).norm() <= bound * b.norm() + 1e-7


def cache_of(output):
    """Under the name that this transformers has for it."""
    name = next(k for k in ("cache", "cache_params", "past_key_values") if k in output)
    return {name: output[name]}


@pytest.fixture
def counted(monkeypatch):
    """How often transformers came to us for each function."""
    calls = dict.fromkeys(integration.OURS, 0)

    def counting(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(integration, "OURS", {k: counting(k, f) for k, f in integration.OURS.items()})
    integration._mixer_forward.cache_clear()
    yield calls
    integration._mixer_forward.cache_clear()


@pytest.fixture
def log(caplog):
    """What transformers logs, which it does not hand on to the root logger."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_those_of_transformers_alone(kind, counted):
    model, ids = make(kind), prompt(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    alone = [model(ids).logits, model(ids, attention_mask=mask, use_cache=False).logits[:, 5:]]
    with accelerated(model):
        ours = [model(ids).logits, model(ids, attention_mask=mask, use_cache=False).logits[:, 5:]]
    for a, b in zip(ours, alone, strict=True):
        assert error(a, b) < 1e-4
    assert counted["causal_conv1d_fn"] > 0
    assert counted["mamba_selective_scan"] + counted["selective_scan_fn"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers_alone(kind, counted):
    model, ids = make(kind), prompt(2, 9)
    options = {"max_new_tokens": 200 if kind == "mamba" else 12, "do_sample": False}
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    alone = model.generate(ids, attention_mask=mask, **options)
    with accelerated(model):
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), alone)
    assert alone.shape == (2, 9 + options["max_new_tokens"]) and len(alone[:, 9:].unique()) > 3
    assert counted["causal_conv1d_update"] > 0
    assert counted["mamba_selective_state_update"] + counted["selective_state_update"] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_those_of_transformers_alone(kind, padded):
    model, ids = make(kind).train(), prompt(2, 17)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    alone = gradients(model, **inputs)
    assert_same_gradients(gradients(accelerate(model), **inputs), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_gradients_recorded(kind):
    """A loop of steps that nobody put under no_grad."""
    model, ids = make(kind), prompt(1, 7)

    def loop():
        out = model(ids[:, :4], use_cache=True)
        cache = cache_of(out)
        logits = [out.logits[:, -1]]
        for t in range(4, 7):
            logits.append(model(ids[:, t : t + 1], use_cache=True, **cache).logits[:, -1])
        return torch.stack(logits)

    alone = loop()
    with accelerated(model):
        assert error(loop(), alone) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("told_by", ["seq_idx", "cu_seq_lens_q", "position_ids"])
def test_packed_sequences_are_as_they_are_alone(kind, told_by, checkpointing):
    model = accelerate(make(kind)).train()
    if checkpointing:  # the backward pass runs the layers again, after the forward is over
        checkpointed(model)
    lengths = (5, 1, 9, 3)
    parts = [prompt(1, n, seed=i) for i, n in enumerate(lengths)]
    features = [{"input_ids": p[0].tolist()} for p in parts]
    packed = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)(features)
    packed["labels"] = packed["input_ids"]
    kept = {"seq_idx": ["seq_idx"], "cu_seq_lens_q": ["cu_seq_lens_q"], "position_ids": []}[told_by]
    # Attention goes by the positions alone; in models without attention they would tell it by themselves.
    names = ["input_ids", *kept, *(["position_ids"] if kind in ("jamba", "zamba") or not kept else [])]
    inputs = {name: packed[name] for name in names}

    def loss(logits, ids):
        return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum") if ids.shape[1] > 1 else 0

    together = model(**inputs, use_cache=False).logits
    one_by_one = [model(input_ids=p, use_cache=False).logits for p in parts]
    assert error(together, torch.cat(one_by_one, 1)) < 1e-5
    parameters = [p for p in model.parameters() if p.requires_grad]
    pieces = together.split(lengths, 1)
    ours = torch.autograd.grad(sum(map(loss, pieces, parts)), parameters, allow_unused=True)
    truth = torch.autograd.grad(sum(map(loss, one_by_one, parts)), parameters, allow_unused=True)
    for a, b in zip(ours, truth, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 1e-4 * b.norm() + 1e-6
    assert integration._running.reset is None


def test_packed_sequences_leak_without_us():
    """So the test above can fail: transformers alone takes positions that start again, and lets sequences mix."""
    model, ids = make("mamba"), prompt(1, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    leaky = model(ids, position_ids=positions, use_cache=False).logits
    assert torch.allclose(leaky, model(ids, use_cache=False).logits)
    with accelerated(model):
        assert error(model(ids, position_ids=positions, use_cache=False).logits, leaky) > 1e-3


@torch.no_grad()
def test_the_backbone_alone_keeps_sequences_apart_too():
    model, ids = accelerate(make("mamba")), prompt(1, 8)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.int32)
    inner = model.backbone(ids, seq_idx=seq_idx).last_hidden_state
    expected = torch.cat([model.backbone(x).last_hidden_state for x in ids.split((3, 5), 1)], 1)
    assert error(inner, expected) < 1e-5
    mixer, x = model.backbone.layers[0].mixer, torch.randn(1, 8, 16)
    expected = torch.cat([mixer(part) for part in x.split((3, 5), 1)], 1)
    assert error(mixer(x, seq_idx=seq_idx), expected) < 1e-5


@torch.no_grad()
def test_one_row_of_positions_for_all_and_a_cache():
    model, ids = accelerate(make("mamba")), prompt(3, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    expected = torch.cat([model(x, use_cache=False).logits for x in ids.split((3, 5), 1)], 1)
    assert error(model(ids, position_ids=positions, use_cache=False).logits, expected) < 1e-5
    seq_idx = (positions == 0).long().cumsum(1).expand(3, -1)
    filled = model(ids[:, :7], seq_idx=seq_idx[:, :7], use_cache=True)
    assert error(model(ids[:, 7:], use_cache=True, **cache_of(filled)).logits, expected[:, 7:]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_a_step_after_packed_sequences_sees_the_last_one_alone(kind, last):
    """One that is shorter than the convolution leaves room in the cache for inputs of the one before."""
    model, ids = accelerate(make(kind)), prompt(1, 9)
    seq_idx = torch.tensor([[0] * (8 - last) + [1] * last])
    filled = model(ids[:, :8], seq_idx=seq_idx, use_cache=True)
    expected = model(ids[:, 8 - last :], use_cache=False).logits[:, -1:]
    assert error(model(ids[:, 8:], use_cache=True, **cache_of(filled)).logits, expected) < 1e-5


def packed_loss(model, ids):
    return model(ids, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]), labels=ids, use_cache=False).loss


def checkpointed(model, **kwargs):
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(*((kwargs,) if kwargs else ()))
    return model.train()


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_after_the_context_is_refused_where_layers_run_again(reentrant):
    model, ids = checkpointed(make("mamba"), use_reentrant=reentrant), prompt(1, 8)
    before = contents(model)
    with accelerated(model):
        packed_loss(model, ids).backward()
        late = packed_loss(model, ids)
    assert contents(model) == before
    with pytest.raises(RuntimeError, match="call backward\\(\\) before, or inside accelerated\\(\\)"):
        late.backward()


def test_threads_that_train_one_model_on_packed_rows():
    model, weight = (
        accelerate(checkpointed(make("mamba"), use_reentrant=False)),
        "backbone.layers.0.mixer.in_proj.weight",
    )
    rows = [prompt(1, 8, seed=i) for i in range(2)]

    def gradient(ids):
        return torch.autograd.grad(packed_loss(model, ids), model.get_parameter(weight))[0]

    expected = [gradient(ids) for ids in rows]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(gradient, rows * 10))
    for ours, truth in zip(found, expected * 10, strict=True):
        torch.testing.assert_close(ours, truth)


def test_replicas_run_on_their_own_weights():
    """DataParallel copies a module's dict, in which our forward is bound to the original."""
    mixer, x = accelerate(make("mamba")).backbone.layers[0].mixer, torch.randn(1, 5, 16)
    replica = mixer._replicate_for_data_parallel()
    for name, parameter in mixer.named_parameters(recurse=False):
        setattr(replica, name, parameter.detach())
    replica.out_proj = torch.nn.Linear(32, 16)
    torch.nn.init.zeros_(replica.out_proj.weight)
    assert (replica(x) == replica.out_proj.bias).all() and not (mixer(x) == replica.out_proj.bias).any()
    restore(replica)
    assert (replica(x) == replica.out_proj.bias).all()


def test_wrong_marks_are_named():
    model = accelerate(make("mamba"))
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected packed sequences in one row, got 2 rows"):
        model(prompt(2, 6), cu_seq_lens_q=torch.tensor([0, 2, 6]))
    with pytest.raises(ValueError, match=r"seq_idx: expected \(2, 6\), got \(2, 5\)"):
        model(prompt(2, 6), seq_idx=torch.zeros(2, 5))
    for bounds in ([0, 4], [2, 6], [0, 5, 3, 6]):
        with pytest.raises(ValueError, match="cu_seqlens: expected"):
            model(prompt(1, 6), cu_seq_lens_q=torch.tensor(bounds))
    with pytest.raises(TypeError, match="cu_seq_lens_q: expected a tensor, got list"):
        model(prompt(1, 6), cu_seq_lens_q=[0, 6])


@torch.no_grad()
def test_a_pickled_model_comes_back_plain():
    model, ids = accelerate(make("mamba")), prompt(1, 6)
    loaded = pickle.loads(pickle.dumps(model))
    assert not any(map(integration._is_accelerated, loaded.modules()))
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 1]])
    expected = model(ids, seq_idx=seq_idx, use_cache=False).logits
    assert error(loaded(ids).logits, model(ids).logits) < 1e-5
    assert error(accelerate(loaded)(ids, seq_idx=seq_idx, use_cache=False).logits, expected) < 1e-5
    restore(loaded)
    assert error(loaded(ids).logits, model(ids).logits) < 1e-5


@torch.no_grad()
def test_marks_of_a_prompt_that_comes_in_pieces():
    """transformers puts the last inputs of the convolution in front of the next piece's."""
    padded, weight = torch.randn(1, 8, 7), torch.randn(8, 4)
    integration._running.reset = torch.tensor([[False, True, False]])
    try:
        y = integration._causal_conv1d_fn(padded, weight, None)
    finally:
        integration._running.reset = None
    alone = [integration._causal_conv1d_fn(part, weight, None) for part in padded.split((5, 2), 2)]
    assert torch.allclose(y, torch.cat(alone, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_no_warning_of_a_slow_path(kind, log, monkeypatch):
    from transformers.utils import logging as transformers_logging

    for training in (False, True):
        model, ids = accelerate(make(kind)).train(training), prompt(1, 5)
        transformers_logging.warning_once.cache_clear()
        log.clear()
        model(ids, labels=ids, use_cache=False)
        if not training:
            model.generate(ids, max_new_tokens=3)
        said = " ".join(record.getMessage() for record in log.records)
        assert "falling back" not in said and "fast path" not in said and "not available" not in said


def test_the_warning_is_there_without_us(log):
    from transformers.utils import logging as transformers_logging

    model = make("mamba")
    transformers_logging.warning_once.cache_clear()
    model(prompt(1, 5))
    assert any("falling back" in r.getMessage() or "fast path" in r.getMessage() for r in log.records)


def contents(model):
    return [{k: v for k, v in m.__dict__.items() if not k.startswith("_forward")} for m in model.modules()]


@pytest.mark.parametrize("kind", KINDS)
def test_undo_leaves_nothing_behind(kind):
    model, other, ids = make(kind), make(kind, seed=5), prompt(1, 6)
    source = sys.modules[type(model).__module__]
    before, globals_before = contents(model), dict(vars(source))
    alone = model(ids).logits
    with accelerated(model) as same:
        assert same is model and contents(model) != before
        assert not any("_fastmem" in m.__dict__ for m in other.modules())  # each model for itself
        with accelerated(model):
            model(ids)
        assert contents(model) != before  # the outer context holds
    assert contents(model) == before
    assert torch.equal(model(ids).logits, alone)
    restore(accelerate(accelerate(model)))
    assert contents(model) == before and vars(source) == globals_before
    with pytest.raises(ZeroDivisionError), accelerated(model):
        raise ZeroDivisionError
    assert contents(model) == before
    restore(model)  # nothing to do


@torch.no_grad()
def test_a_copy_is_a_model_of_its_own():
    model, ids = accelerate(make("mamba")), prompt(1, 6)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.mul_(0.5)
    logits = twin(ids).logits
    assert error(logits, model(ids).logits) > 0.1
    restore(twin)
    assert error(twin(ids).logits, logits) < 1e-4
    assert "_fastmem" in model.__dict__


@torch.no_grad()
def test_hooks_of_accelerate_go_on_working():
    """device_map and offloading put hooks on modules, before us or after us."""
    hooks = pytest.importorskip("accelerate.hooks")
    ids = prompt(1, 6)
    for ours_first in (False, True):
        model = make("mamba")
        alone, seen = model(ids).logits, []

        class Hook(hooks.ModelHook):
            def pre_forward(self, module, *args, seen=seen, **kwargs):
                seen.append(type(module).__name__)
                return args, kwargs

        mixers = [layer.mixer for layer in model.backbone.layers]
        if ours_first:
            accelerate(model)
        for mixer in mixers:
            hooks.add_hook_to_module(mixer, Hook())
        if not ours_first:
            accelerate(model)
        assert error(model(ids).logits, alone) < 1e-4
        assert len(seen) == len(mixers)
        restore(model)
        assert torch.equal(model(ids).logits, alone) and len(seen) == 2 * len(mixers)


def test_what_wraps_us_must_come_off_first():
    model = accelerate(make("mamba"))
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"MambaForCausalLM\.forward was wrapped after accelerate"):
        restore(model)
    model.forward = ours
    restore(model)
    assert "forward" not in model.__dict__


def test_models_without_mamba_layers_are_refused():
    with pytest.raises(ValueError, match="expected one with Mamba, FalconMamba, Jamba or Zamba layers, got Linear"):
        accelerate(torch.nn.Linear(2, 2))


def test_signature_of_forward_stays():
    import inspect

    model = make("mamba")
    before = inspect.signature(model.forward)
    assert inspect.signature(accelerate(model).forward) == before


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "zamba"])  # Jamba's experts have no float64
@torch.no_grad()
def test_float64(kind):
    """transformers keeps some parameters of the scan in float32."""
    model, ids = make(kind).double(), prompt(1, 9)
    alone, tokens = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    accelerate(model)
    assert error(model(ids).logits, alone) < 1e-6
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), tokens)


def test_half_precision():
    model, ids = make("mamba").bfloat16(), prompt(2, 12)
    truth = copy.deepcopy(model).float()(ids).logits
    ours = accelerate(model)(ids).logits.float()
    assert error(ours, truth) < 5e-2
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 16)


def test_torch_compile_sees_one_graph():
    model, ids = accelerate(make("mamba", num_hidden_layers=1)), prompt(1, 6)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 1]])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for more in ({"seq_idx": seq_idx}, {}):
        expected = model(ids, use_cache=False, **more).logits
        assert error(compiled(ids, use_cache=False, **more).logits, expected) < 1e-5


def test_from_the_repository_root_beside_our_kernels_folder():
    code = """
import sys
import fastmem
assert "transformers" not in sys.modules
import torch
from transformers import MambaConfig, MambaForCausalLM
from fastmem.integrations.transformers import accelerate
model = accelerate(MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4)))
print(tuple(model(torch.tensor([[1, 2, 3]])).logits.shape))
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 3, 16)"

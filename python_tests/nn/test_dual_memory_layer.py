"""DualMemoryLayer: both tiers behind one read; who sees what, and where gradients go."""

import functools
import math

import pytest
import torch
from torch.func import functional_call, grad

from fastmem.nn import DualMemoryLayer, MemoryConfig, decaying_buffer, memory_cross_attention, surprise_gated_store

SIZES = {
    "hidden_dim": 12,
    "memory_dim": 6,
    "buffer_slots": 9,
    "store_slots": 5,
    "num_heads": 2,
    "surprise_dim": 4,
    "gate_dim": 4,
}


def make(**changes):
    """A layer in evaluation mode whose reads change x."""
    layer = DualMemoryLayer(MemoryConfig(**(SIZES | changes))).eval()
    with torch.no_grad():
        layer.attention.out_gain.fill_(0.1)
        layer.attention.null_score.zero_()
        layer.attention.log_scale.fill_(1.0)
        layer.store.predictor[2].weight.normal_(std=0.3)
        layer.content_proj.weight.normal_(std=0.1)
    return layer


def flat(state):
    return [x for part in state for x in part]


def assert_states_equal(a, b, **tolerance):
    for x, y in zip(flat(a), flat(b), strict=True):
        torch.testing.assert_close(x, y, **(tolerance or {"rtol": 0, "atol": 0}))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_memory_returns_exactly_x(dtype):
    layer, x = make(), torch.randn(2, 5, 12).to(dtype)
    for update in (False, True):
        y, state = layer(x, layer.empty(2), update=update)
        assert y.dtype == dtype and torch.equal(y, x)
    assert {t.dtype for t in flat(state)} == {torch.float32} and (state.buffer.strength > 0).any()
    assert not torch.equal(layer(x, state, update=False)[0], x)


@torch.no_grad()
def test_what_is_stored_is_the_token_under_the_context_before_it():
    layer, x, values = make(novelty_threshold=1.01), torch.randn(1, 4, 12), torch.randn(1, 4, 12)
    _, state = layer(x, layer.empty(1), values=values)
    n = torch.nn.functional.layer_norm(x, (12,))
    live = state.buffer.strength[0] > 0
    assert live.sum() == 3  # the first token has no context
    torch.testing.assert_close(state.buffer.values[0, live], values[0, 1:])
    keys = torch.nn.functional.normalize(layer.key_proj(n[0, :3]) + values[0, 1:] @ layer.content_proj.weight.T, dim=-1)
    torch.testing.assert_close(state.buffer.keys[0, live], keys)
    previous = torch.randn(1, 12)
    _, state = layer(x, layer.empty(1), values=values, previous=previous)
    assert (state.buffer.strength > 0).sum() == 4
    key = layer.key_proj(torch.nn.functional.layer_norm(previous, (12,))) + layer.content_proj(values[0, :1])
    torch.testing.assert_close(state.buffer.keys[0, :1], torch.nn.functional.normalize(key, dim=-1))
    _, state = layer(x, layer.empty(1))
    torch.testing.assert_close(state.buffer.values[0, :3], n[0, 1:])


@torch.no_grad()
def test_no_token_reads_what_came_after_it():
    layer = make()
    _, state = layer(torch.randn(1, 6, 12), layer.empty(1))
    x = torch.randn(1, 7, 12)
    y, after = layer(x, state)
    for t in range(1, 7):
        changed = x.clone()
        changed[:, t:] = torch.randn(1, 7 - t, 12)
        y_changed, _ = layer(changed, state)
        assert torch.equal(y_changed[:, :t], y[:, :t])
        # And what is written up to t does not depend on it: the call's first tokens alone write the same.
        mask = (torch.arange(7) < t)[None]
        _, first = layer(changed, state, write_mask=mask, read_mask=mask)
        _, same = layer(x, state, write_mask=mask, read_mask=mask)
        assert_states_equal(first, same)
    assert not torch.equal(layer(x, after, update=False)[0], y)


@torch.no_grad()
def test_single_token_calls_write_what_one_call_writes():
    layer = make(decay_rate=1.0, buffer_slots=30, store_slots=30)  # decay comes with each call; eviction with reads
    x, values = torch.randn(2, 11, 12), torch.randn(2, 11, 12)
    start = torch.randn(2, 12)
    _, whole = layer(x, layer.empty(2), values=values, previous=start)
    state, previous = layer.empty(2), start
    for t in range(11):
        _, state = layer(x[:, t : t + 1], state, values=values[:, t : t + 1], previous=previous)
        previous = x[:, t]
    for part in ("buffer", "store"):
        for name in ("keys", "values", "strength"):
            torch.testing.assert_close(getattr(getattr(state, part), name), getattr(getattr(whole, part), name))
    assert_states_equal([state.stats], [whole.stats], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_nan_is_neither_written_nor_spread():
    layer, x, values = make(), torch.randn(1, 8, 12), torch.randn(1, 8, 12)
    _, told = layer(torch.randn(1, 6, 12), layer.empty(1))
    broken = x.clone()
    broken[0, 3, 5] = math.nan
    y, state = layer(broken, told, values=values)
    assert all(t.isfinite().all() for t in flat(state))
    good = torch.tensor([[t != 3 for t in range(8)]])
    assert torch.equal(y[good], layer(x, told, values=values)[0][good])
    context_known = torch.tensor([[t != 4 for t in range(8)]])  # token 4's context is what was broken
    _, expected = layer(x, told, values=values, write_mask=context_known, read_mask=good)
    assert_states_equal(state, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_evaluation_moves_no_statistics_and_training_does():
    layer, x = make(), torch.randn(2, 6, 12)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    _, state = layer(x, layer.empty(2))
    assert state.stats.count.eq(0).all()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer.train()
    _, state = layer(x, layer.empty(2))
    assert state.stats.count.tolist() == [5, 5] and layer.store.count == 5
    _, state = layer(x, state, update=False)
    assert state.stats.count.tolist() == [5, 5]


@torch.no_grad()
def test_memories_of_a_batch_never_meet():
    layer, x, first = make(), torch.randn(3, 6, 12), torch.randn(3, 6, 12)
    _, state = layer(first, layer.empty(3))
    y, state = layer(x, state)
    for row in range(3):
        _, alone = layer(first[row : row + 1], layer.empty(1))
        y_alone, alone = layer(x[row : row + 1], alone)
        torch.testing.assert_close(y[row : row + 1], y_alone)
        for a, b in zip(flat(state), flat(alone), strict=True):
            torch.testing.assert_close(a[row : row + 1], b)
    first[1] = torch.randn(6, 12)
    _, other = layer(first, layer.empty(3))
    y_other, other = layer(x, other)
    for row in (0, 2):
        assert torch.equal(y_other[row], y[row])
        assert all(torch.equal(a[row], b[row]) for a, b in zip(flat(other), flat(state), strict=True))


@torch.no_grad()
def test_masks_say_who_writes_and_who_reads():
    layer, x = make(novelty_threshold=1.01), torch.randn(1, 5, 12)
    _, told = layer(torch.randn(1, 6, 12), layer.empty(1))
    writes = torch.tensor([[True, False, True, False, True]])
    y, state = layer(x, told, write_mask=writes, read_mask=~writes)
    assert torch.equal(y[writes], x[writes]) and not torch.isclose(y, x)[~writes].all(-1).any()
    # Neither the first token (no context) nor masked ones: two new slots, of age 0.
    assert ((state.buffer.strength > 0) & (state.buffer.age == 0)).sum() == 2
    assert state.store.access.sum() <= (~writes).sum() + 1e-4


def test_gradients_reach_everything_that_wrote():
    """The answer is read from memory; keys, values, the surprise predictor and earlier states learn from it."""
    layer = make(buffer_slots=0)  # so that strength is surprise
    x, values = (torch.randn(1, 6, 12, requires_grad=True) for _ in range(2))
    _, state = layer(x, layer.empty(1), values=values)
    question = torch.randn(1, 2, 12)
    y = layer.read(question, layer.view(state))
    y.square().sum().backward()
    for name in ("key_proj.weight", "content_proj.weight", "attention.q_proj.weight", "store.context_proj.weight"):
        assert layer.get_parameter(name).grad.abs().max() > 1e-6, name
    for name, p in layer.store.predictor.named_parameters():
        assert p.grad.abs().max() > 1e-8, name
    assert (x.grad[0, :5].abs().amax(-1) > 0).sum() >= 2 and values.grad.abs().max() > 0
    assert x.grad[0, 5].eq(0).all()  # the last state is nobody's context


def test_gradients_through_several_writes():
    """Blending keeps a path to every token that a slot is made of."""
    layer = make(store_slots=0, buffer_slots=1, write_alpha_novel=0.5, write_alpha_reinforce=0.5)
    values = torch.randn(1, 4, 12, requires_grad=True)
    _, state = layer(torch.randn(1, 4, 12), layer.empty(1), values=values, previous=torch.randn(1, 12))
    state.buffer.values.sum().backward()
    expected = torch.tensor([0.125, 0.125, 0.25, 0.5])[None, :, None].expand(1, 4, 12)
    torch.testing.assert_close(values.grad, expected)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def recall(layer, x, question, values):
    """Two writes (the second into a full memory), decay, and a read."""
    _, state = layer(x[:, :4], layer.empty(1), values=values[:, :4])
    _, state = layer(x[:, 4:], layer.decay(state, 2), values=values[:, 4:])
    return layer.read(question, layer.view(state))


def test_gradcheck_in_float64(double):
    torch.manual_seed(3)
    layer = make(buffer_slots=3, store_slots=2, activation_boost=0.5, write_alpha_reinforce=0.3, write_alpha=0.3)
    x, values = (torch.randn(1, 7, 12, requires_grad=True) for _ in range(2))
    question = torch.randn(1, 2, 12, requires_grad=True)
    assert layer.empty(1).buffer.keys.dtype == torch.float64
    assert torch.autograd.gradcheck(lambda *inputs: recall(layer, *inputs), (x, question, values))
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def of_parameters(*p):
        return functional_call(layer, dict(zip(names, p, strict=True)), (x.detach(), question.detach(), values))

    wrapped = layer.forward
    layer.forward = lambda *inputs: recall_with(layer, wrapped, *inputs)
    assert torch.autograd.gradcheck(of_parameters, parameters, fast_mode=True)


def recall_with(layer, forward, x, question, values):
    """`recall`, from inside of a functional call."""
    _, state = forward(x[:, :4], layer.empty(1), values=values[:, :4])
    _, state = forward(x[:, 4:], layer.decay(state, 2), values=values[:, 4:])
    return layer.read(question, layer.view(state))


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("training", [False, True])
def test_a_maml_step_equals_the_references(double, monkeypatch, top_k, training):
    """The gradient through one inner step on a write and a read: second derivatives."""
    torch.manual_seed(3)
    layer = make(buffer_slots=3, store_slots=3, top_k=top_k, activation_boost=0.5, write_alpha_reinforce=0.3)
    layer.train(training)
    x, values = torch.randn(2, 1, 7, 12), torch.randn(2, 1, 7, 12)
    question, answer = torch.randn(2, 1, 2, 12), torch.randn(2, 1, 2, 12)
    forward = layer.forward
    layer.forward = lambda *inputs: recall_with(layer, forward, *inputs)
    state = dict(layer.named_buffers())

    def loss(parameters, task):
        buffers = {name: x.clone() for name, x in state.items()}
        said = functional_call(layer, (parameters, buffers), (x[task], question[task], values[task]))
        return (said - answer[task]).square().mean()

    def outer(parameters):
        inner = grad(loss)(parameters, 0)
        return loss({k: p - 0.1 * inner[k] for k, p in parameters.items()}, 1)

    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    ours = grad(outer)(parameters)
    gated, attention = decaying_buffer.gated_write, memory_cross_attention.topk_attention
    for module in (decaying_buffer, surprise_gated_store):
        monkeypatch.setattr(module, "gated_write", functools.partial(gated, backend="reference"))
    monkeypatch.setattr(memory_cross_attention, "topk_attention", functools.partial(attention, backend="reference"))
    expected = grad(outer)(parameters)

    def first_order(parameters):
        inner = {k: g.detach() for k, g in grad(loss)(parameters, 0).items()}
        return loss({k: p - 0.1 * inner[k] for k, p in parameters.items()}, 1)

    shortcut = grad(first_order)(parameters)
    for name, x_ in ours.items():
        torch.testing.assert_close(x_, expected[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("key_proj.weight", "attention.q_proj.weight"):
        assert (ours[name] - shortcut[name]).norm() > 1e-4 * ours[name].norm(), name


@torch.no_grad()
def test_calibrated_keys_tell_contexts_apart():
    """States that all point about the same way: after calibration unrelated ones have a cosine near 0."""
    layer = make(memory_dim=6)
    common = 3 * torch.randn(12)
    x = common + torch.randn(400, 12) * torch.linspace(0.2, 2, 12)

    def spread():
        keys = torch.nn.functional.normalize(layer.key_proj(layer.normalise(x[:50])), dim=-1)
        cosines = (keys @ keys.T)[~torch.eye(50, dtype=torch.bool)]
        return cosines.mean().abs().item()

    before = spread()
    layer.calibrate(x)
    assert spread() < 0.05 < before
    torch.testing.assert_close(layer.key_proj.weight, layer.attention.q_proj.weight)
    keys = layer.key_proj(layer.normalise(x))
    torch.testing.assert_close(keys.mean(0), torch.zeros(6), atol=1e-3, rtol=0)
    assert keys.var(0).min() > 0.7 and keys.var(0).max() < 1.1
    torch.testing.assert_close(layer.attention.residual_rms, x.square().mean(-1).sqrt().median())


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"x": torch.zeros(2, 12)}, ValueError, r"x: expected \(B, T, 12\), got \(2, 12\)"),
        ({"x": torch.zeros(2, 3, 11)}, ValueError, r"x: expected \(B, T, 12\), got \(2, 3, 11\)"),
        ({"x": [[[0.0] * 12]]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.zeros(2, 3, 12, dtype=torch.int64)}, TypeError, "x: expected a float dtype, got torch.int64"),
        (
            {"x": torch.zeros(2, 3, 12, dtype=torch.float64)},
            TypeError,
            r"x: expected torch.float32 or a narrower float dtype, as the layer's weights are, got torch.float64",
        ),
        ({"state": (1, 2, 3)}, TypeError, "state: expected a DualMemoryState, got tuple"),
        ({"state": make().empty(3)}, ValueError, r"state.buffer.keys: expected \(2, 9, 6\), got \(3, 9, 6\)"),
        ({"state": make(store_slots=7).empty(2)}, ValueError, r"state.store.keys: expected \(2, 5, 6\), got"),
        ({"values": torch.zeros(2, 4, 12)}, ValueError, r"values: expected \(2, 3, 12\), got \(2, 4, 12\)"),
        ({"values": torch.zeros(2, 3, 12).double()}, TypeError, "values: expected torch.float32 or a narrower"),
        ({"previous": torch.zeros(2, 1, 12)}, ValueError, r"previous: expected \(2, 12\), got \(2, 1, 12\)"),
        ({"write_mask": torch.ones(2, 4).bool()}, ValueError, r"write_mask: expected \(2, 3\), got \(2, 4\)"),
        ({"write_mask": torch.ones(2, 3)}, TypeError, "write_mask: expected torch.bool, got torch.float32"),
        ({"read_mask": torch.ones(3).bool()}, ValueError, r"read_mask: expected \(2, 3\), got \(3,\)"),
    ],
)
def test_wrong_arguments_are_named(change, exception, message):
    layer = make()
    right = {"x": torch.zeros(2, 3, 12), "state": layer.empty(2)}
    layer(**right)
    with pytest.raises(exception, match=f"^{message}"):
        layer(**right | change)


@torch.no_grad()
def test_autocast_reads_and_writes_about_the_same():
    layer, told, x = make(novelty_threshold=1.01), torch.randn(1, 6, 12), torch.randn(1, 3, 12)
    _, state = layer(told, layer.empty(1))
    expected, after = layer(x, state)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = layer(told, layer.empty(1))
        y, cast = layer(x, state)
    assert {t.dtype for t in flat(cast)} == {torch.float32} and y.dtype == torch.float32
    assert (y - expected).norm() < 2e-2 * (expected - x).norm()
    assert (cast.buffer.keys - after.buffer.keys).norm() < 2e-2 * after.buffer.keys.norm()


def test_weights_of_another_dtype_are_named():
    x = torch.randn(1, 3, 12)
    with pytest.raises(TypeError, match=r"^key_proj.weight: expected torch.float32, which memory is computed in, got"):
        make().bfloat16()(x, make().empty(1))
    with pytest.raises(TypeError, match=r"^x: expected torch.float64, as the layer's weights are, got torch.float32"):
        make().double()(x, make().empty(1))

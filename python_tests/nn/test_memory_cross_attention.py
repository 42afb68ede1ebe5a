"""MemoryCrossAttention against its formula, written out."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from fastmem.nn import MemoryConfig, MemoryCrossAttention
from fastmem.nn.decaying_buffer import empty_bank


def make(**changes):
    """An attention whose every parameter matters, two half-full banks of two memories, and x, LN(x)."""
    sizes = {"hidden_dim": 8, "memory_dim": 4, "buffer_slots": 5, "store_slots": 4, "num_heads": 2, "gate_dim": 6}
    config = MemoryConfig(**(sizes | changes))
    attention = MemoryCrossAttention(config)
    with torch.no_grad():
        attention.out_gain.fill_(0.2)
        attention.residual_rms.fill_(1.5)
        attention.log_scale.add_(torch.randn(config.num_heads) * 0.3)
        attention.null_score.copy_(torch.randn(config.num_heads))
        attention.strength_weight.normal_()
        attention.out_proj.weight.normal_(std=0.4)
    banks = []
    for slots in (config.buffer_slots, config.store_slots):
        bank = empty_bank(2, slots, config.memory_dim, config.hidden_dim)
        strength = torch.rand(2, slots) * (torch.arange(slots) % 3 != 1)
        banks.append(
            bank._replace(keys=torch.randn_like(bank.keys), values=torch.randn_like(bank.values), strength=strength)
        )
    x = torch.randn(2, 3, config.hidden_dim)
    return attention, *banks, x, F.layer_norm(x, x.shape[-1:])


def by_hand(attention, buffer, store, x, n):
    """The formula, one memory, token and head at a time."""
    config, out = attention.config, x.clone()
    H = config.num_heads
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            heads = []
            for h in range(H):
                q = attention.q_proj(n[b, t]).chunk(H)[h]
                scores, values = [], []
                for tier, bank in enumerate((buffer, store)):
                    w = math.log1p(math.exp(attention.strength_weight[tier, h].item()))
                    for s in range(bank.strength.shape[1]):
                        a = bank.strength[b, s].item()
                        if a > 0:
                            cosine = F.cosine_similarity(q, bank.keys[b, s].chunk(H)[h], dim=0).item()
                            scale = math.exp(attention.log_scale[h].item()) / config.temperature
                            scores.append(scale * cosine + w * math.log(a))
                            values.append(bank.values[b, s].chunk(H)[h])
                scores.append(attention.null_score[h].item() / config.temperature)
                values.append(torch.zeros_like(values[0]))
                chosen = sorted(range(len(scores)), key=lambda j: -scores[j])[: config.top_k]
                weights = torch.tensor([scores[j] for j in chosen]).softmax(0)
                heads.append(sum(w * values[j] for w, j in zip(weights, chosen, strict=True)))
            m = torch.cat(heads)
            hidden = F.gelu(attention.gate[0](torch.cat([n[b, t], m])))
            gate = torch.sigmoid(attention.gate[2](hidden))
            out[b, t] += gate * 10 * attention.residual_rms * attention.out_gain * attention.out_proj(m)
    return out


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"num_heads": 1}, {"temperature": 2.5}, {"top_k": 2}, {"top_k": 1}, {"top_k": 50}], ids=str
)
def test_the_formula(changes):
    attention, buffer, store, x, n = make(**changes)
    y = attention(x, n, attention.view(buffer, store))
    expected = by_hand(attention, buffer, store, x, n)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert (expected - x).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_memory_returns_exactly_x(dtype):
    attention, buffer, store, x, n = make()
    x = x.to(dtype)
    x[0, 0, :4] = torch.tensor([math.nan, math.inf, -0.0, 1e-40])
    empty = [bank._replace(strength=torch.zeros_like(bank.strength)) for bank in (buffer, store)]
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    y = attention(x, n, attention.view(*empty))
    assert y.dtype == dtype and torch.equal(y.view(bits), x.view(bits))
    # One memory of the batch empty, the other not.
    half = [bank._replace(strength=bank.strength * torch.tensor([[0.0], [1.0]])) for bank in (buffer, store)]
    y = attention(x, n, attention.view(*half))
    assert torch.equal(y[0].view(bits), x[0].view(bits)) and not torch.equal(y[1], x[1])


@torch.no_grad()
def test_a_token_that_does_not_read_returns_exactly_x():
    attention, buffer, store, x, n = make()
    mask = torch.tensor([[True, False, True], [False, False, True]])
    view = attention.view(buffer, store)
    y, everywhere = attention(x, n, view, mask), attention(x, n, view)
    assert torch.equal(y[~mask], x[~mask]) and torch.equal(y[mask], everywhere[mask])
    assert not torch.equal(everywhere[~mask], x[~mask])


@torch.no_grad()
def test_at_the_start_nothing_changes():
    attention, buffer, store, x, n = make()
    attention.out_gain.zero_()  # as the constructor leaves it
    assert MemoryCrossAttention(attention.config).out_gain == 0
    assert torch.equal(attention(x, n, attention.view(buffer, store)), x)


@torch.no_grad()
def test_what_an_empty_slot_holds_is_never_seen():
    attention, buffer, store, x, n = make()
    expected = attention(x, n, attention.view(buffer, store))
    for bad in (math.nan, 1e30):
        dirty = [
            bank._replace(
                keys=torch.where(bank.strength[..., None] > 0, bank.keys, bad),
                values=torch.where(bank.strength[..., None] > 0, bank.values, bad),
            )
            for bank in (buffer, store)
        ]
        assert torch.equal(attention(x, n, attention.view(*dirty)), expected)


@torch.no_grad()
def test_what_has_decayed_weighs_less():
    attention, buffer, store, _, n = make()
    mass = []
    for share in (1.0, 0.5, 0.1, 0.0):
        weaker = buffer.strength.clone()
        weaker[:, 0] *= share
        view = attention.view(buffer._replace(strength=weaker), store)
        mass.append(attention.attention_mass(n, view)[:, 0])
    for stronger, weaker in itertools.pairwise(mass):
        assert (stronger > weaker).all()
    assert mass[-1].eq(0).all()


@torch.no_grad()
def test_attention_mass_counts_the_tokens_that_read():
    attention, buffer, store, _, n = make()
    with_null = attention.attention_mass(n, attention.view(buffer, store))
    attention.null_score.fill_(-1e4)  # no slot for what matches nothing: all attention falls on the memory
    view = attention.view(buffer, store)
    mass = attention.attention_mass(n, view)
    torch.testing.assert_close(mass.sum(1), torch.full((2,), 3.0))
    assert (with_null.sum(1) < 3).all() and mass[:, :5][buffer.strength == 0].eq(0).all()
    one = attention.attention_mass(n, view, torch.tensor([[False, True, False], [False, False, False]]))
    torch.testing.assert_close(one.sum(1), torch.tensor([1.0, 0.0]))


def test_gradients_of_every_parameter():
    attention, buffer, store, x, n = make()
    attention(x, n, attention.view(buffer, store)).square().sum().backward()
    for name, p in attention.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        ({"x": torch.zeros(3, 8)}, ValueError, r"x: expected \(B, T, 8\), got \(3, 8\)"),
        ({"x": torch.zeros(2, 3, 9)}, ValueError, r"x: expected \(B, T, 8\), got \(2, 3, 9\)"),
        ({"x": torch.zeros(2, 3, 8).long()}, TypeError, "x: expected a float dtype, got torch.int64"),
        ({"n": torch.zeros(2, 4, 8)}, ValueError, r"n: expected \(2, 3, 8\), got \(2, 4, 8\)"),
        ({"n": torch.zeros(2, 3, 8).bfloat16()}, TypeError, "n: expected torch.float32 like the module's weights, got"),
        ({"view": "banks"}, TypeError, "view: expected a MemoryView, got str"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask: expected torch.bool, got torch.float32"),
        ({"mask": torch.ones(2, 1).bool()}, ValueError, r"mask: expected \(2, 3\), got \(2, 1\)"),
    ],
)
def test_wrong_arguments_are_named(change, exception, message):
    attention, buffer, store, x, n = make()
    right = {"x": x, "n": n, "view": attention.view(buffer, store)}
    attention(**right)
    with pytest.raises(exception, match=f"^{message}"):
        attention(**right | change)


@torch.no_grad()
def test_a_view_of_another_size_is_named_and_one_memory_serves_all_rows():
    attention, buffer, store, x, n = make()
    view, wide = attention.view(buffer, store), torch.cat([x, x, x])
    with pytest.raises(ValueError, match=r"^view: expected 6 memories, one for each row of x, or 1, got 2"):
        attention(wide, torch.cat([n, n, n]), view)
    other, *banks, _, _ = make(memory_dim=6)
    with pytest.raises(ValueError, match=r"^view.keys: expected \(B, 2, S, 2\), got \(2, 2, 10, 3\)"):
        attention(x, n, other.view(*banks))
    one = attention.view(*(type(bank)(*(part[:1] for part in bank)) for bank in (buffer, store)))
    torch.testing.assert_close(attention(x, n, one)[0], attention(x, n, view)[0])

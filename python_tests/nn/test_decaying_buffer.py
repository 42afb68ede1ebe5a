"""DecayingBuffer against a plain loop over tokens, written from its definition."""

import math

import pytest
import torch
from torch import Tensor

from fastmem.nn import DecayingBuffer, MemoryConfig, SurpriseGatedStore

# The rates of the usual blending rule; the package's defaults replace instead.
BLENDING = MemoryConfig(
    hidden_dim=6,
    memory_dim=4,
    buffer_slots=5,
    novelty_threshold=0.5,
    write_alpha_novel=0.3,
    write_alpha_reinforce=0.1,
    activation_boost=0.5,
    decay_rate=0.95,
)
REPLACING = MemoryConfig(hidden_dim=6, memory_dim=4, buffer_slots=5)


def tokens(T, seed=0, repeat=True):
    """keys (1, T, 4) and values (1, T, 6); every third key resembles an earlier one."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, T, 4, generator=g, dtype=torch.float64)
    for t in range(2, T, 3) if repeat else ():
        keys[:, t] = 2 * keys[:, t // 2] + 0.2 * keys[:, t]
    return keys.float(), torch.randn(1, T, 6, generator=g)


def expected(config, keys, values, activation=None, K=None, V=None):
    """The definition, one memory, one token after the other, in lists."""
    S = config.buffer_slots
    a = [0.0] * S if activation is None else list(activation)
    K = [None] * S if K is None else list(K)
    V = [None] * S if V is None else list(V)
    slots = []
    for k, v in zip(keys[0], values[0], strict=True):
        live = [s for s in range(S) if a[s] >= 0.01]
        cosines = {s: torch.cosine_similarity(k, K[s], dim=0).item() for s in live}
        best = max(live, key=lambda s: (cosines[s], -s), default=None)
        if best is not None and cosines[best] >= config.novelty_threshold:
            slot, alpha = best, config.write_alpha_reinforce
        elif len(live) < S:
            slot, alpha = next(s for s in range(S) if s not in live), 1.0
            a[slot] = 0.0
        else:
            slot, alpha = min(live, key=lambda s: (a[s], s)), config.write_alpha_novel
        K[slot] = k if alpha == 1 else (1 - alpha) * K[slot] + alpha * k
        V[slot] = v if alpha == 1 else (1 - alpha) * V[slot] + alpha * v
        a[slot] = min(1.0, a[slot] + config.activation_boost)
        slots.append(slot)
    return K, V, a, slots


def check(bank, K, V, a, tolerance=1e-5):
    assert bank.strength[0].tolist() == pytest.approx(a, abs=tolerance)
    for s, strength in enumerate(a):
        if strength >= 0.01:
            torch.testing.assert_close(bank.keys[0, s], K[s], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(bank.values[0, s], V[s], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("config", [BLENDING, REPLACING], ids=["blending", "replacing"])
@pytest.mark.parametrize("seed", range(4))
def test_writes_follow_the_definition(config, seed):
    buffer, (keys, values) = DecayingBuffer(config), tokens(17, seed)
    bank, written = buffer.write(buffer.empty(1), keys, values)
    K, V, a, slots = expected(config, keys, values)
    assert written.slot[0].tolist() == slots
    check(bank, K, V, a)
    # And on: after some cycles, onto what is there.
    decayed = buffer.decay(bank, 7)
    keys, values = tokens(9, seed + 100)
    bank, written = buffer.write(decayed, keys, values)
    K, V, a, slots = expected(config, keys, values, decayed.strength[0].tolist(), decayed.keys[0], decayed.values[0])
    assert written.slot[0].tolist() == slots
    check(bank, K, V, a)


def test_each_kind_of_write():
    """New, new, like the first (reinforced), and, when full, over the weakest."""
    buffer = DecayingBuffer(MemoryConfig(**{**BLENDING.__dict__, "buffer_slots": 2}))
    e = torch.eye(4)
    keys, values = (
        torch.stack([e[0], e[1], e[0] + 0.1 * e[2], e[3]])[None],
        torch.arange(4.0)[None, :, None].expand(1, 4, 6),
    )
    bank, written = buffer.write(buffer.empty(1), keys, values)
    assert written.slot.tolist() == [[0, 1, 0, 1]]
    torch.testing.assert_close(written.blend, torch.tensor([[1.0, 1.0, 0.1, 0.3]]))
    torch.testing.assert_close(bank.strength, torch.tensor([[1.0, 1.0]]))  # 0.5 + 0.5 each
    torch.testing.assert_close(bank.values[0, :, 0], torch.tensor([0.9 * 0 + 0.1 * 2, 0.7 * 1 + 0.3 * 3]))
    torch.testing.assert_close(bank.keys[0, 1], 0.7 * e[1] + 0.3 * e[3])


def test_decay():
    buffer, (keys, values) = DecayingBuffer(BLENDING), tokens(3, repeat=False)
    bank, _ = buffer.write(buffer.empty(1), keys, values)
    for cycles in (0, 1, 10):
        faded = buffer.decay(bank, cycles)
        torch.testing.assert_close(faded.strength, bank.strength * 0.95**cycles)
        assert torch.equal(faded.age, bank.age + cycles)
        assert torch.equal(faded.keys, bank.keys)
    one_by_one = bank
    for _ in range(10):
        one_by_one = buffer.decay(one_by_one)
    torch.testing.assert_close(one_by_one.strength, buffer.decay(bank, 10).strength)


def test_below_a_hundredth_a_slot_is_empty_and_is_overwritten():
    buffer, (keys, values) = DecayingBuffer(BLENDING), tokens(1)
    bank, _ = buffer.write(buffer.empty(1), keys, values)  # activation 0.5
    last = math.floor(math.log(0.01 / 0.5) / math.log(0.95))  # the last cycle in which it lives
    assert buffer.decay(bank, last).strength[0, 0] >= 0.01
    dead = buffer.decay(bank, last + 1)
    assert dead.strength.eq(0).all()
    again, written = buffer.write(dead, keys, values + 1)
    assert written.blend.tolist() == [[1.0]]  # the same key: a live slot would have been blended with 0.1
    assert torch.equal(again.values[0, 0], values[0, 0] + 1) and again.strength[0, 0] == 0.5


def test_each_memory_decays_by_its_own_cycles():
    buffer, (keys, values) = DecayingBuffer(BLENDING), tokens(4, repeat=False)
    bank, _ = buffer.write(buffer.empty(3), keys.expand(3, -1, -1), values.expand(3, -1, -1))
    faded = buffer.decay(bank, torch.tensor([[0], [3], [200]]))
    torch.testing.assert_close(faded.strength[1], bank.strength[1] * 0.95**3)
    assert torch.equal(faded.strength[0], bank.strength[0]) and faded.strength[2].eq(0).all()


@pytest.mark.parametrize("cycles", [-1, torch.tensor([[0], [3], [-2]]), torch.tensor(-1.5)])
def test_time_does_not_run_backwards(cycles):
    buffer, store = DecayingBuffer(BLENDING), SurpriseGatedStore(BLENDING)
    for bank, let_pass in ((buffer.empty(3), buffer.decay), (store.empty(3)[0], store.age)):
        with pytest.raises(ValueError, match="cycles: expected at least 0, got -"):
            let_pass(bank, cycles)
    assert torch.equal(buffer.decay(buffer.empty(0), torch.zeros(0, 1)).strength, torch.zeros(0, 5))


def test_each_memorys_cycles_compile():
    buffer, (keys, values) = DecayingBuffer(BLENDING), tokens(4, repeat=False)
    bank, _ = buffer.write(buffer.empty(2), keys.expand(2, -1, -1), values.expand(2, -1, -1))
    cycles = torch.tensor([[1], [3]])
    compiled = torch.compile(buffer.decay, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(bank, cycles).strength, buffer.decay(bank, cycles).strength)


def test_what_is_weak_goes_first():
    buffer = DecayingBuffer(BLENDING)
    keys, values = torch.eye(4)[None], torch.randn(1, 4, 6)
    bank = buffer.empty(1)
    for t in (0, 1, 2, 3, 0, 1, 3):  # 2 was said once, long ago
        bank, _ = buffer.write(buffer.decay(bank), keys[:, t : t + 1], values[:, t : t + 1])
    other = -torch.ones(1, 1, 4)
    bank, first = buffer.write(bank, other, values[:, :1])
    _, second = buffer.write(bank, torch.tensor([[[0.5, 0.5, -1, 0.4]]]), values[:, :1])
    assert (first.slot.item(), second.slot.item()) == (4, 2)


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_written(where, bad):
    buffer, (keys, values) = DecayingBuffer(BLENDING), tokens(6)
    broken: Tensor = (keys if where == "key" else values).clone()
    broken[0, 3, 1] = bad
    bank, written = buffer.write(buffer.empty(1), *((broken, values) if where == "key" else (keys, broken)))
    mask = torch.arange(6)[None] != 3
    expected_bank, _ = buffer.write(buffer.empty(1), keys, values, mask)
    assert written.slot[0, 3] == -1
    for x, y in zip(bank, expected_bank, strict=True):
        assert torch.equal(x, y) and x.isfinite().all()


def test_memories_of_a_batch_are_independent():
    buffer = DecayingBuffer(BLENDING)
    pairs = [tokens(9, seed) for seed in range(3)]
    keys, values = (torch.cat(x) for x in zip(*pairs, strict=True))
    bank, _ = buffer.write(buffer.empty(3), keys, values)
    for row, (k, v) in enumerate(pairs):
        alone, _ = buffer.write(buffer.empty(1), k, v)
        for x, y in zip(bank, alone, strict=True):
            torch.testing.assert_close(x[row : row + 1], y)


def test_no_slots():
    buffer = DecayingBuffer(MemoryConfig(hidden_dim=6, memory_dim=4, buffer_slots=0))
    bank, written = buffer.write(buffer.decay(buffer.empty(1)), *tokens(3))
    assert bank.keys.shape == (1, 0, 4) and written.slot.tolist() == [[-1, -1, -1]]

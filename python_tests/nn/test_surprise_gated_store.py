"""SurpriseGatedStore against a plain loop over tokens, and its statistics in every situation."""

import math

import pytest
import torch

from fastmem.nn import MemoryConfig, SurpriseGatedStore
from fastmem.ops.gated_write import SurpriseStats

CONFIG = MemoryConfig(
    hidden_dim=6,
    memory_dim=4,
    store_slots=4,
    surprise_dim=5,
    write_alpha=0.3,
    consolidation_similarity_threshold=0.8,
    z_score_threshold=1.0,
    ema_alpha=0.1,
    capacity_pressure=0.5,
)


@pytest.fixture
def store():
    made = SurpriseGatedStore(CONFIG)
    with torch.no_grad():
        made.predictor[2].weight.normal_()
    return made


def tokens(T, seed=0):
    """keys (1, T, 4), values (1, T, 6), surprise (1, T); every third key resembles an earlier one."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, T, 4, generator=g)
    for t in range(2, T, 3):
        keys[:, t] = 2 * keys[:, t // 2] + 0.2 * keys[:, t]
    surprise = torch.rand(1, T, generator=g) * 3
    return keys, torch.randn(1, T, 6, generator=g), surprise


def expected(keys, values, surprise, access=(0.0,) * 4):
    """The definition, one memory that starts empty, in plain numbers."""
    S, slots = 4, []
    K, V, strength, reads = [None] * S, [None] * S, [0.0] * S, list(access)
    mean = var = count = 0.0
    for k, v, s_pred in zip(keys[0], values[0], surprise[0].tolist(), strict=True):
        live = [s for s in range(S) if strength[s] > 0]
        cosines = {s: torch.cosine_similarity(k, K[s], dim=0).item() for s in live}
        best = max(live, key=lambda s: (cosines[s], -s), default=None)
        similar = best is not None and cosines[best] > 0.3
        s = max(s_pred, 2 * (1 - cosines[best]) if similar else 0.0)
        threshold = (mean + 1.0 * math.sqrt(var)) * (1 + 0.5 * len(live) / S) if count else 0.0
        if count:
            d = s - mean
            mean, var = mean + 0.1 * d, 0.9 * (var + 0.1 * d * d)
        else:
            mean = s
        count += 1
        if not s > threshold:
            slots.append(-1)
            continue
        if best is not None and cosines[best] > 0.8:
            slot, alpha, strength_new = best, 0.3, max(strength[best], s)
        elif len(live) < S:
            slot, alpha, strength_new = next(j for j in range(S) if j not in live), 1.0, s
            reads[slot] = 0.0
        else:
            slot = min(live, key=lambda j: 0.5 * strength[j] + 0.3 * math.log1p(reads[j]))
            alpha, strength_new, reads[slot] = 1.0, s, 0.0
        K[slot] = k if alpha == 1 else 0.7 * K[slot] + 0.3 * k
        V[slot] = v if alpha == 1 else 0.7 * V[slot] + 0.3 * v
        strength[slot] = strength_new
        slots.append(slot)
    return K, V, strength, slots, (mean, var, count)


@pytest.mark.parametrize("seed", range(6))
def test_writes_follow_the_definition(store, seed):
    keys, values, surprise = tokens(30, seed)
    bank, stats, written = store.write(*store.empty(1), keys, values, surprise)
    K, V, strength, slots, numbers = expected(keys, values, surprise)
    assert written.slot[0].tolist() == slots
    assert -1 in slots and len({s for s in slots if s >= 0}) > 1
    assert bank.strength[0].tolist() == pytest.approx(strength, rel=1e-4)
    for s in range(4):
        if strength[s] > 0:
            torch.testing.assert_close(bank.keys[0, s], K[s], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(bank.values[0, s], V[s], rtol=1e-4, atol=1e-5)
    assert [x.item() for x in stats] == pytest.approx(numbers, rel=1e-4)


def test_surprise_is_the_error_of_the_prediction(store):
    context, content = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    hidden = torch.nn.functional.gelu(
        (context @ store.context_proj.weight.T) @ store.predictor[0].weight.T + store.predictor[0].bias
    )
    predicted = hidden @ store.predictor[2].weight.T + store.predictor[2].bias
    by_hand = ((content - predicted) ** 2).mean(-1).sqrt()
    torch.testing.assert_close(store.surprise(context, content), by_hand)
    assert store.surprise(context, predicted).detach().max() < 1e-3
    store.surprise(context, predicted.detach()).sum().backward()  # at the minimum of a root: still finite
    assert store.context_proj.weight.grad.isfinite().all()


def test_eviction_takes_what_neither_surprised_nor_was_read(store):
    e = torch.eye(4)
    bank, stats = store.empty(1)
    for k, surprise in zip(e, (5.0, 1.0, 2.0, 4.0), strict=True):
        stats = SurpriseStats(*(x * 0 for x in stats))  # the first token is always written
        bank, stats, written = store.write(bank, stats, k[None, None], torch.ones(1, 1, 6), torch.tensor([[surprise]]))
    assert written.slot.item() == 3 and bank.strength[0].tolist() == [5, 1, 2, 4]
    other = (torch.tensor([[[-1.0, -1, -1, -1]]]), torch.zeros(1, 1, 6), torch.tensor([[9.0]]))

    def evicted(bank):
        return store.write(bank, SurpriseStats(*(x * 0 for x in stats)), *other)[2].slot.item()

    assert evicted(bank) == 1
    read = store.count_reads(bank, torch.tensor([[0.0, 10.0, 0.0, 0.0]]))  # 0.5 + 0.3 ln 11 = 1.22 > 1
    assert evicted(read) == 2
    # 0.5 * 5 - 0.001 * 3000 is less than any other: old memories go first in the end
    old = read._replace(age=torch.tensor([[3000.0, 0.0, 0.0, 0.0]]))
    assert evicted(old) == 0
    assert evicted(store.age(old, 50)) == 0 and store.age(old, 50).age.tolist() == [[3050, 50, 50, 50]]


def test_the_first_token_is_written_and_starts_the_statistics(store):
    keys, values, surprise = tokens(1)
    bank, stats, written = store.write(*store.empty(1), keys, values, surprise)
    assert written.slot.item() == 0 and written.threshold.item() == 0
    assert (stats.mean.item(), stats.var.item(), stats.count.item()) == (surprise.item(), 0, 1)
    assert bank.strength[0, 0] == surprise[0, 0]


@pytest.mark.parametrize("pieces", [[1] * 20, [7, 1, 0, 12]])
def test_calls_of_any_length_equal_one_long_call(store, pieces):
    data = tokens(20)
    whole = store.write(*store.empty(1), *data)
    store.mean.zero_(), store.var.zero_(), store.count.zero_()
    bank, stats = store.empty(1)
    slots = []
    for part in zip(*(x.split(pieces, 1) for x in data), strict=True):
        bank, stats, written = store.write(bank, stats, *part)
        slots += written.slot[0].tolist()
    assert slots == whole[2].slot[0].tolist()
    for x, y in zip((*bank, *stats), (*whole[0], *whole[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
        assert x.isfinite().all()


def test_after_clear_everything_is_as_at_first(store):
    store.eval()
    first = store.write(*store.empty(1), *tokens(20))
    store.write(*store.empty(1), *tokens(20, seed=1))
    again = store.write(*store.empty(1), *tokens(20))
    for x, y in zip((*first[0], *first[1], *first[2]), (*again[0], *again[1], *again[2]), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("which", ["key", "value", "surprise"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_changes_nothing(store, which, bad):
    data = list(tokens(8))
    position = ["key", "value", "surprise"].index(which)
    broken = [x.clone() for x in data]
    broken[position].view(1, 8, -1)[0, 0, 0] = broken[position].view(1, 8, -1)[0, 5, 0] = bad  # the first token as well
    bank, stats, written = store.write(*store.empty(1), *broken)
    store.mean.zero_(), store.var.zero_(), store.count.zero_()
    mask = torch.tensor([[t not in (0, 5) for t in range(8)]])
    without = store.write(*store.empty(1), *data, mask)
    assert written.slot[0, 0] == written.slot[0, 5] == -1 and stats.count.item() == 6
    for x, y in zip((*bank, *stats), (*without[0], *without[1]), strict=True):
        assert torch.equal(x, y) and x.isfinite().all()


def test_evaluation_moves_no_statistics(store):
    _, stats, _ = store.write(*store.empty(2), *(x.expand(2, *x.shape[1:]) for x in tokens(9)))
    assert stats.count.tolist() == [9, 9]
    torch.testing.assert_close(torch.stack([store.mean, store.var, store.count]), torch.stack(stats).mean(1))
    store.eval()
    before = {k: v.clone() for k, v in store.state_dict().items()}
    bank, start = store.empty(1)
    assert [x.item() for x in start] == [
        store.mean.item(),
        store.var.item(),
        9,
    ]  # a new memory begins where training ended
    new_bank, end, written = store.write(bank, start, *tokens(9, seed=1))
    for x, y in zip(start, end, strict=True):
        assert torch.equal(x, y)
    for name, x in store.state_dict().items():
        assert torch.equal(x, before[name]), name
    assert (written.slot >= 0).any() and (new_bank.strength > 0).any()


def test_a_full_store_asks_for_more(store):
    """threshold = (mean + z * deviation) * (1 + pressure * utilisation)."""
    stats = SurpriseStats(torch.tensor([1.0]), torch.tensor([0.25]), torch.tensor([5.0]))
    bank, _ = store.empty(1)
    e = torch.eye(4)
    for live in range(5):
        some = bank._replace(keys=e[None], strength=(torch.arange(4) < live).float()[None], values=torch.zeros(1, 4, 6))
        threshold = 1.5 * (1 + 0.5 * live / 4)
        for surprise, taken in ((threshold - 0.01, False), (threshold + 0.01, True)):
            token = (-torch.ones(1, 1, 4), torch.zeros(1, 1, 6), torch.tensor([[surprise]]))
            _, _, written = store.write(some, stats, *token)
            assert written.threshold.item() == pytest.approx(threshold)
            assert (written.slot.item() >= 0) == taken

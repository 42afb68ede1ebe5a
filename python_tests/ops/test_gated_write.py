"""gated_write on the CPU against its float64 reference, and what the rule promises, spelled out."""

import os
import subprocess
import sys

import pytest
import torch
from gated_write_data import BUFFER, SETTINGS, STORE, assert_same, double, flat, make, write

import fastmem
from fastmem.ops.gated_write import Bank, SurpriseStats, gated_write

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
SIZES = [  # B, S, T, E, F
    (1, 1, 1, 1, 1),
    (2, 5, 17, 8, 6),
    (3, 63, 150, 33, 100),
    (2, 100, 63, 257, 3),
    (1, 257, 100, 63, 1),
    (2, 3, 200, 3, 63),
    (5, 17, 9, 16, 16),
    (1, 40, 8, 100, 8),
]


def empty_bank(B, S, E, F, fill=0.0):
    zeros = torch.zeros(B, S)
    return Bank(torch.full((B, S, E), fill), torch.full((B, S, F), fill), zeros, zeros.clone(), zeros.clone())


def fresh(B):
    return SurpriseStats(*(torch.zeros(B) for _ in range(3)))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(size, torch.float32) for size in SIZES] + [(size, torch.float64) for size in SIZES if size[2] < 100],
)
def test_matches_the_float64_reference(size, setting, dtype):
    data = make(*size, dtype)
    assert_same(write(setting, data), write(setting, double(data), backend="reference"), TOLERANCE[dtype])


@pytest.mark.parametrize("T", [63, 64, 65, 72, 128, 257])
def test_chunk_boundaries(T):
    data = make(2, 20, T, 12, 5, torch.float64)
    assert_same(write("gated buffer", data), write("gated buffer", data, backend="reference"), 1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("lengths", [(1,) * 40, (3, 9, 8, 20)])
def test_call_by_call_equals_one_long_call(setting, lengths):
    bank, keys, values, surprise, stats = make(2, 9, 40, 24, 7)
    whole = write(setting, (bank, keys, values, surprise, stats))
    slots = []
    for k, v, s in zip(*(x.split(lengths, 1) for x in (keys, values, surprise)), strict=True):
        bank, new_stats, written = write(setting, (bank, k, v, s, stats))
        stats = new_stats or stats
        slots.append(written.slot)
    torch.testing.assert_close(torch.cat(slots, 1), whole[2].slot, rtol=0, atol=0)
    torch.testing.assert_close(tuple(bank), tuple(whole[0]), rtol=1e-6, atol=1e-6)
    if whole[1] is not None:
        torch.testing.assert_close(tuple(stats), tuple(whole[1]), rtol=1e-5, atol=1e-6)


def test_both_settings_take_every_branch():
    """The data above would prove little if it only ever matched, or only ever evicted."""
    for setting in SETTINGS:
        written = write(setting, make(3, 63, 257, 33, 100))[2]
        numbers = SETTINGS[setting][0]
        alphas = {numbers.get("alpha_match", 0.1), numbers.get("alpha_evict", 0.3), 1.0}
        if SETTINGS[setting][1]:
            alphas.add(0.0)  # not written
        torch.testing.assert_close(written.blend.unique(), torch.tensor(sorted(alphas)))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_tokens_that_are_not_finite_or_masked_leave_no_trace(setting, bad, backend):
    bank, keys, values, surprise, stats = make(2, 6, 21, 9, 5)
    clean = [x.clone() for x in (keys, values, surprise)]
    mask, keep = torch.ones(2, 21, dtype=torch.bool), torch.ones(21, dtype=torch.bool)
    keys[:, 2, 8], values[0, 5, 0], values[1, 5, 4], mask[:, 9], keys[:, 20, 0] = bad, bad, bad, False, bad
    keep[[2, 5, 9, 20]] = False
    if SETTINGS[setting][1]:
        surprise[:, 13], keep[13] = bad, False
    new_bank, new_stats, written = write(setting, (bank, keys, values, surprise, stats), mask=mask, backend=backend)
    expected = write(setting, (bank, *(x[:, keep] for x in clean), stats), backend=backend)
    torch.testing.assert_close(tuple(new_bank), tuple(expected[0]))
    assert (new_stats is None) == (expected[1] is None)
    if new_stats is not None:
        torch.testing.assert_close(tuple(new_stats), tuple(expected[1]))
    torch.testing.assert_close(written.slot[:, keep], expected[2].slot)
    assert (written.slot[:, ~keep] == -1).all()
    for x in written[1:]:
        assert (x[:, ~keep] == 0).all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_statistics_from_the_first_token_on(backend):
    bank, keys = empty_bank(1, 4, 4, 1), torch.eye(4)[None]
    surprise = torch.tensor([[0.5, 0.1, 2.0, 0.3]])
    numbers = STORE | {"backend": backend}
    _, stats, written = gated_write(bank, keys, torch.ones(1, 4, 1), surprise, fresh(1), **numbers)
    # 0.5 > 0. Then mean 0.5, var 0, a quarter full: theta = 0.5 * 1.125. Then 0.1 enters: d = -0.4.
    mean, var = 0.5 - 0.04, 0.9 * (0.1 * 0.16)
    theta = (mean + var**0.5) * 1.125
    torch.testing.assert_close(written.threshold[0, :3], torch.tensor([0, 0.5625, theta]))
    assert written.slot.tolist() == [[0, -1, 1, -1]]
    for s in (2.0, 0.3):
        d = s - mean
        mean, var = mean + 0.1 * d, 0.9 * (var + 0.1 * d * d)
    torch.testing.assert_close(torch.cat(stats), torch.tensor([mean, var, 4.0]))

    frozen = gated_write(bank, keys, torch.ones(1, 4, 1), surprise, fresh(1), update_stats=False, **numbers)
    assert torch.cat(frozen[1]).tolist() == [0, 0, 0] and frozen[2].slot.tolist() == [[0, 1, 2, 3]]
    given = gated_write(bank, keys, torch.ones(1, 4, 1), surprise, None, **numbers)
    torch.testing.assert_close(tuple(given[1]), tuple(stats))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_conflict_with_what_is_stored_is_a_surprise(backend):
    bank = empty_bank(1, 2, 2, 1)
    keys = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.2, -(0.96**0.5)]]])
    _, _, written = gated_write(bank, keys, torch.ones(1, 3, 1), torch.full((1, 3), 0.01), backend=backend, **STORE)
    torch.testing.assert_close(written.surprise, torch.tensor([[0.01, 0.8, 0.01]]))  # 2 * (1 - 0.6); 0.2 <= the floor


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_what_dead_slots_hold_never_shows(backend):
    garbage = empty_bank(2, 5, 6, 3, fill=float("nan"))
    clean = empty_bank(2, 5, 6, 3)
    _, keys, values, _, _ = make(2, 5, 4, 6, 3)
    new, _, written = gated_write(garbage, keys, values, backend=backend, match_threshold=2)
    expected, _, _ = gated_write(clean, keys, values, backend=backend, match_threshold=2)
    assert written.slot.tolist() == [[0, 1, 2, 3]] * 2
    for x, y in zip(new, expected, strict=True):
        torch.testing.assert_close(x[:, :4], y[:, :4], rtol=0, atol=0)
    assert new.keys[:, 4].isnan().all() and (new.strength[:, 4] == 0).all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_live_slot_that_is_not_finite_matches_nothing_and_can_be_evicted(backend):
    bank = empty_bank(1, 2, 3, 1)
    bank.keys[0, 0], bank.keys[0, 1, 0] = float("nan"), 1.0
    bank.strength[:] = torch.tensor([0.2, 0.9])
    keys = torch.tensor([[[1.0, 0.1, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.1]]])
    new, _, written = gated_write(bank, keys, torch.ones(1, 3, 1), alpha_evict=1.0, boost=0.1, backend=backend)
    assert written.slot.tolist() == [[1, 0, 0]] and new.keys.isfinite().all()


@pytest.mark.parametrize("T", [5, 200])
def test_equal_tokens_share_a_slot(T):
    key = torch.randn(1, 1, 37)
    new, _, written = gated_write(empty_bank(1, 9, 37, 1), key.expand(1, T, 37), torch.ones(1, T, 1))
    assert (written.slot == 0).all() and written.blend[0, 0] == 1 and (new.strength[0] > 0).sum() == 1
    torch.testing.assert_close(new.keys[:, :1], key)


@pytest.mark.parametrize("T", [4, 20])
def test_equal_slots_go_to_the_lowest(T):
    bank = empty_bank(1, 70, 37, 1)
    bank.keys[:], bank.strength[:] = torch.randn(37), 0.5
    keys = bank.keys[:, :1] + 0.01 * torch.randn(1, T, 37)
    assert gated_write(bank, keys, torch.ones(1, T, 1), alpha_match=0.0)[2].slot.eq(0).all()
    apart = gated_write(bank, keys, torch.ones(1, T, 1), match_threshold=2, boost=0.25)[2].slot
    assert apart[0].tolist() == [t % 70 for t in range(T)]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_zero_keys_have_cosine_zero(backend):
    bank = empty_bank(1, 3, 4, 1)
    bank.strength[0, 1], bank.keys[0, 1] = 0.4, torch.tensor([1.0, 0, 0, 0])
    zero = torch.zeros(1, 1, 4)
    assert gated_write(bank, zero, zero[..., :1], backend=backend)[2].slot.item() == 0  # no match: first dead slot
    assert gated_write(bank, zero, zero[..., :1], match_threshold=0, backend=backend)[2].slot.item() == 1
    bank.keys[0, 1] = 0
    assert gated_write(bank, zero + 1, zero[..., :1], match_threshold=0, backend=backend)[2].slot.item() == 1


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_huge_and_tiny_keys_decide_alike(scale, backend):
    bank, keys, values, surprise, stats = make(2, 12, 40, 30, 4)
    scaled = (bank._replace(keys=bank.keys * scale), keys * scale, values, surprise, stats)
    for setting in SETTINGS:
        plain = write(setting, (bank, keys, values, surprise, stats), backend=backend)
        result = write(setting, scaled, backend=backend)
        torch.testing.assert_close(result[2].slot, plain[2].slot, rtol=0, atol=0)
        torch.testing.assert_close(result[2].surprise, plain[2].surprise)
        torch.testing.assert_close(result[0].keys / scale, plain[0].keys)


@pytest.mark.parametrize(("steps", "left"), [(1, 0.3), (1, 0.01), (2, 0.25), (3, 0.22)])
def test_lengths_that_cancel(steps, left):
    """Tokens opposite to the one key held leave a short one, whose cosines come from what is left.

    `steps` such tokens leave about the share left / 2 of the length each; then comes one that is unlike what is held.
    """
    T, E = 60, 50
    g = torch.Generator().manual_seed(0)
    first, keys = torch.randn(E, generator=g), torch.randn(T, E, generator=g)
    held = first.double()
    for t in range(T):
        if t % (steps + 1) < steps:
            keys[t] = -held + left * held.norm() / E**0.5 * keys[t]
        held = 0.5 * held + 0.5 * keys[t].double()
    zero = torch.zeros(1, 1)
    bank = Bank(first[None, None], torch.ones(1, 1, 1), torch.ones(1, 1), zero, zero)
    stats = SurpriseStats(torch.zeros(1), torch.ones(1), torch.ones(1))
    numbers = {"match_threshold": 0.9, "alpha_evict": 0.5, "conflict_floor": -2.0, "z_threshold": -10.0}
    data = (bank, keys[None], torch.ones(1, T, 1), torch.zeros(1, T), stats)
    expected = gated_write(*double(data), **numbers, update_stats=False, backend="reference")[2]
    # No decision is near an edge: every token passes the gate, and none comes close to a match.
    cosine = 1 - expected.surprise / 2
    assert (expected.surprise - expected.threshold).min() > 1 and cosine.max() < 0.8
    result = gated_write(*data, **numbers, update_stats=False)[2]
    assert result.slot.eq(0).all() and expected.slot.eq(0).all()
    torch.testing.assert_close(result.surprise.double(), expected.surprise, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_write_too_weak_to_live_is_dead(backend):
    new, _, written = gated_write(
        empty_bank(1, 3, 4, 1), torch.ones(1, 3, 4), torch.ones(1, 3, 1), boost=0.1, min_strength=0.2, backend=backend
    )
    assert written.slot.tolist() == [[0, 0, 0]] and (written.blend == 1).all()
    torch.testing.assert_close(new.strength, torch.tensor([[0.1, 0, 0]]))


@pytest.mark.parametrize("setting", SETTINGS)
def test_non_contiguous_input(setting):
    bank, keys, values, surprise, stats = make(2, 10, 20, 12, 6)

    def strided(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim > 1 else x.repeat_interleave(2)[::2]

    other = (Bank(*map(strided, bank)), *map(strided, (keys, values, surprise)), SurpriseStats(*map(strided, stats)))
    assert not other[1].is_contiguous() and not other[4].mean.is_contiguous()
    for x, y in zip(
        flat(write(setting, other)).values(),
        flat(write(setting, (bank, keys, values, surprise, stats))).values(),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("size", [(3, 40, 150, 65, 33), (1, 40, 150, 257, 33), (1, 300, 1, 64, 64)])
def test_same_bits_whatever_the_threads(size, setting):
    data, threads, results = make(*size), torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            results.append(flat(write(setting, data)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, x in other.items():
            assert torch.equal(x, results[0][name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tokens_of_another_dtype_are_brought_to_the_banks(dtype):
    bank, keys, values, surprise, stats = make(2, 10, 20, 12, 6)
    tokens = [x.to(dtype) for x in (keys, values, surprise)]
    result = write("store", (bank, *tokens, stats))
    assert all(x.dtype == torch.float32 for name, x in flat(result).items() if name != "written.slot")
    assert_same(result, write("store", (bank, *(x.float() for x in tokens), stats)), 0)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("size", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 0, 5, 6), (2, 3, 4, 0, 6), (2, 3, 4, 5, 0)])
def test_empty_sizes(size, setting, backend):
    data = make(*size)
    bank, _, written = write(setting, data, backend=backend)
    B, S, T, _, _ = size
    if not B * S * T:
        assert (written.slot == -1).all()
        for new, old in zip(bank, data[0], strict=True):
            assert torch.equal(new, old) and new is not old
    assert_same(write(setting, data, backend=backend), write(setting, double(data), backend="reference"), 1e-5)


def test_the_bank_that_came_in_is_left_alone():
    for setting in SETTINGS:
        data = make(2, 6, 9, 7, 5)
        before = make(2, 6, 9, 7, 5)
        write(setting, data)
        for x, y in zip((*data[0], *data[1:4], *data[4]), (*before[0], *before[1:4], *before[4]), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    from fastmem import _native

    if _native.kernels is None or _native.ISAS.index(isa) > _native.ISAS.index(_native.kernels.best_isa()):
        pytest.skip(f"this CPU has no {isa}")
    if isa == _native.isa:
        pytest.skip(f"{isa} is what every other test here runs on")
    program = (
        "import torch\n"
        "from gated_write_data import *\n"
        "from fastmem import _native\n"
        f"assert _native.isa == {isa!r}\n"
        "for setting in SETTINGS:\n"
        "    for size in [(2, 63, 70, 33, 100), (2, 100, 5, 257, 3)]:\n"
        "        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):\n"
        "            data = make(*size, dtype)\n"
        "            assert_same(write(setting, data), write(setting, double(data), backend='reference'), tolerance)\n"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        cwd=os.path.dirname(__file__),
        env=os.environ | {"FASTMEM_CPU_ISA": isa},
    )


def test_explain_says_why():
    data = make(2, 3, 4, 5, 6)
    plan = fastmem.explain("gated_write", *data[:3], **BUFFER)
    assert plan.chosen == "cpp" and set(plan.refused) == {"triton", "reference"}
    assert fastmem.explain("gated_write", *data[:3], backend="reference").chosen == "reference"
    with pytest.raises(ValueError, match="'triton' cannot serve this call"):
        gated_write(*data[:3], backend="triton")
    with pytest.raises(ValueError, match="backend: expected one of"):
        gated_write(*data[:3], backend="cuda")


WRONG = {
    "a bank that is no bank": (lambda d: [d[0].keys, *d[1:3]], {}, TypeError, r"bank: expected Bank\(keys"),
    "keys' width": (
        lambda d: [d[0], d[1][..., :2], d[2]],
        {},
        ValueError,
        r"keys: expected \(2, T, 5\) to match.*\(2, 4, 2\)",
    ),
    "keys' batch": (lambda d: [d[0], d[1][:1], d[2]], {}, ValueError, r"keys: expected \(2, T, 5\).*got \(1, 4, 5\)"),
    "values' length": (
        lambda d: [d[0], d[1], d[2][:, 1:]],
        {},
        ValueError,
        r"values: expected \(2, 4, 6\).*got \(2, 3, 6\)",
    ),
    "strength": (
        lambda d: [d[0]._replace(strength=d[0].age[:1]), *d[1:3]],
        {},
        ValueError,
        r"bank.strength: expected \(2, 3\)",
    ),
    "bank's rank": (
        lambda d: [d[0]._replace(keys=d[0].age), *d[1:3]],
        {},
        ValueError,
        r"bank.keys: expected \(B, S, E\)",
    ),
    "bank's dtype": (
        lambda d: [Bank(*(x.half() for x in d[0])), *d[1:3]],
        {},
        TypeError,
        "bank.keys: expected float32 or",
    ),
    "mixed bank": (
        lambda d: [d[0]._replace(age=d[0].age.double()), *d[1:3]],
        {},
        TypeError,
        "bank.age: expected torch.float32",
    ),
    "integer keys": (
        lambda d: [d[0], d[1].long(), d[2]],
        {},
        TypeError,
        "keys: expected a float dtype, got torch.int64",
    ),
    "no tensor": (lambda d: [d[0], d[1].tolist(), d[2]], {}, TypeError, "keys: expected a tensor, got list"),
    "surprise": (lambda d: [*d[:3], d[3][:, :1]], {}, ValueError, r"surprise: expected \(2, 4\).*got \(2, 1\)"),
    "stats": (lambda d: [*d[:4], d[4]._replace(var=d[3])], {}, ValueError, r"stats.var: expected \(2,\)"),
    "stats' type": (lambda d: [*d[:4], d[3]], {}, TypeError, "stats: expected SurpriseStats"),
    "mask's dtype": (lambda d: d[:3], {"mask": torch.ones(2, 4)}, TypeError, "mask: expected torch.bool"),
    "mask's shape": (lambda d: d[:3], {"mask": torch.ones(4).bool()}, ValueError, r"mask: expected \(2, 4\)"),
    "device": (lambda d: [d[0], d[1].to("meta"), d[2]], {}, ValueError, "keys: expected device cpu"),
    "no surprise": (lambda d: d[:3], {"boost": None}, ValueError, "boost: expected a number, as there is no surprise"),
    "alpha": (lambda d: d[:3], {"alpha_match": 1.5}, ValueError, "alpha_match: expected 0 to 1, got 1.5"),
    "negative boost": (lambda d: d[:3], {"boost": -0.1}, ValueError, "boost: expected a finite number >= 0"),
    "nan": (
        lambda d: d[:3],
        {"match_threshold": float("nan")},
        ValueError,
        "match_threshold: expected a finite number",
    ),
    "tensor number": (lambda d: d[:3], {"alpha_evict": torch.ones(())}, TypeError, "alpha_evict: expected a number"),
    "retention": (lambda d: d[:3], {"retention": (1.0, 2.0)}, ValueError, "retention: expected weights"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_are_told_so_in_one_line(case):
    arguments, kwargs, error, message = WRONG[case]
    with pytest.raises(error, match=message) as caught:
        gated_write(*arguments(make(2, 3, 4, 5, 6)), **kwargs)
    assert "\n" not in str(caught.value)

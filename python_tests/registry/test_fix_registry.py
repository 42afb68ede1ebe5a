from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from operations import CONFIGS, Pair, fix, signature

from fastmem._registry import Signature, key_of
from fastmem.registry import (
    DecayConfig,
    ErrorSeverity,
    ErrorSignature,
    ErrorType,
    Fix,
    FixRegistry,
    FixType,
)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_table_answers_as_the_plain_model(config):
    pair = Pair(FixRegistry(decay_config=DecayConfig(**config)), seed=3, names=300)
    for step in range(20_000):
        pair.step()
        if step % 1000 == 999:
            pair.compare()


def test_a_hundred_thousand_operations():
    pair = Pair(FixRegistry(), seed=5, names=5000)
    for step in range(100_000):
        pair.step()
        if step % 20_000 == 19_999:
            pair.compare()


def test_strengths_far_ahead():
    """Beyond the epochs that are followed one by one, the closed form gives the loop's strength and death."""
    config = DecayConfig(exponential_rate=0.9999, linear_rate=1e-6, min_strength=1e-3)
    registry = FixRegistry(decay_config=config)
    registry.register(signature(1), fix(1))
    strength, epoch = 1.0, 0
    while (strength := max(0.0, strength * 0.9999 - 1e-6)) >= 1e-3:
        epoch += 1
        assert registry.advance_epoch() == 0
        if epoch % 5000 == 0:
            assert registry.entry(signature(1)).strength == pytest.approx(strength, rel=0, abs=1e-9)
    assert epoch > 20_000
    assert registry.advance_epoch() == 1


def test_the_document():
    """The code blocks of the system's description, with their expectations."""
    registry = FixRegistry()
    error = ErrorSignature(
        severity=ErrorSeverity.MAJOR,
        error_type=ErrorType.REMOVAL,
        context="containment_task",
        affected_categories=["spatial"],
        delta=0.65,
    )
    learnt = Fix(
        fix_type=FixType.ADD_ELEMENTS,
        elements_to_add={"boundary": 1.0},
        elements_to_remove=[],
        value_adjustments={},
        category_moves={},
        definition_supplement=None,
        decomposition=None,
    )
    registry.register(error, learnt)
    same = ErrorSignature(ErrorSeverity.MAJOR, ErrorType.REMOVAL, "containment_task", ["spatial"], 0.72)
    assert registry.lookup(same) is learnt
    registry.report_success(same)
    assert registry.get_stats()["total_entries"] == 1
    assert (registry.get_stats()["hits"], registry.get_stats()["misses"]) == (1, 0)
    faster = FixRegistry(decay_config=DecayConfig(exponential_rate=0.95, linear_rate=0.005, min_strength=0.05))
    faster.register(error, learnt)
    assert sum(faster.advance_epoch() for _ in range(100)) == 1


def test_registering_again_keeps_history():
    registry = FixRegistry()
    known = signature(1)
    registry.register(known, fix(1))
    registry.report_success(known)
    for _ in range(3):
        registry.advance_epoch()
    registry.register(known, fix(2))
    entry = registry.entry(known)
    assert (entry.success_count, entry.creation_epoch, entry.last_success_epoch) == (1, 0, 0)
    assert entry.strength == 1.0 and entry.fix == fix(2)


def test_keys_give_handles_that_do_not_outlive_their_entry():
    registry = FixRegistry()
    some = [signature(number) for number in range(1000)]
    registry.register_many(some, [fix(number) for number in range(1000)])
    keys = np.array([one.key for one in some] + [1], np.uint64)
    handles = registry.lookup_many(keys)
    assert handles.dtype == np.int64 and handles[-1] == -1
    assert all(registry.fix(handle) == fix(number) for number, handle in enumerate(handles[:-1]))
    registry.clear()
    registry.register_many(some[::-1], [fix(-1)] * 1000)  # other entries at the same places
    assert all(registry.fix(handle) is None for handle in handles)
    assert registry.lookup_many([some[0], signature(5000)]) == [fix(-1), None]


def test_one_key_and_two_texts_are_two_entries():

    registry = FixRegistry()
    one, two = Signature._of("one", 7, None), Signature._of("two", 7, None)
    registry.register(one, fix(1))
    assert registry.lookup(two) is None
    registry.register(two, fix(2))
    assert (registry.lookup(one), registry.lookup(two)) == (fix(1), fix(2))
    registry.clear()
    assert registry.lookup(one) is None and len(registry) == 0


def test_a_full_registry_drops_what_would_die_first():
    registry = FixRegistry(capacity=3)
    for number in range(3):
        registry.register(signature(number), fix(number))
        registry.advance_epoch()
    registry.report_success(signature(0))
    registry.register(signature(3), fix(3))
    assert [number for number in range(4) if signature(number) in registry] == [0, 2, 3]
    assert len(registry) == 3


@pytest.mark.parametrize("each", [1, 7, 60, 3000])
def test_many_die_at_once(each):
    """Of generations that die one after the other, those that live are found and those that died are not, wherever in
    the table they stand; their places are used again."""
    registry = FixRegistry(decay_config=DecayConfig(exponential_rate=1.0, linear_rate=0.25, min_strength=0.1))
    life, shared = 4, fix(0)
    for generation in range(12):
        block = range(generation * each, (generation + 1) * each)
        registry.register_many([signature(n) for n in block], [shared] * each)
        assert registry.advance_epoch() == (each if generation >= life - 1 else 0)
        living = range(max(0, generation - life + 2) * each, (generation + 1) * each)
        assert [n for n in range((generation + 1) * each) if signature(n) in registry] == list(living)
        assert len(registry) == len(living) and len(registry.entries) == len(living)
    assert registry._counts()[3] <= 4 * each
    for _ in range(life):
        registry.advance_epoch()
    assert len(registry) == 0 and not registry.entries
    registry.register(signature(0), shared)
    assert registry.lookup(signature(0)) is shared


def test_signatures_are_made_while_the_table_they_expect_changes_or_goes():
    registry = FixRegistry()
    some = [signature(number) for number in range(20_000)]
    registry.lookup(some[0])
    writer = threading.Thread(target=registry.register_many, args=(some, [fix(0)] * len(some)))
    writer.start()
    while writer.is_alive():
        signature(1)
    writer.join()
    registry.lookup(some[0])
    registry.clear()
    assert registry.lookup(signature(1)) is None
    del registry
    assert signature(1).text == some[1].text
    with pytest.raises(TypeError, match="digest"):
        key_of(b"short")


def test_many_threads():
    """Counts add up, no fix is ever another signature's, whatever comes in between."""
    registry = FixRegistry(decay_config=DecayConfig(min_strength=0.0))
    per_thread, threads = 4000, 8
    some = [signature(number) for number in range(500)]
    values = [fix(number) for number in range(500)]
    registry.register_many(some, values)
    keys = np.array([one.key for one in some], np.uint64)
    wrong = []

    def work(seed: int) -> None:
        number = seed
        for step in range(per_thread):
            number = (number * 1103515245 + 12345) % 2**31
            one = number % 500
            if registry.lookup(some[one]) not in (None, values[one]):
                wrong.append(one)
            registry.report_success(some[one])
            if step % 50 == 0:
                found = registry.lookup_many(keys)
                wrong.extend(
                    n for n, handle in enumerate(found.tolist()) if registry.fix(handle) not in (None, values[n])
                )
                registry.register_many(some[:100], values[:100])
                registry.advance_epoch()

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    stats = registry.get_stats()
    assert stats["hits"] + stats["misses"] == threads * per_thread * (1 + 500 / 50)
    assert sum(entry.success_count for entry in registry.iter_entries()) == threads * per_thread
    assert stats["current_epoch"] == threads * per_thread // 50


def test_it_needs_neither_torch_nor_numpy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from fastmem.registry import *\n"
        "r = FixRegistry(); e = create_signature(ErrorType.REMOVAL, 'c', ['a'], 0.5)\n"
        "r.register(e, Fix(FixType.DECOMPOSE)); assert r.lookup(e)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda r: r.register("x", fix(1)), TypeError, "ErrorSignature"),
        (lambda r: r.register(signature(1), {}), TypeError, "Fix"),
        (lambda r: r.lookup(None), TypeError, "ErrorSignature"),
        (lambda r: None in r, TypeError, "ErrorSignature"),
        (lambda r: r.lookup_many([signature(1), 3]), TypeError, "ErrorSignature"),
        (lambda r: r.lookup_many(np.zeros(3)), TypeError, "uint64"),
        (lambda r: r.lookup_many(signature(n) for n in range(3)), TypeError, "generator"),
        (lambda r: FixRegistry("postgres://localhost/0"), ValueError, "postgres"),
        (lambda r: r.register_many([signature(1)], []), ValueError, "one for each"),
        (lambda r: r.match(signature(1)), ValueError, "approximate=True"),
        (lambda r: FixRegistry(capacity=0), ValueError, "capacity"),
        (lambda r: FixRegistry(decay_config={}), TypeError, "DecayConfig"),
        (lambda r: FixRegistry(durability="maybe"), ValueError, "durability"),
        (lambda r: DecayConfig(exponential_rate=1.5), ValueError, "exponential_rate"),
        (lambda r: DecayConfig(min_strength=float("nan")), ValueError, "min_strength"),
    ],
)
def test_bad_input_is_named(call, error, words):
    registry = FixRegistry()
    with pytest.raises(error, match=words):
        call(registry)
    assert len(registry) == 0


def test_similar_signatures():
    def error(severity, context, categories, kind=ErrorType.REMOVAL):
        return ErrorSignature(severity, kind, context, categories, 0.6)

    major, minor = ErrorSeverity.MAJOR, ErrorSeverity.MINOR
    registry = FixRegistry(approximate=True)
    registry.register(error(major, "here", ["a", "b"]), fix(1))
    registry.register(error(major, "here", ["a"]), fix(2))
    registry.register(error(minor, "there", ["z"]), fix(3))
    answers = {
        "exact": (error(major, "here", ["b", "a"]), fix(1)),
        "context": (error(major, "elsewhere", ["a"]), fix(2)),
        "categories": (error(major, "x", ["a", "b", "c"]), fix(1)),
        "type": (error(major, "x", ["q"]), fix(3)),
    }
    for level, (asked, expected) in answers.items():
        match = registry.match(asked)
        assert (match.level, match.fix) == (level, expected)
    assert registry.match(error(major, "here", ["a"], ErrorType.SUBSTITUTION)) is None
    for _ in range(9):
        registry.report_failure(error(major, "here", ["a", "b"]))
    registry.report_failure(error(major, "here", ["a", "b"]))
    assert registry.match(error(major, "x", ["a", "b", "c"])).fix == fix(2)


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own address space")
def test_an_epoch_without_the_memory_for_it_comes_again():
    """The entries of a bucket that could not be emptied die with the next epoch."""
    code = """
import ctypes, random, resource
from fastmem._registry import Signature
from fastmem.registry import DecayConfig, Fix, FixRegistry, FixType

entries, fix = 400_000, Fix(FixType.DECOMPOSE)
registry = FixRegistry(decay_config=DecayConfig(0.9, 0.01, 0.1))
some = [Signature._of(f"s{n}", random.getrandbits(64), None) for n in range(entries)]
for one in some:
    registry._insert(one, fix)
while registry.advance_epoch() == 0 and registry._row(some[0])[4] * 0.9 - 0.01 >= 0.1:
    pass
ctypes.CDLL(None).malloc_trim(0)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 500_000, resource.RLIM_INFINITY))
taken = []
try:
    while True:
        taken.append(bytearray(500_000))
except MemoryError:
    pass
try:
    registry.advance_epoch()
    print("no error")
except MemoryError:
    print(len(registry))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
taken.clear()
print(registry.advance_epoch(), len(registry))
registry.register(some[0], fix)
registry.clear()
print(len(registry))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["400000", "400000", "0", "0"]

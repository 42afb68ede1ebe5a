from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmem.registry import DreamGenerator, ErrorType, Fix, FixRegistry, FixType, apply_fix, diagnose
from fastmem.registry.diagnosis import OPPOSITE_PAIRS

CONCEPT = {
    "term": "containment",
    "activations": {"boundary": 1.0, "inside": 0.9, "wall": 0.7},
    "categories": ["spatial", "physical"],
    "definition": "a thing that is within walls",
    "components": ["lid", "base", "hinge"],
}
NAMES = st.text("abcdefgh ", min_size=1, max_size=6) | st.sampled_from(sorted(OPPOSITE_PAIRS))
CONCEPTS = st.fixed_dictionaries(
    {
        "term": st.text(max_size=8),
        "activations": st.dictionaries(NAMES, st.floats(-10, 10), max_size=6),
        "categories": st.lists(NAMES, max_size=4, unique=True),
    },
    optional={"definition": st.text(max_size=30), "components": st.lists(NAMES, max_size=5)},
)


def test_the_document_s_block():
    registry = FixRegistry()
    dreamer = DreamGenerator(registry=registry)
    concept = {
        "term": "containment",
        "activations": {"boundary": 1.0, "inside": 0.9, "wall": 0.7},
        "categories": ["spatial", "physical"],
    }
    examples = dreamer.dream(
        concept=concept, strategies=["removal", "intensity", "substitution"], variants_per_strategy=3
    )
    assert len(examples) == 9
    assert {example.corruption_strategy for example in examples} == {"removal", "intensity", "substitution"}
    entries = registry.get_stats()["total_entries"]
    assert entries == len({example.error_signature.text for example in examples}) >= 6


def test_all_seven_strategies_give_examples():
    examples = DreamGenerator().dream(CONCEPT)
    counts = {e.value: sum(x.corruption_strategy == e.value for x in examples) for e in ErrorType}
    assert all(count > 0 for count in counts.values()), counts
    assert all(example.error_signature.error_type.value == example.corruption_strategy for example in examples)


@settings(max_examples=300, deadline=None)
@given(CONCEPTS, st.integers(0, 5))
def test_a_dreamed_fix_brings_the_concept_back(concept, seed):
    before = copy.deepcopy(concept)
    for example in DreamGenerator(seed=seed).dream(concept, variants_per_strategy=20):
        assert example.original == concept
        assert diagnose(concept, example.corrupted) == example.error_signature
        restored = apply_fix(example.corrupted, example.fix)
        assert diagnose(concept, restored) is None
        assert restored == concept
    assert concept == before


def test_the_signature_is_that_of_the_real_failure():
    """Any one of the elements may be missing in the end: the fix is there, and is right."""
    registry = FixRegistry()
    DreamGenerator(registry).dream(CONCEPT, ["removal"])
    for name in CONCEPT["activations"]:
        found = CONCEPT | {"activations": {n: v for n, v in CONCEPT["activations"].items() if n != name}}
        signature = diagnose(CONCEPT, found)
        assert signature.context == "containment" and signature.affected_categories == ["spatial", "physical"]
        assert apply_fix(found, registry.lookup(signature)) == CONCEPT


@pytest.mark.parametrize(
    "changes, error_type, delta",
    [
        ({"activations": {"boundary": 1.0, "inside": 0.9}}, "removal", 0.7 / 2.6),
        ({"activations": {"boundary": 1.0, "inside": 0.9, "door": 0.7}}, "substitution", 0.0),
        ({"activations": {"boundary": 0.5, "inside": 0.45, "wall": 0.35}}, "intensity", 0.5),
        ({"activations": {"boundary": 1.0, "outside": 0.9, "wall": 0.7}}, "inversion", 1 / 3),
        ({"categories": ["physical", "social"]}, "structural", 0.5),
        ({"categories": ["physical", "spatial"]}, None, None),
        ({"definition": "a thing that is"}, "partial", 1 - 15 / 28),
        ({"components": ["lid"]}, "decomposition", 2 / 3),
    ],
)
def test_diagnosis(changes, error_type, delta):
    signature = diagnose(CONCEPT, CONCEPT | changes)
    if error_type is None:
        assert signature is None
    else:
        assert signature.error_type.value == error_type
        assert signature.delta == pytest.approx(delta)


def test_what_was_learnt_stays():
    registry, learnt = FixRegistry(), Fix(FixType.DECOMPOSE, decomposition=["learnt"])
    dreamed = DreamGenerator(registry, seed=3).dream(CONCEPT)
    registry.clear()
    registry.register(dreamed[0].error_signature, learnt)
    DreamGenerator(registry, seed=3).dream(CONCEPT)
    assert registry.lookup(dreamed[0].error_signature) is learnt
    assert len(registry) == len({example.error_signature.text for example in dreamed})


def test_the_same_seed_dreams_the_same():
    one, two, other = (DreamGenerator(seed=seed).dream(CONCEPT) for seed in (1, 1, 2))
    assert one == two and one != other


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"strategies": ["removal", "wishful"]}, "wishful"),
        ({"strategies": "removal"}, "strategies"),
        ({"variants_per_strategy": -1}, "variants_per_strategy"),
        ({"concept": {"activations": 3}}, "activations"),
        ({"concept": None}, "expected a dict"),
    ],
)
def test_bad_input_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        DreamGenerator().dream(**{"concept": CONCEPT} | arguments)


def test_a_concept_of_nothing_gives_no_dreams():
    assert DreamGenerator(FixRegistry()).dream({}) == []

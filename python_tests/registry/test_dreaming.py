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
        ({"concept": CONCEPT | {"activations": {"a": float("inf")}}}, "finite"),
        ({"concept": CONCEPT | {"term": None}}, "term"),
        ({"concept": {key: value for key, value in CONCEPT.items() if key != "term"}}, "term"),
        ({"concept": None}, "expected a dict"),
    ],
)
def test_bad_input_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        DreamGenerator().dream(**{"concept": CONCEPT} | arguments)


def test_a_concept_of_nothing_gives_no_dreams():
    assert DreamGenerator(FixRegistry()).dream({"term": "nothing"}) == []


def test_elements_are_truncated_where_there_is_no_definition():
    concept = {key: value for key, value in CONCEPT.items() if key != "definition"}
    examples = DreamGenerator().dream(concept, ["partial"])
    assert examples and all(example.corruption_strategy == "partial" for example in examples)
    for example in examples:
        kept = list(example.corrupted["activations"])
        assert kept == list(concept["activations"])[: len(kept)] and len(kept) < 3
        assert example.error_signature.error_type is ErrorType.REMOVAL


@pytest.mark.parametrize("categories", [["*", "a"], ["", "a"], ["a", "a"]])
def test_categories_that_no_fix_can_say(categories):
    concept = CONCEPT | {"categories": categories}
    assert DreamGenerator().dream(concept, ["structural"]) == []
    assert all(apply_fix(example.corrupted, example.fix) == concept for example in DreamGenerator().dream(concept))


def test_a_concept_that_changes_later_leaves_its_dreams_alone():
    concept = copy.deepcopy(CONCEPT)
    examples = DreamGenerator().dream(concept)
    concept["activations"]["wall"] = 0.1
    concept["categories"].append("social")
    assert all(example.original == CONCEPT for example in examples)
    assert all(apply_fix(example.corrupted, example.fix) == CONCEPT for example in examples)


def test_variants_of_other_severities_come_first():
    for name, severities in (("removal", 3), ("intensity", 3), ("decomposition", 3), ("partial", 3), ("structural", 2)):
        examples = DreamGenerator().dream(CONCEPT, [name], 3)
        assert len({example.error_signature.severity for example in examples}) >= severities, name


def test_values_that_are_no_numbers_any_more_are_mended():
    registry = FixRegistry()
    DreamGenerator(registry).dream(CONCEPT, ["intensity"], 20)
    for value in (float("nan"), float("inf"), 1.7e308):
        found = CONCEPT | {"activations": dict.fromkeys(CONCEPT["activations"], value)}
        signature = diagnose(CONCEPT, found)
        assert signature.delta == 1.0
        assert apply_fix(found, registry.lookup(signature)) == CONCEPT


@settings(max_examples=200, deadline=None)
@given(CONCEPTS, st.data())
def test_damage_of_several_kinds_is_mended_one_after_another(concept, data):
    """Each kind's fix, whatever its severity, until nothing is wrong."""
    dreams = DreamGenerator().dream(concept, variants_per_strategy=20)
    fixes = {example.error_signature.error_type: example.fix for example in dreams}
    found = dict(concept)
    for name in ("activations", "categories", "components", "definition"):
        damaged = [example.corrupted[name] for example in dreams if name in example.corrupted]
        if damaged:
            found[name] = data.draw(st.sampled_from(damaged))
    for _ in range(5):
        signature = diagnose(concept, found)
        if signature is None:
            break
        found = apply_fix(found, fixes[signature.error_type])
    assert found == concept

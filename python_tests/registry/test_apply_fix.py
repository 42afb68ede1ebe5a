from __future__ import annotations

import copy

import pytest

from fastmem.registry import Fix, FixType, apply_fix

CONCEPT = {
    "term": "containment",
    "activations": {"boundary": 1.0, "inside": 0.9, "wall": 0.7},
    "categories": ["spatial", "physical"],
    "definition": "a thing within walls",
    "components": ["lid", "base"],
    "notes": 3,
}


@pytest.mark.parametrize(
    "fix, changed",
    [
        (Fix(FixType.ADD_ELEMENTS, {"roof": 0.5}), {"activations": CONCEPT["activations"] | {"roof": 0.5}}),
        (
            Fix(FixType.REMOVE_ELEMENTS, elements_to_remove=["wall", "none"]),
            {"activations": {"boundary": 1.0, "inside": 0.9}},
        ),
        (
            Fix(FixType.SWAP_ELEMENTS, {"door": 0.2}, ["wall"]),
            {"activations": {"boundary": 1.0, "inside": 0.9, "door": 0.2}},
        ),
        (Fix(FixType.SWAP_ELEMENTS, {"wall": 0.2}, ["*"]), {"activations": {"wall": 0.2}}),
        (
            Fix(FixType.ADJUST_VALUES, value_adjustments={"wall": 0.1, "none": 3.0}),
            {"activations": {"boundary": 1.0, "inside": 0.9, "wall": 0.1}},
        ),
        (
            Fix(FixType.RESTORE_CATEGORY, category_moves={"physical": "abstract"}),
            {"categories": ["spatial", "abstract"]},
        ),
        (
            Fix(FixType.RESTORE_CATEGORY, category_moves={"none": "social"}),
            {"categories": ["spatial", "physical", "social"]},
        ),
        (Fix(FixType.RESTORE_CATEGORY, category_moves={"physical": "physical", "*": ""}), {"categories": ["physical"]}),
        (
            Fix(FixType.COMPLETE_DEFINITION, definition_supplement="a thing within walls that holds"),
            {"definition": "a thing within walls that holds"},
        ),
        (
            Fix(FixType.COMPLETE_DEFINITION, definition_supplement="and a roof"),
            {"definition": "a thing within walls and a roof"},
        ),
        (Fix(FixType.COMPLETE_DEFINITION, definition_supplement="walls"), {}),
        (Fix(FixType.COMPLETE_DEFINITION, definition_supplement=""), {}),
        (
            Fix(FixType.COMPLETE_DEFINITION, definition_supplement="alls"),
            {"definition": "a thing within walls alls"},
        ),
        (Fix(FixType.DECOMPOSE, decomposition=["lid"]), {"components": ["lid"]}),
        (Fix(FixType.ADD_ELEMENTS), {}),
    ],
)
def test_each_field(fix, changed):
    before = copy.deepcopy(CONCEPT)
    assert apply_fix(CONCEPT, fix) == CONCEPT | changed
    assert before == CONCEPT
    assert apply_fix(apply_fix(CONCEPT, fix), fix) == apply_fix(CONCEPT, fix)


@pytest.mark.parametrize("left", ["", "a", "a thing w", "within walls", "a within", "thing walls", "a thi", "a walls"])
def test_a_definition_with_words_missing_is_completed(left):
    fix = Fix(FixType.COMPLETE_DEFINITION, definition_supplement=CONCEPT["definition"])
    assert apply_fix(CONCEPT | {"definition": left}, fix) == CONCEPT


@pytest.mark.parametrize("other", ["walls a", "a a", "thingy", "a thing within walls too"])
def test_another_definition_is_kept(other):
    fix = Fix(FixType.COMPLETE_DEFINITION, definition_supplement=CONCEPT["definition"])
    assert apply_fix(CONCEPT | {"definition": other}, fix)["definition"] == f"{other} {CONCEPT['definition']}"


def test_nothing_is_shared_with_the_fix():
    fix = Fix(FixType.DECOMPOSE, {"a": 1.0}, decomposition=["lid"])
    fixed = apply_fix({}, fix)
    fixed["components"].append("x")
    fixed["activations"]["b"] = 2.0
    assert (fix.decomposition, fix.elements_to_add) == (["lid"], {"a": 1.0})


@pytest.mark.parametrize(
    "concept, words",
    [
        ({"activations": ["a"]}, "activations"),
        ({"activations": {"a": "b"}}, "activations"),
        ({"activations": {"a": True}}, "activations"),
        ({"categories": "spatial"}, "categories"),
        ({"definition": 3}, "definition"),
        ({"components": [1]}, "components"),
    ],
)
def test_malformed_concepts_are_named(concept, words):
    with pytest.raises(ValueError, match=words):
        apply_fix(concept, Fix(FixType.ADD_ELEMENTS))


def test_arguments_the_wrong_way_round():
    with pytest.raises(TypeError, match=r"expected \(concept dict, Fix\), got \(Fix, dict\)"):
        apply_fix(Fix(FixType.ADD_ELEMENTS), CONCEPT)

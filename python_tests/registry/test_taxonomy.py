from __future__ import annotations

import copy
import hashlib
import inspect
import pickle
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmem.registry import ErrorSeverity, ErrorSignature, ErrorType, classify_severity, create_signature
from fastmem.registry.taxonomy import parse_text

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@pytest.mark.parametrize(
    "delta, severity",
    [(1.0, "catastrophic"), (0.9, "major"), (0.5, "moderate"), (0.11, "moderate"), (0.1, "minor"), (0, "minor")],
)
def test_severity(delta, severity):
    assert classify_severity(delta).value == severity


@given(TEXT, st.lists(TEXT, max_size=3), st.sampled_from(ErrorSeverity), st.sampled_from(ErrorType))
def test_the_hash_is_the_definition_s(context, categories, severity, error_type):
    signature = ErrorSignature(severity, error_type, context, categories, 0.3)
    text = f"{severity.value}:{error_type.value}:{context}:{sorted(categories)}"
    assert signature.hash() == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert signature.text == text
    assert signature.affected_categories == categories
    head, kind, where, what = parse_text(text)
    assert f"{head}:{kind}:{where}:{what}" == text
    for copied in (pickle.loads(pickle.dumps(signature)), copy.deepcopy(signature)):
        assert copied == signature and copied.key == signature.key


ODD = st.one_of(st.none(), st.integers(), st.floats(), TEXT, st.sampled_from(ErrorSeverity), st.sampled_from(ErrorType))
CATEGORIES = st.lists(st.one_of(TEXT, st.sampled_from(["a", "physical", "it's", "\\"])), max_size=4)


@given(
    st.one_of(st.sampled_from(ErrorSeverity), ODD),
    st.one_of(st.sampled_from(ErrorType), ODD),
    st.one_of(TEXT, st.text(max_size=3), ODD),
    st.one_of(CATEGORIES, CATEGORIES.map(tuple), st.lists(ODD, max_size=2), ODD),
    st.one_of(st.floats(), st.integers(), st.booleans(), st.just(10**400), ODD),
)
def test_the_constructor_is_the_python_behind_it(severity, error_type, context, categories, delta):
    """Also what it refuses, and in the same words."""

    def outcome(make):
        try:
            signature = make(severity, error_type, context, categories, delta)
        except (TypeError, ValueError) as error:
            return type(error), str(error)
        return signature.text, signature.key, signature._fields, type(signature)

    assert outcome(ErrorSignature) == outcome(ErrorSignature._make)


def test_text_and_fields_agree_while_a_list_changes():
    """A long text is hashed without the GIL, and another thread has the list meanwhile."""
    categories, done = ["a"], threading.Event()

    def change() -> None:
        while not done.is_set():
            categories[0] = "b" if categories[0] == "a" else "a"

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    other = threading.Thread(target=change)
    other.start()
    try:
        for _ in range(50):
            one = ErrorSignature(ErrorSeverity.MAJOR, ErrorType.REMOVAL, "c" * 300_000, categories, 0.5)
            assert parse_text(one.text)[3] == one.affected_categories
    finally:
        done.set()
        other.join()
        sys.setswitchinterval(interval)


def test_a_signature_takes_any_iterable_and_keywords():
    one = ErrorSignature(ErrorSeverity.MAJOR, ErrorType.REMOVAL, "task", iter(["b", "a"]), delta=0.6)
    assert one.text == "major:removal:task:['a', 'b']" and one.affected_categories == ["b", "a"]
    assert list(inspect.signature(ErrorSignature).parameters) == [
        "severity",
        "error_type",
        "context",
        "affected_categories",
        "delta",
    ]
    with pytest.raises(TypeError, match=r"ErrorSignature\(\)"):
        ErrorSignature(ErrorSeverity.MAJOR)


def test_a_delta_that_is_no_number_is_named():
    with pytest.raises(TypeError, match="delta: expected a number, got 'x'"):
        create_signature(ErrorType.REMOVAL, "task", [], "x")


def test_delta_is_not_part_of_the_key():
    one, two = (create_signature(ErrorType.REMOVAL, "task", ["b", "a"], delta) for delta in (0.6, 0.8))
    assert one.key == two.key and one != two
    assert create_signature(ErrorType.REMOVAL, "task", ["a", "b"], 0.6).key == one.key


def test_a_signature_does_not_change():
    signature = create_signature(ErrorType.REMOVAL, "task", ["a"], 0.6)
    signature.affected_categories.append("b")
    assert signature.affected_categories == ["a"]
    with pytest.raises(AttributeError):
        signature.context = "other"


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"severity": "major"}, TypeError, "severity"),
        ({"error_type": ErrorSeverity.MAJOR}, TypeError, "error_type"),
        ({"context": 3}, TypeError, "context"),
        ({"context": "\ud800"}, ValueError, "UTF-8"),
        ({"affected_categories": "spatial"}, TypeError, "affected_categories"),
        ({"affected_categories": [1]}, TypeError, "affected_categories"),
        ({"affected_categories": None}, TypeError, "affected_categories: expected a list of str"),
        ({"delta": "x"}, TypeError, "delta"),
        ({"delta": float("inf")}, ValueError, "delta"),
        ({"delta": 10**400}, ValueError, "delta"),
    ],
)
def test_bad_input_is_named(change, error, words):
    right = {
        "severity": ErrorSeverity.MAJOR,
        "error_type": ErrorType.REMOVAL,
        "context": "task",
        "affected_categories": ["a"],
        "delta": 0.6,
    }
    with pytest.raises(error, match=words):
        ErrorSignature(**right | change)


@pytest.mark.parametrize(
    "category", [":[" + "-" * 7000 + "1]#", ":[" + "1+" * 50_000 + "1]#", "x:[]#", "a'b\"c", "\\", "\n", "', '", "[]"]
)
def test_hostile_categories(category):
    text = create_signature(ErrorType.REMOVAL, "t:['x']", [category, "z"], 0.6).text
    assert parse_text(text) == ("major", "removal", "t:['x']", sorted([category, "z"]))


def test_subclasses_of_str_are_their_text():
    import numpy as np

    class Own(str):
        def __repr__(self):
            return "mine"

        __str__ = __repr__

    plain = create_signature(ErrorType.REMOVAL, "task", ["a", "b"], 0.6)
    assert create_signature(ErrorType.REMOVAL, Own("task"), [np.str_("a"), Own("b")], 0.6).text == plain.text


@pytest.mark.parametrize("text", ["", "major", "major:removal:x", "a:b:[", "a:['b']", "a:b:[1]", "major:removal['a']"])
def test_text_that_is_no_signature(text):
    with pytest.raises(ValueError, match="no signature"):
        parse_text(text)

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import json
import pickle
import sys
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmem.registry import Fix, FixType

WHOLE = Fix(FixType.SWAP_ELEMENTS, {"a": 1}, ["b"], {"c": 0.5}, {"d": "e"}, "text", ["f"])


@pytest.mark.parametrize("fix", [WHOLE, Fix(FixType.DECOMPOSE), Fix(FixType.DECOMPOSE, decomposition=[])])
def test_both_forms_come_back(fix):
    assert Fix.from_dict(json.loads(json.dumps(fix.to_dict()))) == fix
    assert Fix.from_json(fix.to_json()) == fix
    assert len(fix.to_json()) <= len(json.dumps(fix.to_dict()))


@pytest.mark.parametrize(
    "field, wrong",
    [
        ("elements_to_add", ["retry"]),
        ("elements_to_add", {"a": "x"}),
        ("elements_to_add", {"a": True}),
        ("elements_to_add", {"a": {"b": 1}}),
        ("elements_to_add", {1: 1.0}),
        ("elements_to_remove", "wall"),
        ("value_adjustments", {"a": float("nan")}),
        ("value_adjustments", {"a": float("-inf")}),
        ("category_moves", {"a": 1}),
        ("definition_supplement", 3),
        ("decomposition", "split"),
        ("decomposition", [1]),
    ],
)
def test_a_wrong_field_is_named_when_made_and_when_written(field, wrong):
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        Fix(FixType.ADD_ELEMENTS, **{field: wrong})
    changed = Fix(FixType.ADD_ELEMENTS)
    setattr(changed, field, wrong)
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        changed.to_json()


NAMES = st.one_of(st.sampled_from(["a", "wall", "it's", 'a"b', "a\\b", "\x7f"]), st.text(max_size=5))
NUMBERS = st.dictionaries(NAMES, st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers()), max_size=3)


@given(st.sampled_from(FixType), NUMBERS, NUMBERS)
def test_json_is_that_of_the_library(kind, add, adjust):
    """Number by number and name by name, also where C++ writes it."""
    fix = Fix(kind, add, value_adjustments=adjust)
    values = {"fix_type": kind.value, "elements_to_add": add, "value_adjustments": adjust}
    expected = json.dumps({name: value for name, value in values.items() if value}, separators=(",", ":"))
    assert fix.to_json() == expected
    assert Fix.from_json(expected) == fix


def test_json_nested_too_deeply_is_no_fix():
    with pytest.raises(ValueError, match="nested too deeply"):
        Fix.from_json("[" * 100_000)


def test_a_wrong_type_is_named():
    with pytest.raises(TypeError, match="fix_type: expected a FixType, got 'restart'"):
        Fix("restart")
    changed = Fix(FixType.ADD_ELEMENTS)
    changed.fix_type = "add"
    with pytest.raises(TypeError, match="fix_type"):
        changed.to_json()


def test_a_field_that_nobody_set_is_the_fix_s_own():
    one, other = Fix(FixType.ADD_ELEMENTS), Fix(FixType.ADD_ELEMENTS)
    one.elements_to_remove.append("wall")
    one.category_moves["a"] = "b"
    assert (one.elements_to_remove, one.category_moves) == (["wall"], {"a": "b"})
    assert (other.elements_to_remove, other.category_moves) == ([], {})
    assert (other.definition_supplement, other.decomposition) == (None, None)
    assert Fix.from_json(one.to_json()) == one != other


def test_it_is_a_dataclass():
    assert [field.name for field in dataclasses.fields(Fix)] == list(inspect.signature(Fix).parameters)
    assert dataclasses.fields(Fix)[0].default is dataclasses.MISSING
    with pytest.raises(TypeError, match="missing"):
        Extended()
    changed = dataclasses.replace(WHOLE, decomposition=["g"])
    assert (changed.decomposition, changed.elements_to_add) == (["g"], {"a": 1})
    assert dataclasses.asdict(WHOLE)["value_adjustments"] == {"c": 0.5}
    assert repr(WHOLE).startswith("Fix(fix_type=<FixType.SWAP_ELEMENTS: 'swap'>, elements_to_add={'a': 1}, ")


class Tagged(Fix):
    """With a `__dict__`."""


class Slotted(Fix):
    __slots__ = ("tag",)


@dataclasses.dataclass
class Extended(Fix):
    tag: list[str] = dataclasses.field(default_factory=lambda: ["mine"])


@dataclasses.dataclass(slots=True)
class SlotsExtended(Fix):
    tag: list[str] = dataclasses.field(default_factory=lambda: ["mine"])


SUBCLASSES = [Tagged, Slotted, Extended, SlotsExtended]


@pytest.mark.parametrize("kind", [Fix, *SUBCLASSES])
def test_it_is_copied_and_pickled_whole(kind):
    fix = kind(FixType.SWAP_ELEMENTS, {"a": 1}, ["b"], decomposition=["f"])
    if kind is not Fix:
        fix.tag = ["mine"]
    pickled = [pickle.loads(pickle.dumps(fix, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for copied in (*pickled, copy.deepcopy(fix)):
        assert type(copied) is kind and copied == fix
        assert copied.elements_to_remove is not fix.elements_to_remove
        assert getattr(copied, "tag", None) == getattr(fix, "tag", None)
    assert copy.copy(fix).elements_to_remove is fix.elements_to_remove


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_a_subclass_is_checked_and_written_like_a_fix(kind):
    with pytest.raises(TypeError, match="fix_type: expected a FixType"):
        kind("nonsense")
    with pytest.raises(ValueError, match="elements_to_add: expected"):
        kind(FixType.ADD_ELEMENTS, {"a": "x"})
    assert kind(FixType.ADD_ELEMENTS, {"a": 1.0}).to_json() == Fix(FixType.ADD_ELEMENTS, {"a": 1.0}).to_json()


def test_a_subclass_s_own_check_is_called():
    class Strict(Fix):
        def __post_init__(self):
            super().__post_init__()
            raise ValueError("never right")

    with pytest.raises(ValueError, match="never right"):
        Strict(FixType.ADD_ELEMENTS)


def test_fields_are_neither_missing_nor_deleted():
    fix = Fix(FixType.ADD_ELEMENTS)
    with pytest.raises(AttributeError, match="category_moves: a fix keeps all of its fields"):
        del fix.category_moves
    with pytest.raises(AttributeError):
        fix.other = 1
    with pytest.raises(AttributeError, match="fix_type"):
        Fix.__new__(Fix).fix_type  # noqa: B018
    for call in (lambda: Fix(), lambda: Fix(FixType.ADD_ELEMENTS, other=1), lambda: Fix(*[FixType.ADD_ELEMENTS] * 8)):
        with pytest.raises(TypeError, match=r"Fix\(\)"):
            call()


def test_the_collector_is_spared_what_makes_no_cycle():
    assert not gc.is_tracked(Fix(FixType.ADD_ELEMENTS, {"a": 1.0}))
    assert gc.is_tracked(Slotted(FixType.ADD_ELEMENTS))
    set_later = Fix(FixType.ADD_ELEMENTS)
    set_later.elements_to_add = Owner(a=1.0)
    assert gc.is_tracked(set_later)
    set_later.elements_to_add = {"a": 1.0}
    assert not gc.is_tracked(set_later)


class Owner(dict):
    """A dict that can be in a cycle, and be seen to be gone."""


@pytest.mark.parametrize("kind", [Fix, *SUBCLASSES])
def test_cycles_are_collected(kind):
    made, later = Owner(a=1.0), Owner(a=1.0)
    made.fix = kind(FixType.ADD_ELEMENTS, made)
    later.fix = kind(FixType.ADD_ELEMENTS)
    later.fix.value_adjustments = later
    alive = [weakref.ref(made), weakref.ref(later)]
    if kind is not Fix:
        own = Owner()
        own.fix = kind(FixType.ADD_ELEMENTS)
        own.fix.tag = own
        alive.append(weakref.ref(own))
        del own
    del made, later
    gc.collect()
    assert [one() for one in alive] == [None] * len(alive)


def test_fields_are_let_go():
    fix = Fix(FixType.ADD_ELEMENTS, first := Owner(a=1.0))
    alive = weakref.ref(first)
    del first
    fix.elements_to_add = second = Owner(a=2.0)
    assert alive() is None
    alive = weakref.ref(second)
    del second, fix
    assert alive() is None


def test_numbers_out_of_a_float_s_range_are_named():
    assert Fix(FixType.ADD_ELEMENTS, {"a": 2**1000, "b": -1}).to_json()
    largest = int(sys.float_info.max)
    for wrong in (10**400, -(10**400), largest + 1, -largest - 1):
        for more in ({}, {"decomposition": ["x"]}):
            assert Fix(FixType.ADD_ELEMENTS, {"a": largest}, **more).to_json()
            with pytest.raises(ValueError, match="elements_to_add"):
                Fix(FixType.ADD_ELEMENTS, {"a": wrong}, **more)

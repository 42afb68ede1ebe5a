from __future__ import annotations

import json

import pytest

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

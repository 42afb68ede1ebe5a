"""What mends a failure."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from fastmem._registry import FixFields, set_fix_kinds


class FixType(Enum):
    """The main thing that a fix does."""

    ADD_ELEMENTS = "add"
    REMOVE_ELEMENTS = "remove"
    ADJUST_VALUES = "adjust"
    SWAP_ELEMENTS = "swap"
    RESTORE_CATEGORY = "restore"
    INVERT_RELATIONSHIP = "invert"
    COMPLETE_DEFINITION = "complete"
    DECOMPOSE = "decompose"


@dataclass(init=False)
class Fix(FixFields):
    """What to change in a concept; `apply_fix` does it.

    Attributes:
        fix_type: the main thing it does.
        elements_to_add: element -> its value.
        elements_to_remove: elements to drop.
        value_adjustments: element -> the value it should have.
        category_moves: category -> the category it should be.
        definition_supplement: text that completes the definition.
        decomposition: the parts that the concept consists of.

    Raises:
        TypeError: `fix_type` is no FixType.
        ValueError: another field is of another kind, or holds a number that is not finite.
    """

    __slots__ = ()  # FixFields keeps them

    fix_type: FixType = field()
    elements_to_add: dict[str, float] = field(default_factory=dict)
    elements_to_remove: list[str] = field(default_factory=list)
    value_adjustments: dict[str, float] = field(default_factory=dict)
    category_moves: dict[str, str] = field(default_factory=dict)
    # Factories, since a default would be an attribute of the class and hide the field.
    definition_supplement: str | None = field(default_factory=lambda: None)
    decomposition: list[str] | None = field(default_factory=lambda: None)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise where a field is not what it should be. Called when a fix is made, and before it is written."""
        if self._usual():  # only numbers are added and adjusted, as most fixes do: seen fast
            return
        if not isinstance(self.fix_type, FixType):
            raise TypeError(f"fix_type: expected a FixType, got {self.fix_type!r}")
        for name, (fits, expected) in _KINDS.items():
            if not fits(value := getattr(self, name)):
                raise ValueError(f"{name}: expected {expected}, got {value!r}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(max(2, protocol))  # before 2, pickle makes the base class and knows no slots

    def to_dict(self) -> dict[str, Any]:
        """All seven fields, ready for JSON."""
        return {"fix_type": self.fix_type.value} | {name: getattr(self, name) for name in _NAMES}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Fix:
        """The fix of `to_dict`; fields that are missing take their defaults.

        Raises:
            ValueError: an unknown field or fix type, no fix type, or a field of another kind.
        """
        if not isinstance(data, dict):
            raise ValueError(f"fix: expected an object, got {data!r}")
        if unknown := data.keys() - {"fix_type", *_NAMES}:
            raise ValueError(f"fix: unknown field {min(unknown, key=str)!r}")
        try:
            kind = data["fix_type"]
            fix_type = kind if isinstance(kind, FixType) else _TYPES[kind]
        except (KeyError, TypeError):
            if "fix_type" not in data:
                raise ValueError("fix: fix_type is missing") from None
            raise ValueError(f"fix_type: expected one of {', '.join(_TYPES)}, got {data['fix_type']!r}") from None
        return cls(fix_type, **{name: data[name] for name in _NAMES if name in data})

    def to_json(self) -> str:
        """Compact JSON without the fields that are empty. Raises as `check` does: fields may have changed."""
        if usual := self._json():
            return usual
        self.check()
        add, adjust = self.elements_to_add, self.value_adjustments
        remove, moves, parts = self.elements_to_remove, self.category_moves, self.decomposition
        values: dict[str, Any] = {"fix_type": self.fix_type._value_}
        if add:
            values["elements_to_add"] = add
        if remove:
            values["elements_to_remove"] = remove
        if adjust:
            values["value_adjustments"] = adjust
        if moves:
            values["category_moves"] = moves
        if self.definition_supplement is not None:
            values["definition_supplement"] = self.definition_supplement
        if parts is not None:
            values["decomposition"] = parts
        return _encode(values)

    @classmethod
    def from_json(cls, text: str) -> Fix:
        """The fix of `to_json`. Raises ValueError where it is none."""
        try:
            return cls.from_dict(json.loads(text))
        except RecursionError:
            raise ValueError("fix: nested too deeply") from None


set_fix_kinds(Fix, FixType)

_TYPES = {member.value: member for member in FixType}
_NAMES = (
    "elements_to_add",
    "elements_to_remove",
    "value_adjustments",
    "category_moves",
    "definition_supplement",
    "decomposition",
)


def _make_encode() -> Any:
    """json's encoder with its C part made once: `JSONEncoder.encode` makes it anew for every call."""
    encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False)
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return encoder.encode
    try:
        chunks = make(None, encoder.default, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, False)
        if "".join(chunks({"a": [1.5, None]}, 0)) != '{"a":[1.5,null]}':
            return encoder.encode
    except TypeError:  # another Python's
        return encoder.encode
    return lambda value: "".join(chunks(value, 0))


_encode = _make_encode()


_LARGE = sys.float_info.max


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGE <= value <= _LARGE


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _by_text(kind: Any) -> Any:
    return lambda value: (
        isinstance(value, dict) and all(isinstance(name, str) and kind(item) for name, item in value.items())
    )


_NUMBERS = (_by_text(_number), "{element: finite number}")
_KINDS = {  # field -> (whether a value fits, what is expected)
    "elements_to_add": _NUMBERS,
    "elements_to_remove": (_texts, "a list of str"),
    "value_adjustments": _NUMBERS,
    "category_moves": (_by_text(lambda value: isinstance(value, str)), "{category: category}"),
    "definition_supplement": (lambda value: value is None or isinstance(value, str), "a str or None"),
    "decomposition": (lambda value: value is None or _texts(value), "a list of str or None"),
}

"""What can go wrong, and the signature by which one failure is known again."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from enum import Enum
from hashlib import sha256
from typing import Any

from fastmem._registry import Signature, key_of, set_signature_kinds


class ErrorSeverity(Enum):
    """How much of the concept changed, by `delta`."""

    CATASTROPHIC = "catastrophic"  # delta > 0.9
    MAJOR = "major"  # delta > 0.5
    MODERATE = "moderate"  # delta > 0.1
    MINOR = "minor"


class ErrorType(Enum):
    """What kind of change it was."""

    REMOVAL = "removal"  # elements missing
    SUBSTITUTION = "substitution"  # a wrong element used
    INTENSITY_SHIFT = "intensity"  # values off
    STRUCTURAL_SWAP = "structural"  # a wrong category
    RELATIONSHIP_INVERSION = "inversion"  # the opposite relation
    PARTIAL_DEFINITION = "partial"  # an incomplete definition
    COMPONENT_REMOVAL = "decomposition"  # parts missing


def classify_severity(delta: float) -> ErrorSeverity:
    """The severity of a change of magnitude `delta` (0: none, 1: all): above 0.9, 0.5, 0.1, or below.

    Raises:
        TypeError: a delta that is no number.
    """
    if not isinstance(delta, (int, float)):
        raise TypeError(f"delta: expected a number, got {delta!r}")
    if delta > 0.9:
        return ErrorSeverity.CATASTROPHIC
    if delta > 0.5:
        return ErrorSeverity.MAJOR
    return ErrorSeverity.MODERATE if delta > 0.1 else ErrorSeverity.MINOR


class ErrorSignature(Signature):
    """A failure, by what it has in common with its like: two are looked up alike when only their `delta` differs.

    Immutable; its canonical text and its 64-bit key are made once, here, and every lookup uses them.

    Args:
        severity: how bad, see `classify_severity`.
        error_type: what kind.
        context: where it happened, any text.
        affected_categories: what it touched; their order does not matter.
        delta: magnitude of the change; not part of the signature's identity for lookups.

    Raises:
        TypeError: an argument of another type.
        ValueError: a delta that is no finite number, or text that UTF-8 cannot hold.
    """

    __slots__ = ()

    @classmethod
    def _make(
        cls,
        severity: ErrorSeverity,
        error_type: ErrorType,
        context: str,
        affected_categories: list[str] | tuple[str, ...],
        delta: float,
    ) -> ErrorSignature:
        """What the constructor does, which is C++ and leaves to this what is not usual: errors, subclasses of str, text
        that repr() escapes."""
        if not isinstance(severity, ErrorSeverity):
            raise TypeError(f"severity: expected an ErrorSeverity, got {severity!r}")
        if not isinstance(error_type, ErrorType):
            raise TypeError(f"error_type: expected an ErrorType, got {error_type!r}")
        if not isinstance(context, str):
            raise TypeError(f"context: expected a str, got {context!r}")
        if isinstance(affected_categories, str) or not isinstance(affected_categories, Iterable):
            raise TypeError(f"affected_categories: expected a list of str, got {affected_categories!r}")
        categories = tuple(affected_categories)
        for category in categories:
            if not isinstance(category, str):
                raise TypeError(f"affected_categories: expected a list of str, got {category!r} in it")
        if not isinstance(delta, (int, float)):
            raise TypeError(f"delta: expected a number, got {delta!r}")
        if not -sys.float_info.max <= delta <= sys.float_info.max:
            raise ValueError(f"delta: expected a finite number, got {delta!r}")
        # A subclass of str, such as numpy's, may show itself in another way; the text must not.
        context, categories = str.__str__(context), tuple(map(str.__str__, categories))
        text = f"{severity._value_}:{error_type._value_}:{context}:{sorted(categories)}"
        return cls._of(text, text_key(text), (severity, error_type, context, categories, delta))

    @property
    def severity(self) -> ErrorSeverity:
        return self._fields[0]

    @property
    def error_type(self) -> ErrorType:
        return self._fields[1]

    @property
    def context(self) -> str:
        return self._fields[2]

    @property
    def affected_categories(self) -> list[str]:
        return list(self._fields[3])

    @property
    def delta(self) -> float:
        return self._fields[4]

    def hash(self) -> str:
        """The key as 16 hex digits: the first of sha256 of "severity:type:context:[sorted categories]"."""
        return f"{self.key:016x}"

    def __eq__(self, other: object) -> bool:
        """Whether every field is equal, `delta` included."""
        return isinstance(other, ErrorSignature) and self._fields == other._fields

    def __hash__(self) -> int:
        return hash(self._fields)

    def __reduce__(self) -> Any:
        return type(self), self._fields

    def __repr__(self) -> str:
        names = ("severity", "error_type", "context", "affected_categories", "delta")
        values = (*self._fields[:3], list(self._fields[3]), self._fields[4])
        return f"ErrorSignature({', '.join(f'{n}={v!r}' for n, v in zip(names, values, strict=True))})"


set_signature_kinds(ErrorSignature, ErrorSeverity, ErrorType, sha256)


def create_signature(
    error_type: ErrorType, context: str, affected_categories: list[str], delta: float
) -> ErrorSignature:
    """A signature whose severity follows from its delta."""
    return ErrorSignature(classify_severity(delta), error_type, context, affected_categories, delta)


def text_key(text: str) -> int:
    """The 64-bit key of a canonical text: the first 8 bytes of its sha256."""
    try:
        return key_of(sha256(text.encode()).digest())
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a signature holds text that UTF-8 cannot: {error.object[error.start : error.end]!r}"
        ) from None


def stored_signature(text: str) -> Signature:
    """A signature of which only the canonical text is known."""
    return Signature._of(text, text_key(text), None)


def parse_text(text: str) -> tuple[str, str, str, list[str]]:
    """(severity, error type, context, categories) of a canonical text.

    Raises:
        ValueError: it is none.
    """
    parts = text.split(":", 2)
    start = len(text)
    while len(parts) == 3:  # a context may hold anything, so the categories are read from the right
        start = text.rfind(":[", 0, start)
        head = len(parts[0]) + len(parts[1]) + 2
        if start < head:
            break
        if _CATEGORIES.fullmatch(text, start + 1):
            categories = [ast.literal_eval(category) for category in _CATEGORY.findall(text, start + 1)]
            return parts[0], parts[1], text[head:start], categories
    raise ValueError(f"no signature: {text!r}")


_CATEGORY = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\"""")
_CATEGORIES = re.compile(rf"\[(?:(?:{_CATEGORY.pattern})(?:, (?:{_CATEGORY.pattern}))*)?\]")

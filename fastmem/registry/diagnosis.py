"""What is wrong with a concept that is known: the signature of a failure, for real ones and for dreamed ones alike."""

from __future__ import annotations

import math
from typing import Any

from fastmem.registry.apply_fix import checked_concept
from fastmem.registry.taxonomy import ErrorSignature, ErrorType, create_signature

_PAIRS = (
    ("good", "bad"),
    ("true", "false"),
    ("more", "less"),
    ("all", "none"),
    ("same", "different"),
    ("help", "harm"),
    ("give", "take"),
    ("before", "after"),
    ("up", "down"),
    ("inside", "outside"),
)
OPPOSITE_PAIRS = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}


def diagnose(concept: dict[str, Any], found: dict[str, Any]) -> ErrorSignature | None:
    """The signature of what happened to a concept, or None where nothing did.

    The context is the concept's term, the categories are its own. The type is that of the first difference among
    categories, components, definition and elements (`apply_fix`, and ask again, where there are several). The delta,
    and with it the severity: of elements |sum before - sum after| / sum before, over absolute values; of the others,
    and of inversions, the share that was lost; at most 1.

    Raises:
        ValueError: one of the two is no concept, see `apply_fix`, or the known one has no term.
    """
    before, after = checked_concept(concept), checked_concept(found)
    term = concept.get("term")
    if not isinstance(term, str):  # all concepts without one would share their signatures
        raise ValueError(f'concept["term"]: expected a str, got {term!r}')
    error_type, delta = _difference(before, after)
    if error_type is None:
        return None
    return create_signature(error_type, term, before["categories"], min(1.0, delta))


def _difference(before: dict[str, Any], after: dict[str, Any]) -> tuple[ErrorType | None, float]:
    if set(before["categories"]) != set(after["categories"]):
        return ErrorType.STRUCTURAL_SWAP, _lost(before["categories"], after["categories"])
    if (before["components"] or []) != (after["components"] or []):
        return ErrorType.COMPONENT_REMOVAL, _lost(before["components"] or [], after["components"] or [])
    if (before["definition"] or "") != (after["definition"] or ""):
        whole, rest = len(before["definition"] or ""), len(after["definition"] or "")
        return ErrorType.PARTIAL_DEFINITION, max(0.0, 1 - rest / whole) if whole else 1.0
    old, new = before["activations"], after["activations"]
    missing, strange = old.keys() - new.keys(), new.keys() - old.keys()
    if missing and strange == {OPPOSITE_PAIRS.get(name) for name in missing}:
        return ErrorType.RELATIONSHIP_INVERSION, len(missing) / len(old)
    if strange:
        return ErrorType.SUBSTITUTION, _change(old, new)
    if missing:
        return ErrorType.REMOVAL, _change(old, new)
    if old != new:
        return ErrorType.INTENSITY_SHIFT, _change(old, new)
    return None, 0.0


def _lost(before: list[str], after: list[str]) -> float:
    return sum(item not in after for item in before) / len(before) if before else 1.0


def _change(before: dict[str, float], after: dict[str, float]) -> float:
    whole, rest = _size(before), _size(after)
    delta = abs(whole - rest) / whole if whole else 1.0
    return delta if math.isfinite(delta) else 1.0


def _size(activations: dict[str, float]) -> float:
    try:
        return math.fsum(map(abs, activations.values()))  # the same in any order
    except OverflowError:
        return math.inf

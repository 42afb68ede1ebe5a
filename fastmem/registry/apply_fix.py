"""Applying a fix to a concept."""

from __future__ import annotations

from typing import Any

from fastmem.registry.fix import Fix

ALL_OTHERS = "*"
"""In `elements_to_remove`: every element that `elements_to_add` does not name. As a key of `category_moves`: every
category that is neither a key nor a target there."""


def apply_fix(concept: dict[str, Any], fix: Fix) -> dict[str, Any]:
    """The concept with a fix applied; a new one, the given one stays as it is.

    A concept is a dict: "term" str, "activations" {element: value}, "categories" [str], and if it has them "definition"
    str and "components" [str]; other keys are kept.

    In this order: elements are removed (`ALL_OTHERS`: all that are not added), added with their values, and those that
    are there are set to their adjusted values; a category that is a key of `category_moves` becomes its target, and the
    targets that are missing are added, in their order; `definition_supplement` takes the place of a definition that is
    the same text with words missing (its last one may be cut short), and is put after any other that does not end with
    it already; `decomposition` becomes the components.

    Raises:
        TypeError: the arguments are no dict and Fix.
        ValueError: activations, categories, definition or components of another kind.
    """
    if not isinstance(concept, dict) or not isinstance(fix, Fix):
        raise TypeError(
            f"apply_fix: expected (concept dict, Fix), got ({type(concept).__name__}, {type(fix).__name__})"
        )
    parts = checked_concept(concept)
    fixed = dict(concept)
    activations = dict(parts["activations"])
    removed = set(fix.elements_to_remove)
    if ALL_OTHERS in removed:
        removed |= activations.keys() - fix.elements_to_add.keys()
    activations = {name: value for name, value in activations.items() if name not in removed} | fix.elements_to_add
    activations |= {name: value for name, value in fix.value_adjustments.items() if name in activations}
    if "activations" in concept or activations:
        fixed["activations"] = activations
    if fix.category_moves:
        fixed["categories"] = _moved(parts["categories"], fix.category_moves)
    if fix.definition_supplement is not None:
        fixed["definition"] = _completed(parts["definition"] or "", fix.definition_supplement)
    if fix.decomposition is not None:
        fixed["components"] = list(fix.decomposition)
    return fixed


def _moved(categories: list[str], moves: dict[str, str]) -> list[str]:
    targets = [to for of, to in moves.items() if of != ALL_OTHERS and to]
    known = [moves.get(category, category) for category in categories]
    if ALL_OTHERS in moves:
        known = [category if category in targets else moves[ALL_OTHERS] for category in known]
        known = targets + known
    return list(dict.fromkeys(category for category in [*known, *targets] if category))


def _completed(known: str, supplement: str) -> str:
    if not supplement or known.endswith(f" {supplement}"):
        return known
    *words, last = known.split() or [""]
    rest = iter(supplement.split())  # each search goes on where the one before ended
    if supplement.startswith(known) or (all(w in rest for w in words) and any(w.startswith(last) for w in rest)):
        return supplement
    return f"{known} {supplement}"


def checked_concept(concept: Any) -> dict[str, Any]:
    """The concept's "activations", "categories", "definition" and "components", empty or None where it has none.

    Raises:
        ValueError: no dict, or one of them of another kind.
    """
    if not isinstance(concept, dict):
        raise ValueError(f"concept: expected a dict, got {type(concept).__name__}")
    activations, categories = concept.get("activations", {}), concept.get("categories", [])
    definition, components = concept.get("definition"), concept.get("components")
    if not isinstance(activations, dict) or not all(
        isinstance(name, str) and isinstance(value, (int, float)) and not isinstance(value, bool)
        for name, value in activations.items()
    ):
        raise ValueError(f'concept["activations"]: expected {{element: number}}, got {activations!r}')
    for key, value in (("categories", categories), ("components", components or [])):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f'concept["{key}"]: expected a list of str, got {value!r}')
    if definition is not None and not isinstance(definition, str):
        raise ValueError(f'concept["definition"]: expected a str, got {definition!r}')
    return {
        "activations": activations,
        "categories": list(categories),
        "definition": definition,
        "components": None if components is None else list(components),
    }

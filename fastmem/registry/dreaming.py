"""Failures that have not happened yet: concepts are damaged on purpose, and the fixes are there before the failures."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastmem.registry.apply_fix import ALL_OTHERS, checked_concept
from fastmem.registry.diagnosis import OPPOSITE_PAIRS, diagnose
from fastmem.registry.fix import Fix, FixType
from fastmem.registry.fix_registry import FixRegistry
from fastmem.registry.taxonomy import ErrorSignature, ErrorType

REMOVAL_COUNTS = (1, 2, 3)
INTENSITY_SCALES = (0.3, 0.5, 0.7)  # of all elements
STRENGTH_MULTIPLIERS = (0.1, 0.5, 2.0, 5.0)  # of one element
TRUNCATION_RATIOS = (0.3, 0.5, 0.7)  # of a definition, what stays
COMPONENT_REMOVAL_RATIOS = (0.2, 0.4, 0.6)  # what goes
_DRAWS = 6  # of each constant

Concept = dict[str, Any]


@dataclass(frozen=True)
class SyntheticExample:
    """A dreamed failure.

    Attributes:
        original: the concept.
        corrupted: what became of it.
        error_signature: the signature that this failure has, by `diagnose`.
        fix: what brings the original back: `apply_fix(corrupted, fix) == original`.
        corruption_strategy: which strategy damaged it.
    """

    original: Concept
    corrupted: Concept
    error_signature: ErrorSignature
    fix: Fix
    corruption_strategy: str


class DreamGenerator:
    """Dreams failures of concepts, and registers their fixes.

    A signature has one fix, and many failures have one signature: whichever element was removed, the signature is the
    same. So a dreamed fix says what the concept is like (all elements with their values, all categories, ...), and
    mends every failure of its signature.

    Args:
        registry: where fixes are registered; None: nowhere. A signature that is known keeps the fix that it has, since
            what was learnt is worth more than what was dreamed.
        seed: of the choices; the same seed and calls give the same dreams.
    """

    STRATEGIES: ClassVar[list[str]] = [error_type.value for error_type in ErrorType]

    def __init__(self, registry: FixRegistry | None = None, seed: int = 0) -> None:
        self.registry = registry
        self._random = random.Random(seed)

    def dream(
        self, concept: Concept, strategies: Sequence[str] | None = None, variants_per_strategy: int = 3
    ) -> list[SyntheticExample]:
        """Damage a concept in several ways.

        Args:
            concept: see `apply_fix`; its term is its failures' context. A strategy that needs what the concept has not
                got (components, an element with an opposite) gives nothing. Without a definition the elements are what
                "partial" truncates, which has the signature of a removal, for nobody could tell the two apart.
            strategies: some of `STRATEGIES`; None: all.
            variants_per_strategy: the most examples of each; first one of each signature (they differ in severity),
                the likeliest first.

        Raises:
            ValueError: an unknown strategy, or no concept.
        """
        strategies = self.STRATEGIES if strategies is None else list(strategies)
        for name in strategies:
            if name not in _STRATEGIES:
                raise ValueError(f"strategies: expected some of {', '.join(self.STRATEGIES)}, got {name!r}")
        if (
            isinstance(variants_per_strategy, bool)
            or not isinstance(variants_per_strategy, int)
            or variants_per_strategy < 0
        ):
            raise ValueError(f"variants_per_strategy: expected 0 or more, got {variants_per_strategy!r}")
        parts = checked_concept(concept)
        if not all(map(math.isfinite, parts["activations"].values())):
            raise ValueError(f'concept["activations"]: expected finite numbers, got {parts["activations"]!r}')
        concept = {key: copy.copy(value) if key in parts else value for key, value in concept.items()}
        diagnose(concept, concept)  # raises where it has no term
        examples: list[SyntheticExample] = []
        for name in strategies:
            examples += self._variants(concept, parts, name, variants_per_strategy)
        if self.registry is not None:
            register_dreams(self.registry, examples)
        return examples

    def _variants(self, concept: Concept, parts: dict[str, Any], name: str, count: int) -> list[SyntheticExample]:
        candidates: dict[str, list[SyntheticExample]] = {}
        for changes in _STRATEGIES[name](parts, self._random):
            corrupted = {**concept, **changes}
            signature = diagnose(concept, corrupted)
            if signature is None:
                continue  # a change that changed nothing
            example = SyntheticExample(concept, corrupted, signature, _FIXES[signature.error_type](parts), name)
            candidates.setdefault(signature.text, []).append(example)
        queues = sorted(candidates.values(), key=len, reverse=True)
        for queue in queues:
            self._random.shuffle(queue)
        turns = max(map(len, queues), default=0)
        return [queue[turn] for turn in range(turns) for queue in queues if turn < len(queue)][:count]


def register_dreams(registry: FixRegistry, examples: Iterable[SyntheticExample]) -> None:
    """Register the examples' fixes; a signature that is known keeps the fix that it has."""
    new = {e.error_signature.text: e for e in examples if e.error_signature not in registry}
    registry.register_many([e.error_signature for e in new.values()], [e.fix for e in new.values()])


# ---- the strategies: how to damage a concept's parts


def _removal(parts: dict[str, Any], draw: random.Random) -> Iterator[Concept]:
    activations = parts["activations"]
    for count in REMOVAL_COUNTS:
        if count <= len(activations):
            for _ in range(_DRAWS):
                gone = draw.sample(list(activations), count)
                yield {"activations": {name: value for name, value in activations.items() if name not in gone}}


def _substitution(parts: dict[str, Any], draw: random.Random) -> Iterator[Concept]:
    activations = parts["activations"]
    for multiplier in (1.0, *STRENGTH_MULTIPLIERS):
        for name in draw.sample(list(activations), min(_DRAWS, len(activations))):
            changed = {other: value for other, value in activations.items() if other != name}
            yield {"activations": changed | {f"not {name}": activations[name] * multiplier}}


def _intensity(parts: dict[str, Any], draw: random.Random) -> Iterator[Concept]:
    activations = parts["activations"]
    for scale in INTENSITY_SCALES:
        yield {"activations": {name: value * scale for name, value in activations.items()}}
    for multiplier in STRENGTH_MULTIPLIERS:
        for name in draw.sample(list(activations), min(_DRAWS, len(activations))):
            yield {"activations": activations | {name: activations[name] * multiplier}}
        yield {"activations": {name: value * multiplier for name, value in activations.items()}}


def _structural(parts: dict[str, Any], draw: random.Random) -> Iterator[Concept]:
    categories = parts["categories"]
    if len({*categories} - {"", ALL_OTHERS}) < len(categories):
        return  # no fix can say these
    for count in range(1, len(categories) + 1):
        wrong = draw.sample(categories, count)
        yield {"categories": [f"not {name}" if name in wrong else name for name in categories]}


def _inversion(parts: dict[str, Any], draw: random.Random) -> Iterator[Concept]:
    activations = parts["activations"]
    invertible = [n for n in activations if n in OPPOSITE_PAIRS and OPPOSITE_PAIRS[n] not in activations]
    for count in range(1, len(invertible) + 1):
        turned = draw.sample(invertible, count)
        yield {"activations": {OPPOSITE_PAIRS[n] if n in turned else n: value for n, value in activations.items()}}


def _partial(parts: dict[str, Any], draw: random.Random) -> Iterator[Concept]:
    definition, elements = parts["definition"], list(parts["activations"].items())
    for ratio in (*TRUNCATION_RATIOS, 0.0):
        if definition:
            yield {"definition": definition[: int(len(definition) * ratio)].rstrip()}
        elif elements:
            yield {"activations": dict(elements[: int(len(elements) * ratio)])}


def _decomposition(parts: dict[str, Any], draw: random.Random) -> Iterator[Concept]:
    components = parts["components"] or []
    for ratio in (*COMPONENT_REMOVAL_RATIOS, 1.0):
        for _ in range(_DRAWS if components else 0):
            gone = draw.sample(range(len(components)), max(1, round(ratio * len(components))))
            yield {"components": [name for i, name in enumerate(components) if i not in gone]}


_STRATEGIES: dict[str, Callable[[dict[str, Any], random.Random], Iterator[Concept]]] = {
    "removal": _removal,
    "substitution": _substitution,
    "intensity": _intensity,
    "structural": _structural,
    "inversion": _inversion,
    "partial": _partial,
    "decomposition": _decomposition,
}


# ---- the fixes: for each type of error, what the concept's parts were


def _all_elements(parts: dict[str, Any], fix_type: FixType) -> Fix:
    return Fix(fix_type, elements_to_add=dict(parts["activations"]), elements_to_remove=[ALL_OTHERS])


_FIXES: dict[ErrorType, Callable[[dict[str, Any]], Fix]] = {
    ErrorType.REMOVAL: lambda parts: Fix(FixType.ADD_ELEMENTS, elements_to_add=dict(parts["activations"])),
    ErrorType.SUBSTITUTION: lambda parts: _all_elements(parts, FixType.SWAP_ELEMENTS),
    ErrorType.INTENSITY_SHIFT: lambda parts: Fix(FixType.ADJUST_VALUES, value_adjustments=dict(parts["activations"])),
    ErrorType.STRUCTURAL_SWAP: lambda parts: Fix(
        FixType.RESTORE_CATEGORY, category_moves={name: name for name in parts["categories"]} | {ALL_OTHERS: ""}
    ),
    ErrorType.RELATIONSHIP_INVERSION: lambda parts: _all_elements(parts, FixType.INVERT_RELATIONSHIP),
    ErrorType.PARTIAL_DEFINITION: lambda parts: Fix(
        FixType.COMPLETE_DEFINITION, definition_supplement=parts["definition"]
    ),
    ErrorType.COMPONENT_REMOVAL: lambda parts: Fix(FixType.DECOMPOSE, decomposition=list(parts["components"] or [])),
}

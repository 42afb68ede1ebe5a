"""Whether dreams anticipate failures: concepts are dreamed of, then damaged by other means, and looked up."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastmem.experiments.registry_command import Result, main, option, positive, table
from fastmem.registry import DreamGenerator, FixRegistry, apply_fix, diagnose
from fastmem.registry.diagnosis import OPPOSITE_PAIRS

# fmt: off
ELEMENTS = (
    "boundary", "inside", "outside", "center", "edge", "before", "after", "during", "start", "end", "hot", "cold",
    "fast", "slow", "big", "small", "up", "down", "left", "right", "near", "far", "good", "bad", "true", "false",
    "same", "different", "agent", "patient", "cause", "effect", "action", "more", "less", "all",
)
# fmt: on
CATEGORIES = ("spatial", "temporal", "physical", "cognitive", "relational", "abstract")
WORDS = ("thing", "holds", "another", "within", "walls", "until", "moved", "slowly", "towards", "some", "open", "place")
PARTS = ("lid", "base", "hinge", "frame", "handle", "seal", "spring", "bolt")


def _strategies(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


@dataclass(frozen=True)
class Config:
    """What `run` does; the help text of a field says what it is. A number that makes no sense is a ValueError."""

    concepts: int = option(50, "concepts")
    strategies: tuple[str, ...] = option(
        tuple(DreamGenerator.STRATEGIES), "what is dreamed of, and what fails", _strategies
    )
    variants: int = option(3, "dreams of each strategy")
    corruptions: int = option(20, "failures of each concept")
    seed: int = option(0, "concepts, dreams and failures, from three generators")

    def __post_init__(self) -> None:
        positive(self, "concepts", "variants", "corruptions")
        for name in self.strategies:
            if name not in FAILURES:
                raise ValueError(f"strategies: expected some of {', '.join(FAILURES)}, got {name!r}")


def run(config: Config) -> Result:
    """Share of failures that are looked up with success, and of those that the fix undoes exactly; beside it the same
    with fixes that were dreamed of the concept before, and with a registry that is empty. A failure that was dreamed of
    just as it is does not count."""
    make, fail = random.Random(f"concepts {config.seed}"), random.Random(f"failures {config.seed}")
    concepts = [_concept(number, make) for number in range(config.concepts)]
    registry = FixRegistry()
    dreamer = DreamGenerator(registry, seed=config.seed)
    dreams = [dreamer.dream(concept, list(config.strategies), config.variants) for concept in concepts]
    nothing = FixRegistry()
    counts = {name: {"failures": 0, "hits": 0, "restored": 0} for name in config.strategies}
    strangers = controls = dreamed = 0
    for number, concept in enumerate(concepts):
        known = [example.corrupted for example in dreams[number]]
        for _ in range(config.corruptions):
            name = fail.choice(config.strategies)
            found = FAILURES[name](concept, fail)
            signature = None if found is None else diagnose(concept, found)
            if found is None or signature is None:
                continue  # nothing of this kind to damage
            if found in known:
                dreamed += 1
                continue
            count = counts[name]
            count["failures"] += 1
            fix = registry.lookup(signature)
            if fix is not None:
                count["hits"] += 1
                count["restored"] += apply_fix(found, fix) == concept
            empty = nothing.lookup(signature)
            controls += empty is not None and apply_fix(found, empty) == concept
            other = diagnose(concepts[number - 1], found | {"term": concepts[number - 1]["term"]})
            stranger = None if other is None else registry.lookup(other)
            strangers += stranger is not None and apply_fix(found, stranger) == concept
    total = {key: sum(count[key] for count in counts.values()) for key in ("failures", "hits", "restored")}
    final = {
        "dreams": float(sum(map(len, dreams))),
        "entries": float(len(registry)),
        "failures": float(total["failures"]),
        "failures_left_out_as_dreamed": float(dreamed),
        "hit_rate": total["hits"] / max(1, total["failures"]),
        "restored_rate": total["restored"] / max(1, total["failures"]),
        "restored_rate_by_another_concept": strangers / max(1, total["failures"]),
        "restored_rate_without_dreams": controls / max(1, total["failures"]),
    }
    rows = []
    for name, count in counts.items():
        failures = max(1, count["failures"])
        final |= {f"{name}_hit_rate": count["hits"] / failures, f"{name}_restored_rate": count["restored"] / failures}
        rows.append(
            [name, str(count["failures"]), f"{count['hits'] / failures:.1%}", f"{count['restored'] / failures:.1%}"]
        )
    lines = [
        *table(["strategy", "failures", "hits", "restored"], rows),
        f"{final['dreams']:.0f} dreams, {len(registry)} fixes; {dreamed} failures left out, as they were dreamed of",
        f"of {total['failures']} others {final['hit_rate']:.1%} were hits, {final['restored_rate']:.1%} restored; by "
        f"fixes of another concept {final['restored_rate_by_another_concept']:.1%}, "
        f"without dreams {final['restored_rate_without_dreams']:.1%}",
    ]
    return Result(final, [{"strategy": name, **count} for name, count in counts.items()], lines)


def _concept(number: int, draw: random.Random) -> dict[str, Any]:
    elements = draw.sample(ELEMENTS, draw.randint(3, 6))
    return {
        "term": f"concept_{number}",
        "activations": {name: draw.uniform(0.5, 1.0) for name in elements},
        "categories": draw.sample(CATEGORIES, draw.randint(1, 3)),
        "definition": " ".join(draw.choices(WORDS, k=draw.randint(5, 15))),
        "components": draw.sample(PARTS, draw.randint(2, 6)),
    }


# ---- failures, by other numbers, values and names than the dreams; None: nothing to damage


def _remove(concept: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    activations = concept["activations"]
    gone = draw.sample(list(activations), draw.randint(1, len(activations) - 1))
    return concept | {"activations": {name: value for name, value in activations.items() if name not in gone}}


def _substitute(concept: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    activations = dict(concept["activations"])
    for name in draw.sample(list(activations), draw.randint(1, 2)):
        del activations[name]
        activations[f"stranger_{draw.randrange(10**6)}"] = draw.uniform(0.5, 1.0)
    return concept | {"activations": activations}


def _shift(concept: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    low, high = draw.choice(((0.15, 0.9), (0.6, 0.95), (1.1, 3.0)))
    return concept | {"activations": {n: v * draw.uniform(low, high) for n, v in concept["activations"].items()}}


def _misfile(concept: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    categories = list(concept["categories"])
    for place in draw.sample(range(len(categories)), draw.randint(1, len(categories))):
        categories[place] = f"wrong_{draw.randrange(10**6)}"
    return concept | {"categories": categories}


def _invert(concept: dict[str, Any], draw: random.Random) -> dict[str, Any] | None:
    activations = concept["activations"]
    can = [name for name in activations if name in OPPOSITE_PAIRS and OPPOSITE_PAIRS[name] not in activations]
    if not can:
        return None
    turned = draw.sample(can, draw.randint(1, len(can)))
    return concept | {"activations": {OPPOSITE_PAIRS[n] if n in turned else n: v for n, v in activations.items()}}


def _truncate(concept: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    definition = concept["definition"]
    return concept | {"definition": definition[: draw.randint(0, len(definition) - 1)]}


def _lose_parts(concept: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    components = concept["components"]
    kept = sorted(draw.sample(range(len(components)), draw.randint(0, len(components) - 1)))
    return concept | {"components": [components[place] for place in kept]}


FAILURES: dict[str, Callable[[dict[str, Any], random.Random], dict[str, Any] | None]] = {
    "removal": _remove,
    "substitution": _substitute,
    "intensity": _shift,
    "structural": _misfile,
    "inversion": _invert,
    "partial": _truncate,
    "decomposition": _lose_parts,
}


def command(arguments: list[str] | None = None) -> int:
    """`fastmem registry dream-coverage`; its exit status."""
    return main("dream-coverage", __doc__, Config, run, arguments)

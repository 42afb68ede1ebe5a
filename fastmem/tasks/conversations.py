"""Conversations that tell facts, correct them, and talk about other things; and the questions asked afterwards."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fastmem.tasks import facts
from fastmem.tasks.facts import Fact, Split


@dataclass(frozen=True)
class Turn:
    """What the user says; `value` is the part worth remembering, None in chatter, and `kind` what it is."""

    text: str
    kind: str | None = None
    value: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns in order, the facts that hold at the end, and the decay cycles until they are asked for."""

    turns: tuple[Turn, ...]
    facts: tuple[Fact, ...]
    gap: int = 0
    corrected: frozenset[str] = field(default_factory=frozenset)
    """Kinds that were told twice; the later value is the one in `facts`."""


def tell(fact: Fact) -> Turn:
    """The turn that tells a fact."""
    return Turn(fact.statement, fact.kind, fact.value)


def gap(rng: random.Random) -> int:
    """Decay cycles between telling and asking: mostly none or few, at times so many that the buffer is empty."""
    u = rng.random()
    if u < 0.5:
        return rng.randint(0, 2)
    return rng.randint(3, 20) if u < 0.75 else rng.randint(50, 200)


def draw(
    split: Split,
    rng: random.Random,
    *,
    num_facts: int,
    num_chatter: int = 0,
    correct: float = 0.0,
    invented: float = 0.0,
    held_out_kinds: bool = False,
    names: tuple[str, ...] | None = None,
    always_name: bool = False,
    chatter: Sequence[str] | None = None,
    tails: float = 0.0,
    casual: float = 0.0,
) -> Conversation:
    """A conversation about facts of different kinds in random order.

    Args:
        split: whose values and chatter.
        rng: source of randomness.
        num_facts: how many kinds are told.
        num_chatter: turns of chatter, put in anywhere.
        correct: probability for each fact that a later turn replaces its value.
        invented: probability that a value is a made-up word.
        held_out_kinds: take kinds that training never shows.
        names: first names to draw from; None: those of the split.
        always_name: make the user's name one of the facts.
        chatter: turns to draw chatter from; None: new ones of the split.
        tails: probability that a statement goes on after the value.
        casual: probability that a statement, or a question, is typed in haste.
    """
    kinds = list(facts.kinds(held_out=held_out_kinds))
    rng.shuffle(kinds)
    kinds = kinds[:num_facts]
    if always_name and "name" not in kinds:
        kinds[0] = "name"

    def value(kind: str) -> str:
        if names is not None and facts.pool_of(kind) == "first_name" and not rng.random() < invented:
            return rng.choice(names)
        return facts.draw_value(kind, split, rng, invented)

    rng.shuffle(kinds)
    told = [facts.fact(kind, value(kind), rng) for kind in kinds]
    turns = [tell(fact) for fact in told]
    final = {fact.kind: fact for fact in told}
    corrected = set()
    for fact in told:
        if rng.random() < correct:
            new = facts.fact(fact.kind, value(fact.kind), rng)
            if new.value == fact.value:
                continue
            text = facts.correction(new.value, rng) if fact.kind == "name" else new.statement
            after = next(i for i, turn in enumerate(turns) if turn.kind == fact.kind) + 1
            turns.insert(rng.randint(after, len(turns)), Turn(text, fact.kind, new.value))
            final[fact.kind] = new
            corrected.add(fact.kind)
    turns = [
        replace(turn, text=facts.with_tail(turn.text, rng)) if tails and rng.random() < tails else turn
        for turn in turns
    ]
    if casual:
        turns = [
            replace(turn, text=facts.casually(turn.text, turn.value or "")) if rng.random() < casual else turn
            for turn in turns
        ]
        for kind, fact in final.items():
            if rng.random() < casual:
                final[kind] = replace(fact, question=facts.casually(fact.question))
    for _ in range(num_chatter):
        text = facts.chatter(split, rng) if chatter is None else rng.choice(chatter)
        turns.insert(rng.randint(0, len(turns)), Turn(text))
    return Conversation(tuple(turns), tuple(final.values()), gap(rng), frozenset(corrected))

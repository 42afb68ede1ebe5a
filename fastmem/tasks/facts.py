"""Personal facts told in conversation and asked for later: the data of the LLM memory system.

Values of every pool are split between training and evaluation; nine kinds of facts are never trained on. First names
are those of the 1990 United States census (public domain).

Chance: an answer drawn from the evaluation values of a pool is right once in `len(Facts.values(pool, "eval"))` times.
Ceiling: 100 %, each question has one right answer.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

Split = Literal["train", "eval"]
NUM_EVAL_NAMES = 200
_SPLIT_SEED = 20260101  # fixed: which values are held out is part of the task, not of a run

_SYLLABLES = """
    ba be bo bren cha da dal de do fa fi ga go ha hi ka ki ko kru la le lo ma mar mi mo na ni no pa po qui ra ri ro sa
    se shi so ta te thas tho to va vel vi za zo zor
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Fact:
    """One fact: what is said, what may be asked, what the answer is."""

    kind: str
    value: str
    statement: str
    question: str
    answer: str


@cache
def data() -> dict[str, Any]:
    """The raw lists: pools of values, kinds of facts, phrasings, chatter."""
    return json.loads(files("fastmem").joinpath("data/facts.json").read_text(encoding="utf-8"))


@cache
def first_names() -> tuple[str, ...]:
    """5,163 first names, most frequent first."""
    return tuple(files("fastmem").joinpath("data/first_names.txt").read_text(encoding="utf-8").split())


@cache
def values(pool: str, split: Split) -> tuple[str, ...]:
    """Values of a pool that belong to a split. What evaluation holds out of one pool, training meets in none.

    The pool "word" is made of syllables and has no list: its training half is drawn by `invented_word`.
    """
    if split == "train":
        return tuple(v for v in _halves(pool)[1] if v.lower() not in held_out_values())
    return _halves(pool)[0]


@cache
def _halves(pool: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A pool's values for evaluation, and all the others."""
    if pool == "first_name":
        names = list(first_names())
        random.Random(_SPLIT_SEED).shuffle(names)
        return tuple(names[:NUM_EVAL_NAMES]), tuple(names[NUM_EVAL_NAMES:])
    if pool == "word":
        rng = random.Random(_SPLIT_SEED)
        words = sorted({invented_word(rng) for _ in range(4000)})
        rng.shuffle(words)
        return tuple(words[:200]), tuple(words[200:])
    pool_values = sorted(data()["pools"][pool])
    random.Random(f"{_SPLIT_SEED} {pool}").shuffle(pool_values)
    held_out = max(1, round(0.3 * len(pool_values)))
    return tuple(pool_values[:held_out]), tuple(pool_values[held_out:])


@cache
def held_out_values() -> frozenset[str]:
    """Every value of evaluation, of whatever pool, in lower case: no made-up word of training is one of them."""
    pools = (*data()["pools"], "first_name", "word")
    return frozenset(
        v.lower() for v in (*data()["unusual_names"], *(v for pool in pools for v in values(pool, "eval")))
    )


def invented_word(rng: random.Random) -> str:
    """A pronounceable word of two to four syllables that is in no dictionary."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4))).capitalize()


def kinds(*, held_out: bool = False) -> tuple[str, ...]:
    """Kinds of facts that training shows, or those that it never shows."""
    return tuple(data()["held_out_kinds" if held_out else "kinds"])


def fact(kind: str, value: str, rng: random.Random) -> Fact:
    """A fact of this kind and value, in phrasings drawn from the kind's lists."""
    entry = data()["kinds"].get(kind) or data()["held_out_kinds"][kind]
    return Fact(
        kind,
        value,
        rng.choice(entry["tell"]).format(value),
        rng.choice(entry["ask"]),
        entry["answer"].format(value),
    )


def pool_of(kind: str) -> str:
    """The pool that a kind's values come from."""
    entry = data()["kinds"].get(kind) or data()["held_out_kinds"][kind]
    return entry["pool"]


def draw_value(kind: str, split: Split, rng: random.Random, invented: float = 0.0) -> str:
    """A value for this kind; with probability `invented` a made-up word, so that copying is learnt, not a list."""
    if invented and rng.random() < invented:
        if split == "eval":
            return rng.choice(values("word", "eval"))
        word = invented_word(rng)
        while word.lower() in held_out_values():
            word = invented_word(rng)
        return word
    return rng.choice(values(pool_of(kind), split))


def with_tail(statement: str, rng: random.Random) -> str:
    """The statement with a clause after it that tells nothing: what follows a value is no part of it."""
    return f"{statement.rstrip('.!')} {rng.choice(data()['tails'])}."


def casually(text: str, value: str = "") -> str:
    """The text as typed in haste: no capital at the start unless `value` stands there, no full stop."""
    start = text[0] if value and text.startswith(value) else text[0].lower()
    return start + text[1:].rstrip(".!")


def correction(value: str, rng: random.Random) -> str:
    """A sentence that replaces the name told before."""
    return rng.choice(data()["correction"]).format(value)


def unrelated_prompts(split: Split) -> tuple[str, ...]:
    """Prompts that have nothing to do with the user: 100 for evaluation, the file's last, and 341 for training."""
    lines = files("fastmem").joinpath("data/unrelated_prompts.txt").read_text(encoding="utf-8").splitlines()
    return tuple(lines[:-100] if split == "train" else lines[-100:])


@cache
def impersonal_questions() -> dict[str, tuple[str, ...]]:
    """By pool: questions that ask for such a value, but not for the user's. They belong to training."""
    text = files("fastmem").joinpath("data/impersonal_questions.json").read_text(encoding="utf-8")
    return {pool: tuple(questions) for pool, questions in json.loads(text).items()}


def english_passages() -> tuple[str, ...]:
    """Twelve passages of plain English, for perplexity."""
    return tuple(files("fastmem").joinpath("data/english.txt").read_text(encoding="utf-8").strip().split("\n\n"))


def chatter(split: Split, rng: random.Random) -> str:
    """A turn that tells nothing about the user. Training and evaluation share no phrasing and no value."""
    template = rng.choice(data()["chatter" if split == "train" else "unseen_chatter"])
    while "{" in template:
        start, end = template.index("{"), template.index("}")
        pool = template[start + 1 : end]
        template = template[:start] + rng.choice(values(pool, split)) + template[end + 1 :]
    return template

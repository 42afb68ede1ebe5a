"""Conversations: what is true at the end is what was said last."""

import random

import pytest

from fastmem.tasks import conversations, facts

FULL = {"num_facts": 5, "num_chatter": 4, "correct": 0.5, "invented": 0.3}


def talks(split="train", count=100, seed=0, **changes):
    rng = random.Random(seed)
    return [conversations.draw(split, rng, **(FULL | changes)) for _ in range(count)]


def test_facts_are_those_told_last():
    corrected = 0
    for talk in talks():
        told = {}
        for turn in talk.turns:
            if turn.value is not None:
                assert turn.value in turn.text
                told.setdefault(turn.kind, []).append(turn.value)
        assert {fact.kind: fact.value for fact in talk.facts} == {kind: values[-1] for kind, values in told.items()}
        assert talk.corrected == {kind for kind, values in told.items() if len(values) == 2}
        assert all(len(set(values)) == len(values) for values in told.values())
        assert sum(turn.value is None for turn in talk.turns) == 4 and len(talk.facts) == 5
        corrected += len(talk.corrected)
    assert 0.35 < corrected / 500 < 0.55  # half, less those that drew the same value again


@pytest.mark.parametrize("held_out", [False, True])
def test_training_and_evaluation_share_no_value(held_out):
    def values(split, **changes):
        found = {}
        for talk in talks(split, 300, correct=0.3, **changes):
            for turn in talk.turns:
                if turn.value is not None:
                    found.setdefault(facts.pool_of(turn.kind), set()).add(turn.value)
        return found

    train, held = values("train"), values("eval", held_out_kinds=held_out)
    assert len(train) > 5 and len(held) > 3
    for pool, some in held.items():
        assert not some & train.get(pool, set()), pool
        assert some <= {*facts.values(pool, "eval"), *facts.values("word", "eval")}, pool


def test_held_out_kinds_are_only_told_when_asked_for():
    def kinds(**changes):
        return {fact.kind for talk in talks("eval", **changes) for fact in talk.facts}

    assert kinds() <= set(facts.kinds()) and kinds(held_out_kinds=True) == set(facts.kinds(held_out=True))


def test_names_and_chatter_can_be_given():
    for talk in talks(names=("Ada", "Bo"), always_name=True, invented=0.0, chatter=["Well."], num_facts=1):
        assert talk.facts[0].kind == "name" and talk.facts[0].value in ("Ada", "Bo")
        assert {turn.text for turn in talk.turns if turn.value is None} == {"Well."}


def test_gaps_are_short_or_so_long_that_the_buffer_is_empty():
    rng = random.Random(0)
    gaps = [conversations.gap(rng) for _ in range(2000)]
    assert min(gaps) == 0 and max(gaps) <= 200
    assert 0.45 < sum(g <= 2 for g in gaps) / 2000 < 0.55
    assert 0.2 < sum(g >= 50 for g in gaps) / 2000 < 0.3


def test_the_seed_says_everything():
    assert talks(seed=1) == talks(seed=1) != talks(seed=2)

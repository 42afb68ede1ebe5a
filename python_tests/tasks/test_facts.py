"""Training and evaluation share nothing that could be learnt by heart."""

import random
import re

import pytest

from fastmem.tasks import facts

POOLS = (*facts.data()["pools"], "first_name", "word")
ENTRIES = {kind: entry for part in ("kinds", "held_out_kinds") for kind, entry in facts.data()[part].items()}


def plain(text):
    """What is left of a phrasing without case and punctuation."""
    return " ".join(re.sub(r"[^a-z{} ]", " ", text.lower()).split())


def phrasings(part, which):
    return {plain(text) for entry in facts.data()[part].values() for text in entry[which]}


@pytest.mark.parametrize("pool", POOLS)
def test_values_never_overlap(pool):
    train, held_out = facts.values(pool, "train"), facts.values(pool, "eval")
    assert train and held_out
    assert not {v.lower() for v in train} & {v.lower() for v in held_out}
    assert len(set(train)) == len(train) and len(set(held_out)) == len(held_out)
    assert not {v.lower() for v in train} & facts.held_out_values()  # what one pool holds out, no other one shows
    if pool in facts.data()["pools"]:
        left_out = set(facts.data()["pools"][pool]) - set(train + held_out)
        assert {v.lower() for v in left_out} <= facts.held_out_values() and len(left_out) <= 2


def test_names():
    train, held_out = facts.values("first_name", "train"), facts.values("first_name", "eval")
    assert len(held_out) == facts.NUM_EVAL_NAMES and len(train) == 4939
    left_out = set(facts.first_names()) - set(train + held_out)
    assert len(left_out) == 24 and {"April", "Sydney"} <= left_out  # a month and a city of evaluation


def test_no_word_that_training_makes_up_is_held_out():
    rng = random.Random(0)
    made_up = {facts.draw_value("name", "train", rng, invented=1.0).lower() for _ in range(60_000)}
    listed = {word.lower() for word in facts.values("word", "train")}
    assert len(made_up) > 20_000
    for pool in POOLS:
        held_out = {v.lower() for v in facts.values(pool, "eval")}
        assert not made_up & held_out, pool
        assert not listed & held_out, pool
    assert not made_up & {name.lower() for name in facts.data()["unusual_names"]}
    # The filter is what keeps them apart: the syllables alone do give held-out names.
    raw = {facts.invented_word(rng).lower() for _ in range(60_000)}
    assert raw & {v.lower() for v in facts.values("first_name", "eval")}


def test_what_evaluation_makes_up_is_held_out():
    rng = random.Random(0)
    held_out = set(facts.values("word", "eval"))
    assert {facts.draw_value("password", "eval", rng, invented=1.0) for _ in range(200)} <= held_out


def test_unusual_names_are_not_in_the_training_list():
    unusual = facts.data()["unusual_names"]
    assert len(set(unusual)) == len(unusual) >= 100
    assert not {n.lower() for n in unusual} & {n.lower() for n in facts.values("first_name", "train")}


def test_kinds_never_overlap():
    train, held_out = facts.kinds(), facts.kinds(held_out=True)
    assert len(held_out) >= 5 and not set(train) & set(held_out)
    for which in ("tell", "ask"):
        assert not phrasings("kinds", which) & phrasings("held_out_kinds", which)


@pytest.mark.parametrize(("unseen", "which"), [("unseen_tell", "tell"), ("unseen_ask", "ask")])
def test_unseen_phrasings_are_unseen(unseen, which):
    new = [plain(text) for text in facts.data()[unseen]]
    assert len(set(new)) == 20
    seen = phrasings("kinds", which) | {plain(text) for text in facts.data()["correction"]}
    assert not set(new) & seen


def test_chatter_and_prompts_never_overlap():
    d = facts.data()
    assert not set(map(plain, d["chatter"])) & set(map(plain, d["unseen_chatter"]))
    train, held_out = facts.unrelated_prompts("train"), facts.unrelated_prompts("eval")
    assert (len(train), len(held_out)) == (341, 100) and not set(map(plain, train)) & set(map(plain, held_out))
    assert len(facts.english_passages()) == 12


def test_casual_text_keeps_the_value():
    assert facts.casually("My name is Sarah.", "Sarah") == "my name is Sarah"
    assert facts.casually("Sarah is my name!", "Sarah") == "Sarah is my name"
    assert facts.casually("Who am I?") == "who am I?"


def test_impersonal_questions_belong_to_training():
    by_pool = facts.impersonal_questions()
    assert set(by_pool) == {facts.pool_of(kind) for kind in facts.kinds()}
    questions = [plain(q) for questions in by_pool.values() for q in questions]
    assert len(set(questions)) == len(questions) > 100
    assert not set(questions) & set(map(plain, facts.unrelated_prompts("eval")))


def test_chatter_uses_the_values_of_its_split():
    pools = {p for t in facts.data()["unseen_chatter"] for p in re.findall(r"\{(\w+)\}", t)}
    assert pools
    forbidden = {v for pool in pools for v in facts.values(pool, "train")}
    allowed = {v for pool in pools for v in facts.values(pool, "eval")}
    templates = [re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(t)) for t in facts.data()["unseen_chatter"]]
    rng = random.Random(0)
    for _ in range(300):
        turn = facts.chatter("eval", rng)
        assert "{" not in turn
        found = [m.groups() for m in (re.fullmatch(t, turn) for t in templates) if m]
        assert any(set(values) <= allowed - (forbidden - allowed) for values in found), turn


@pytest.mark.parametrize("kind", ENTRIES)
def test_every_kind_says_its_value_once_and_never_in_the_question(kind):
    entry = ENTRIES[kind]
    assert entry["pool"] in POOLS
    for text in (*entry["tell"], entry["answer"]):
        assert text.count("{}") == 1
    for seed in range(20):
        rng = random.Random(seed)
        fact = facts.fact(kind, facts.draw_value(kind, "eval", rng), rng)
        assert fact.value in fact.statement and fact.value in fact.answer
        assert not re.search(rf"\b{re.escape(fact.value)}\b", fact.question)


def test_the_seed_says_everything():
    def some(seed):
        rng = random.Random(seed)
        return [facts.draw_value("name", "train", rng, 0.3) for _ in range(50)] + [facts.chatter("eval", rng)]

    assert some(1) == some(1) != some(2)

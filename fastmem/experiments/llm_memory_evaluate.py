"""`fastmem memory evaluate`: what the trained memory recalls, against controls that cannot remember.

Every answer is a greedy generate() of the whole model. It is right when it is one sentence that ends in the value asked
for, such as "Your name is Sarah."; nothing else counts.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastmem.experiments import results
from fastmem.experiments.llm_memory_train import base_replies
from fastmem.experiments.memory_speed import generation_speed, loop_speed
from fastmem.experiments.memory_telling import Teller
from fastmem.models.base_model import fast_dtype, load_base
from fastmem.models.chat import ChatFormat
from fastmem.models.memory_augmented_model import PACKAGED_ADAPTER, find_checkpoint
from fastmem.models.memory_model import MemoryModel
from fastmem.nn._checks import check_count
from fastmem.tasks import conversations, facts
from fastmem.tasks.conversations import Conversation, Turn
from fastmem.tasks.facts import Fact

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Measure every bar of the LLM memory and print mean and standard deviation over the seeds."""

    json: Path | None = None
    """Results file, replaced if it is there; None: the numbers are printed only."""
    model: str = "smollm2"
    """Base model: "smollm2" (offline), or a Hugging Face name or folder."""
    checkpoints: tuple[Path, ...] = (PACKAGED_ADAPTER,)
    """Adapters, folders or quoted globs: one for all seeds, or one for each."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run each; a seed draws who says what in which words."""
    num_names: int = 200
    """Held-out names, 2 to 200."""
    num_conversations: int = 20
    """Conversations of ten facts, and those with distractors."""
    distractors: int = 200
    """Turns between telling and asking."""
    dtype: str = "auto"
    """Type of the base: float32, bfloat16, or auto, the faster one here."""
    device: str = "cpu"
    """cpu or cuda."""
    batch: int = 50
    """Prompts answered at once."""

    def __post_init__(self) -> None:
        for name in ("num_names", "num_conversations", "batch"):
            check_count(name, getattr(self, name))
        if not 2 <= self.num_names <= 200:
            raise ValueError(f"num_names: expected 2 to 200, got {self.num_names}")
        if self.distractors < 0:
            raise ValueError(f"distractors: expected at least 0, got {self.distractors}")
        if not self.seeds:
            raise ValueError("seeds: expected at least one")
        if len(self.checkpoints) not in (1, len(self.seeds)):
            raise ValueError(
                f"checkpoints: expected one, or one per seed ({len(self.seeds)}), got {len(self.checkpoints)}"
            )


def is_right(answer: str, value: str) -> bool:
    """Whether an answer is one sentence that ends in the value."""
    return re.fullmatch(r"Your [\w' ]+? (?:the |a )?" + re.escape(value) + r"( Street)?\.?", answer.strip()) is not None


class Bench:
    """One adapter on one base, and how it is told and asked."""

    def __init__(self, model: MemoryModel, chat: ChatFormat, batch: int) -> None:
        self.model, self.chat, self.batch = model, chat, batch
        self.teller = Teller(model, chat)

    @torch.no_grad()
    def answers(self, questions: Sequence[str], sessions: Sequence[str] | None, length: int = 16) -> list[str]:
        """Greedy answers; sessions None: the base without memory."""
        out: list[str] = []
        for i in range(0, len(questions), self.batch):
            batch = self.chat.batch(list(questions[i : i + self.batch])).to(self.model.device)
            arguments: dict[str, Any] = {
                "input_ids": batch.input_ids,
                "attention_mask": batch.attention_mask,
                "max_new_tokens": length,
                "do_sample": False,
                "pad_token_id": self.chat.pad,
            }
            if sessions is None:
                with self.model.disable_memory():
                    said = self.model.generate(**arguments)
            else:
                said = self._with_shared_sessions(arguments, list(sessions[i : i + self.batch]))
            out += self.chat.tokenizer.batch_decode(said[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        return out

    def _with_shared_sessions(self, arguments: dict[str, Any], sessions: list[str]) -> Any:
        """Several questions to one session are asked of read-only copies of it."""
        memory = self.model.memory
        copies = [f"{name}#{i}" for i, name in enumerate(sessions)]
        for name, copy in zip(sessions, copies, strict=True):
            if name in memory:
                memory.copy(name, copy)
        try:
            return self.model.generate(**arguments, sessions=copies, update_memory=False)
        finally:
            for copy in copies:
                if copy in memory:
                    memory.clear(copy)

    def tell(self, talks: Sequence[Conversation], prefix: str = "s") -> list[str]:
        """Tell conversations to fresh sessions; returns their names."""
        names = [f"{prefix}{i}" for i in range(len(talks))]
        for i in range(0, len(talks), self.batch):
            self.teller.tell(names[i : i + self.batch], [t.turns for t in talks[i : i + self.batch]])
        return names

    def score(self, asked: Sequence[tuple[str, Fact]]) -> float:
        """Share of (session, fact) questions answered right."""
        said = self.answers([f.question for _, f in asked], [s for s, _ in asked])
        return statistics.fmean(is_right(a, f.value) for a, (_, f) in zip(said, asked, strict=True))


def told(fact: Fact) -> Conversation:
    """A conversation of the one turn that tells a fact."""
    return Conversation((conversations.tell(fact),), (fact,))


def named(
    names: Sequence[str], rng: random.Random, tell: Sequence[str] = (), ask: Sequence[str] = ()
) -> list[Conversation]:
    """Each name told once; in the phrasings given, in turn, or those of training."""
    out = []
    for i, name in enumerate(names):
        fact = facts.fact("name", name, rng)
        if tell:
            fact = Fact(
                "name", name, tell[i % len(tell)].format(name), ask[(i // len(tell) + i) % len(ask)], fact.answer
            )
        out.append(told(fact))
    return out


def recall_names(bench: Bench, config: Config, checkpoint: Path, seed: int) -> dict[str, float]:
    """Names told, memory saved; another process loads it and is asked. Then the controls."""
    rng = random.Random(f"{seed} names")
    names = rng.sample(facts.values("first_name", "eval"), config.num_names)
    talks = named(names, rng)
    questions = [t.facts[0].question for t in talks]
    sessions = bench.tell(talks)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.safetensors"
        bench.model.memory.save(path, sessions)
        job = {"config": asdict(config), "checkpoint": checkpoint, "memory": path, "questions": questions}
        (Path(folder) / "job.json").write_text(json.dumps(job, default=str))
        child = subprocess.run(
            [sys.executable, "-m", "fastmem.experiments.llm_memory_evaluate", str(Path(folder) / "job.json")],
            capture_output=True,
            text=True,
        )
        if child.returncode:
            raise RuntimeError(f"the recalling process failed: {child.stderr[-500:]}")
        said = json.loads(child.stdout.splitlines()[-1])
    out = {"name": _share(said, names)}
    swapped = sessions[1:] + sessions[:1]
    others = names[1:] + names[:1]
    said = bench.answers(questions, swapped)
    out["other_session_own_name"], out["other_session_its_name"] = _share(said, names), _share(said, others)
    bench.model.memory.clear()
    out["cleared"] = _share(bench.answers(questions, sessions), names)
    return out


def _share(said: Sequence[str], values: Sequence[str]) -> float:
    return statistics.fmean(is_right(a, v) for a, v in zip(said, values, strict=True))


def answer_job(path: Path) -> list[str]:
    """What the second process does: load the model and the memory, answer."""
    job = json.loads(path.read_text())
    config = job["config"]
    bench = open_bench(config["model"], Path(job["checkpoint"]), config["dtype"], config["device"], config["batch"])
    sessions = bench.model.memory.load(job["memory"])
    return bench.answers(job["questions"], sessions)


def open_bench(model: str, checkpoint: Path, dtype: str, device: str, batch: int) -> Bench:
    """Load base and adapter."""
    base, tokenizer = load_base(model, fast_dtype(device) if dtype == "auto" else getattr(torch, dtype), device)
    return Bench(MemoryModel.from_pretrained(base, checkpoint), ChatFormat(tokenizer), batch)


def phrasings(bench: Bench, config: Config, seed: int) -> dict[str, float]:
    """Phrasings that training never showed; names unlike its list."""
    rng = random.Random(f"{seed} phrasings")
    names = rng.sample(facts.values("first_name", "eval"), config.num_names)
    tell, ask = facts.data()["unseen_tell"], facts.data()["unseen_ask"]
    out = {}
    for metric, talks in {
        "unseen_phrasing": named(names, rng, rng.sample(tell, len(tell)), rng.sample(ask, len(ask))),
        "unusual_name": named(facts.data()["unusual_names"], rng),
    }.items():
        sessions = bench.tell(talks)
        out[metric] = bench.score([(s, t.facts[0]) for s, t in zip(sessions, talks, strict=True)])
        bench.model.memory.clear()
    return out


def corrections(bench: Bench, config: Config, seed: int) -> dict[str, float]:
    """The latest name wins: corrected at once, or with chatter and other facts between and after."""
    rng = random.Random(f"{seed} corrections")
    names = facts.values("first_name", "eval")
    out = {}
    for metric, other in (("corrected_at_once", 0), ("corrected_after_turns", 3)):
        talks = []
        for _ in range(config.num_names // 2):
            first, second = rng.sample(names, 2)
            old, new = facts.fact("name", first, rng), facts.fact("name", second, rng)
            turns = [conversations.tell(old)]
            kinds = [k for k in facts.kinds() if k != "name"]
            for group in range(2):
                for _ in range(other):
                    kind = rng.choice(kinds)
                    fact = facts.fact(kind, facts.draw_value(kind, "eval", rng), rng)
                    turns.append(rng.choice([conversations.tell(fact), Turn(facts.chatter("eval", rng))]))
                if group == 0:
                    turns.append(Turn(facts.correction(second, rng), "name", second))
            talks.append(Conversation(tuple(turns), (new,)))
        sessions = bench.tell(talks)
        out[metric] = bench.score([(s, t.facts[0]) for s, t in zip(sessions, talks, strict=True)])
        bench.model.memory.clear()
    return out


def ten_facts(bench: Bench, config: Config, seed: int) -> dict[str, float]:
    """Ten facts of different kinds in one conversation, each asked; then the nine kinds that training never showed."""
    rng = random.Random(f"{seed} ten facts")
    out = {}
    for metric, held_out, number in (("ten_facts", False, 10), ("held_out_kinds", True, 9)):
        talks = [
            conversations.draw("eval", rng, num_facts=number, held_out_kinds=held_out)
            for _ in range(config.num_conversations)
        ]
        sessions = bench.tell(talks)
        asked = [(s, f) for s, t in zip(sessions, talks, strict=True) for f in t.facts]
        out[metric] = bench.score(asked)
        said = bench.answers([f.question for _, f in asked], None)
        out[f"{metric}_base"] = _share(said, [f.value for _, f in asked])
        bench.model.memory.clear()
    return out


def distractors(bench: Bench, config: Config, seed: int) -> dict[str, float]:
    """A name and two facts, then many turns about other things; beside a ring of the latest tokens of the same size."""
    rng = random.Random(f"{seed} distractors")
    talks = []
    for _ in range(config.num_conversations):
        talk = conversations.draw("eval", rng, num_facts=3, always_name=True)
        chatter = tuple(Turn(facts.chatter("eval", rng)) for _ in range(config.distractors))
        talks.append(Conversation(talk.turns + chatter, talk.facts))
    sessions = bench.tell(talks)
    asked = [(s, f) for s, t in zip(sessions, talks, strict=True) for f in t.facts]
    out = {"distractors": bench.score(asked)}
    bench.model.memory.clear()
    bench.teller.tell_ring(sessions, [t.turns for t in talks])
    out["distractors_ring"] = bench.score(asked)
    bench.model.memory.clear()
    return out


CYCLES = (0, 1, 2, 5, 10, 20, 40, 80, 120, 200)


def decay(bench: Bench, config: Config, seed: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Recall of names after decay cycles from the buffer alone, and after the most from both tiers."""
    rng = random.Random(f"{seed} decay")
    names = rng.sample(facts.values("first_name", "eval"), min(50, config.num_names))
    talks = named(names, rng)

    def recall(cycles: int, store: bool) -> tuple[float, int]:
        sessions = bench.tell(talks)
        if not store:
            bench.teller.empty_store(sessions)
        bench.model.memory.decay(cycles)
        right = bench.score([(s, t.facts[0]) for s, t in zip(sessions, talks, strict=True)])
        layers = bench.model.memory.inspect(sessions[0])["layers"]
        bench.model.memory.clear()
        return right, sum(x["buffer"]["live"] for x in layers)

    history: list[dict[str, Any]] = []
    for cycles in CYCLES:
        right, live = recall(cycles, store=False)
        history.append({"cycles": cycles, "buffer_only": right, "live_buffer_slots": live})
    series = [row["buffer_only"] for row in history]
    return {
        "decay_monotone": float(all(a >= b for a, b in itertools.pairwise(series))),
        "decay_200_live_buffer_slots": float(history[-1]["live_buffer_slots"]),
        "decay_200_buffer_only": series[-1],
        "decay_200_both": recall(CYCLES[-1], store=True)[0],
    }, history


@torch.no_grad()
def perplexity(run: Callable[[torch.Tensor], torch.Tensor], bench: Bench) -> float:
    """exp of the mean cross-entropy per token of the English passages, by run(input_ids) -> logits."""
    total, count = 0.0, 0
    for text in facts.english_passages():
        ids = torch.tensor([bench.chat.tokenizer(text)["input_ids"]], device=bench.model.device)
        logits = run(ids)[0, :-1].float()
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return float(torch.tensor(total / count).exp())


@torch.no_grad()
def harmless(bench: Bench, config: Config, seed: int, replies: list[tuple[str, str]]) -> dict[str, float]:
    """What memory changes where it has nothing to say: perplexity, and answers to unrelated prompts."""
    model = bench.model

    def base(ids: torch.Tensor) -> torch.Tensor:
        return model.base(input_ids=ids).logits

    def reading(session: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda ids: model(input_ids=ids, sessions=[session], update_memory=False).logits

    with model.disable_memory():
        plain = perplexity(base, bench)
        sample = torch.tensor([bench.chat.tokenizer(facts.english_passages()[0])["input_ids"]], device=model.device)
        switched_off = base(sample)
    rng = random.Random(f"{seed} harmless")
    empty = perplexity(reading("nobody"), bench)
    talks = []
    for _ in range(4):
        talk = conversations.draw("eval", rng, num_facts=10, always_name=True)
        chatter = tuple(Turn(facts.chatter("eval", rng)) for _ in range(60))
        more = conversations.draw("eval", rng, num_facts=9, held_out_kinds=True)
        talks.append(Conversation(chatter + talk.turns + more.turns, talk.facts + more.facts))
    sessions = bench.tell(talks)
    full = statistics.fmean(perplexity(reading(s), bench) for s in sessions[:1])
    prompts = [p for p, _ in replies]
    said = bench.answers(prompts, [sessions[i % len(sessions)] for i in range(len(prompts))], length=24)
    values = [{f.value for f in talks[i % len(talks)].facts} for i in range(len(prompts))]
    intruded = [
        any(re.search(rf"\b{re.escape(v)}\b", a) and not re.search(rf"\b{re.escape(v)}\b", p + reply) for v in vs)
        for a, vs, (p, reply) in zip(said, values, replies, strict=True)
    ]
    same = statistics.fmean(a.strip() == reply.strip() for a, (_, reply) in zip(said, replies, strict=True))
    reply_ratio = bench.teller.reply_perplexity(replies, sessions) / bench.teller.reply_perplexity(replies, None)
    model.memory.clear()
    without_hooks = model.unload()(input_ids=sample).logits
    model.attach()
    return {
        "perplexity_base": plain,
        "perplexity_empty_ratio": empty / plain,
        "perplexity_full_ratio": full / plain,
        "disabled_identical": float(torch.equal(switched_off, without_hooks)),
        "unrelated_reply_perplexity_ratio": reply_ratio,
        "unrelated_same_answer": same,
        "unrelated_intrusions": float(sum(intruded)),
    }


def run(config: Config) -> dict[str, Any]:
    """Measure everything, print it, write the results file if one is asked for, and return what would be in it.

    Raises:
        OSError: if the file cannot be written; an older one is intact, and the numbers are printed.
    """
    started = time.perf_counter()
    runs, bench, opened, replies = [], None, None, None
    for i, seed in enumerate(config.seeds):
        checkpoint = find_checkpoint(config.checkpoints[i % len(config.checkpoints)])
        if bench is None or opened != checkpoint:
            bench, opened = open_bench(config.model, checkpoint, config.dtype, config.device, config.batch), checkpoint
        if replies is None:
            replies = base_replies(bench.model, bench.chat, facts.unrelated_prompts("eval"))
        final: dict[str, float] = {}
        history: list[dict[str, Any]] = []
        parts: dict[str, Callable[[], dict[str, float]]] = {
            "names": lambda b=bench, c=checkpoint, s=seed: recall_names(b, config, c, s),  # type: ignore[misc]
            "phrasings": lambda b=bench, s=seed: phrasings(b, config, s),  # type: ignore[misc]
            "corrections": lambda b=bench, s=seed: corrections(b, config, s),  # type: ignore[misc]
            "ten facts": lambda b=bench, s=seed: ten_facts(b, config, s),  # type: ignore[misc]
            "distractors": lambda b=bench, s=seed: distractors(b, config, s),  # type: ignore[misc]
            "harmless": lambda b=bench, s=seed, r=replies: harmless(b, config, s, r),  # type: ignore[misc]
        }
        for name, part in parts.items():
            final |= part()
            log.info("seed %d, %s: %s", seed, name, " ".join(f"{k} {v:.4g}" for k, v in final.items()))
        values, history = decay(bench, config, seed)
        final |= values
        final |= generation_speed(bench.model, bench.chat) | loop_speed()
        log.info("seed %d: %s", seed, final)
        runs.append(results.Run(seed, final, history))
    assert bench is not None
    meta = results.meta(
        device=config.device,
        dtype=next(bench.model.base.parameters()).dtype,
        backend={"topk_attention": "auto", "gated_write": "auto"},
        wall_s=time.perf_counter() - started,
        chance={"names": 1 / config.num_names, "months": 1 / 4, "cities": 1 / 24},  # a guess among held-out values
        ceiling=1.0,
    )
    content = results.build(
        {
            "model": {"base": config.model, **asdict(bench.model.config)},
            "task": {k: v for k, v in asdict(config).items() if k not in ("json", "checkpoints")},
            "training": _training_of(find_checkpoint(config.checkpoints[0])),
        },
        runs,
        meta,
    )
    print("\n".join(summary(content)))
    if config.json is not None:
        results.write_json(config.json, content)
        print(f"results in {config.json}")
    return content


def summary(content: dict[str, Any]) -> list[str]:
    """Mean and standard deviation of every metric of a results file, as lines of text."""
    found = content["aggregate"]
    lines = [f"{'metric':36} {'mean':>10} {'deviation':>10}   ({found['num_runs']} seeds)"]
    for metric in content["runs"][0]["final"]:
        shown = (found[f"{metric}_{part}"] for part in ("mean", "std"))
        lines.append(f"{metric:36} " + " ".join(f"{'-' if x is None else f'{x:.4g}':>10}" for x in shown))
    return lines


def _training_of(checkpoint: Path) -> dict[str, Any]:
    """How the adapter was made, from the file beside it."""
    path = checkpoint / "training.json"
    return json.loads(path.read_text()) if path.is_file() else {"checkpoint": checkpoint.name}


if __name__ == "__main__":
    print(json.dumps(answer_job(Path(sys.argv[1]))))

"""`fastmem memory embedding`: the dual memory alone, on embeddings, without a language model.

A name is told, repeated, corrected, and asked for after decay. Words are embedded by hashing their character n-grams
(no model, no download), so a word is close to words that share letters and to nothing else: what is shown here is what
the memory does, not that anything is understood. The state at a word is a fading sum of the words so far; the layer
stores each word under the state before it, and the question ends as the statements do. The store's internal model
learns from every turn, so what has been said again and again no longer surprises it, and the correction does.
"""

from __future__ import annotations

import re
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmem.experiments import results
from fastmem.models.sessions import Sessions
from fastmem.nn import DualMemoryLayer, DualMemoryState, MemoryConfig

WIDTH = 256
FADING = 0.5  # how much of the state before goes into the state at a word
STEPS, RATE = 10, 0.01  # how long, and how fast, the internal model learns from a turn
SESSION = "experiment"
INTRODUCTION, CORRECTION, QUESTION = "Hello! My name is {}", "No, that is wrong, my name is {}", "Remember: my name is"
REINFORCEMENT = ("My name is {}", "As I said, my name is {}", "You know that my name is {}", "Yes, my name is {}")
CHATTER = ("The weather is nice today", "Which train goes to the sea?", "I had soup and bread for lunch")
OTHERS = ("Robert", "Yuki", "Giulia", "Thabo", "Ingrid")
START = "<start>"


@dataclass(frozen=True)
class Config:
    """Reinforce a name, correct it, let decay cycles pass, and see what the memory gives back; no language model."""

    interactive: bool = False
    """Ask for names, turns and cycles (also -i)."""
    initial_name: str = "Alice"
    """Name to reinforce."""
    corrected_name: str = "Sarah"
    """Name that replaces it."""
    reinforcement_turns: int = 5
    """Repetitions before the correction."""
    decay_cycles: int = 10
    """Decay cycles between the conversations."""
    output_dir: Path = Path("experiment_results")
    """Where embedding_experiment_results_*.json goes."""
    save_memory: Path | None = None
    """File to keep the memory in afterwards."""
    load_memory: Path | None = None
    """Memory file to begin with."""
    auto_save: bool = False
    """Keep the memory in the output directory afterwards."""
    seed: int = 0
    """Seed of the projections; memories of another seed cannot be loaded."""

    def __post_init__(self) -> None:
        for name in ("reinforcement_turns", "decay_cycles"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("initial_name", "corrected_name"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: expected a name, got none")
        if self.initial_name == self.corrected_name:
            raise ValueError(f"corrected_name: expected another name than {self.initial_name}")


def embed(word: str) -> Tensor:
    """(WIDTH,) of mean square 1: signed hashes of the word's character 2- to 4-grams; case does not count."""
    x, text = torch.zeros(WIDTH), f"<{word.lower()}>"
    for n in (2, 3, 4):
        for i in range(len(text) - n + 1):
            code = zlib.crc32(text[i : i + n].encode())
            x[code % WIDTH] += 1.0 if code >> 31 else -1.0
    return F.rms_norm(x, (WIDTH,), eps=1e-6)


def split(text: str, name: str = "") -> list[str]:
    """The words of a turn; a name is one of them, however it is written."""
    return re.findall(r"\w+", text) + ([name] if name else [])


class EmbeddingMemory:
    """One memory layer, its memory, and an internal model that learns from each turn."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        config = MemoryConfig(hidden_dim=WIDTH, memory_dim=WIDTH, buffer_slots=64, store_slots=16)
        self.layer = DualMemoryLayer(config)
        with torch.no_grad():  # keys and queries are the same rotation of a state; what is read comes out as it is
            nn.init.orthogonal_(self.layer.key_proj.weight)
            self.layer.key_proj.bias.zero_()
            self.layer.attention.q_proj.load_state_dict(self.layer.key_proj.state_dict())
            self.layer.attention.out_gain.fill_(0.1)
        sizes = {"memory_layer_positions": [0], "hidden_dim": WIDTH, "memory_dim": WIDTH, "made_by": "embedding"}
        self.memory = Sessions(nn.ModuleList([self.layer]), sizes)
        self._optimizer = torch.optim.Adam(self.layer.store.parameters(), RATE)

    def state(self, words: list[str]) -> tuple[Tensor, Tensor]:
        """Contexts (1, T, WIDTH), the state before each word, and values (1, T, WIDTH), the words themselves."""
        values = torch.stack([embed(word) for word in words])
        states = [embed(START)]
        for value in values:
            states.append(FADING * states[-1] + value)
        return self.layer.normalise(torch.stack(states[:-1]))[None], values[None]

    def _held(self) -> DualMemoryState:
        return self.memory.states_of(SESSION)[0] if SESSION in self.memory else self.layer.empty(1)

    @torch.no_grad()
    def tell(self, words: list[str]) -> dict[str, Any]:
        """Store a turn and learn from it; the surprise of its last word, and whether that was stored for long."""
        contexts, values = self.state(words)
        state, written = self.layer.write(self.layer.decay(self._held()), contexts, values)
        self.memory.put([SESSION], [state])
        with torch.enable_grad():
            for _ in range(STEPS):
                self._optimizer.zero_grad()
                self.layer.store.surprise(contexts, values).square().mean().backward()
                self._optimizer.step()
        last = {"surprise": written.store.surprise, "threshold": written.store.threshold}
        return {k: round(x[0, -1].item(), 4) for k, x in last.items()} | {
            "stored": bool(written.store.slot[0, -1] >= 0)
        }

    @torch.no_grad()
    def recall(self, question: list[str], *, empty: bool = False) -> Tensor:
        """(WIDTH,) what memory adds where the question ends; `empty`: a memory that holds nothing."""
        contexts, _ = self.state([*question, "?"])
        view = self.layer.view(self.layer.empty(1) if empty else self._held())
        x = contexts[:, -1:]
        return (self.layer.read(x, view) - x)[0, 0]

    def strengths(self) -> dict[str, list[float]]:
        """Strengths of the live slots, strongest first."""
        if SESSION not in self.memory:
            return {"buffer": [], "store": []}
        layer = self.memory.inspect(SESSION)["layers"][0]
        return {part: sorted(layer[part]["strength"], reverse=True) for part in ("buffer", "store")}


def run(config: Config) -> dict[str, Any]:
    """Run the phases, print them, write the results file, and return what is in it.

    Raises:
        ValueError: if the memory to load is damaged or of another seed.
        OSError: if a file cannot be read or written.
    """
    if config.interactive:
        config = ask(config)
    started = time.perf_counter()
    memory, phases = EmbeddingMemory(config.seed), []

    def phase(name: str, text: str | None = None, told: str = "", *, empty: bool = False) -> dict[str, Any]:
        row: dict[str, Any] = {"phase": name}
        if text is not None:
            row["text"] = text.format(told)
            row |= memory.tell(split(text.format(""), told))
        recalled = memory.recall(split(QUESTION), empty=empty)
        row["similarity"] = {
            name: round(F.cosine_similarity(recalled, embed(name), dim=0).item(), 4)
            for name in (config.initial_name, config.corrected_name)
        }
        row["similarity"]["other names"] = round(
            max(F.cosine_similarity(recalled, embed(other), dim=0).item() for other in OTHERS), 4
        )
        row["strength"] = {"buffer": [], "store": []} if empty else memory.strengths()
        phases.append(row)
        print(_line(row))
        return row

    if config.load_memory is not None:
        memory.memory.load(config.load_memory)
        phase("loaded")
    phase("introduction", INTRODUCTION, config.initial_name)
    for i, text in enumerate(CHATTER):
        phase(f"chatter {i + 1}", text)
    reinforced = [
        phase(f"reinforcement {i + 1}", REINFORCEMENT[i % len(REINFORCEMENT)], config.initial_name)
        for i in range(config.reinforcement_turns)
    ]
    before = phase("recall")
    correction = phase("correction", CORRECTION, config.corrected_name)
    corrected = phase("recall after the correction")
    if SESSION in memory.memory:
        memory.memory.decay(config.decay_cycles, SESSION)
    later = phase(f"recall after {config.decay_cycles} decay cycles")
    control = phase("control: no memory", empty=True)

    for path in (config.save_memory, _auto_path(config)):
        if path is not None:
            memory.memory.save(path)
            print(f"memory kept in {path}")
    first, second = config.initial_name, config.corrected_name
    final = {
        "initial_before_correction": before["similarity"][first],
        "corrected_after_correction": corrected["similarity"][second],
        "initial_after_correction": corrected["similarity"][first],
        "corrected_after_decay": later["similarity"][second],
        "corrected_without_memory": control["similarity"][second],
        "surprise_correction": correction["surprise"],
        "strongest_buffer_after_decay": max(later["strength"]["buffer"], default=0.0),
        "strongest_store_after_decay": max(later["strength"]["store"], default=0.0),
    }
    if reinforced:
        final["surprise_last_reinforcement"] = reinforced[-1]["surprise"]
    path = config.output_dir / f"embedding_experiment_results_{time.strftime('%Y%m%d_%H%M%S')}.json"
    content = results.write(
        path,
        {
            "model": {"embedding": "hashed character n-grams", **asdict(memory.layer.config)},
            "task": asdict(config),
            "training": {"steps_per_turn": STEPS, "learning_rate": RATE, "what": "the store's internal model"},
        },
        [results.Run(config.seed, final, phases)],
        results.meta(
            device="cpu",
            dtype=torch.float32,
            backend="auto",
            wall_s=time.perf_counter() - started,
            chance=max(F.cosine_similarity(embed(other), embed(second), dim=0).item() for other in OTHERS),
            ceiling=1.0,
        ),
    )
    print(f"results in {path}")
    return content


def _auto_path(config: Config) -> Path | None:
    return config.output_dir / f"embedding_{time.strftime('%Y%m%d_%H%M%S')}.memory" if config.auto_save else None


def _line(row: dict[str, Any]) -> str:
    said = f"  surprise {row['surprise']:.2f}{' stored' if row['stored'] else ''}" if "surprise" in row else ""
    similarity = "  ".join(f"{name} {x:+.2f}" for name, x in row["similarity"].items())
    return f"{row['phase']:30} recalled: {similarity}{said}"


def ask(config: Config) -> Config:
    """The configuration, each of its main numbers asked for; an empty line keeps it.

    Raises:
        ValueError: if an answer is no number, or out of range.
    """
    values: dict[str, Any] = {}
    for name in ("initial_name", "corrected_name", "reinforcement_turns", "decay_cycles"):
        now = getattr(config, name)
        answer = input(f"{name.replace('_', ' ')} [{now}]: ").strip()
        if not answer:
            continue
        if isinstance(now, int):
            try:
                values[name] = int(answer)
            except ValueError:
                raise ValueError(f"{name}: expected a number, got {answer!r}") from None
        else:
            values[name] = answer
    return Config(**{**{f: getattr(config, f) for f in config.__dataclass_fields__}, **values})

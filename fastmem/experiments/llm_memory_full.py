"""`fastmem memory simple` and `full`: is a name recalled when the context is gone, corrected, and decayed?"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastmem.experiments import results
from fastmem.experiments.llm_memory import open_model
from fastmem.models import MemoryAugmentedModel
from fastmem.models.memory_augmented_model import TIERS

INTRODUCTION, CORRECTION, QUESTION = (
    "Hello! My name is {}. Please remember my name.",
    "No, I am {}.",
    "What is my name?",
)
SESSION = "experiment"


@dataclass(frozen=True)
class Config:
    """Tell a name, correct it, let decay cycles pass, ask in a new conversation."""

    interactive: bool = False
    """Chat instead (also -i)."""
    simple: bool = False
    """Only tell, drop the context, ask (also -s)."""
    model: str = "smollm2"
    """Base model: "smollm2" (offline), or a Hugging Face name or folder."""
    checkpoint: str | None = None
    """Trained adapter, a folder or a glob such as ./checkpoints/best_step*; None: the packaged one of smollm2."""
    memory_layers: str | None = None
    """Blocks after which memory stands, such as "3,6,9"; None: the checkpoint's."""
    initial_name: str = "Alice"
    """Name told first."""
    corrected_name: str = "Sarah"
    """Name that replaces it."""
    decay_cycles: int = 10
    """Decay cycles between the conversations."""
    output_dir: Path = Path("experiment_results")
    """Where llm_experiment_results_*.json and llm_experiment_*.log go (full)."""
    dtype: str = "auto"
    """Type of the base: float32, bfloat16, float16 or auto (bfloat16 on a GPU)."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        if self.decay_cycles < 0:
            raise ValueError(f"decay_cycles: expected at least 0, got {self.decay_cycles}")
        for name in ("initial_name", "corrected_name"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: expected a name, got none")


def run(config: Config) -> int:
    """Run the experiment; the exit status, 0 if the name was recalled."""
    print(f"loading {config.model} ...", file=sys.stderr)
    model = open_model(config.model, config.checkpoint, config.memory_layers, config.dtype, config.device)
    if config.interactive:
        from fastmem.experiments.llm_memory_chat import interact

        return interact(model)
    return simple(model, config) if config.simple else full(model, config)


def says(answer: str, name: str) -> bool:
    """Whether an answer has this name in it, as a word of its own."""
    return re.search(rf"(?<!\w){re.escape(name.strip())}(?!\w)", answer, re.IGNORECASE) is not None


def simple(model: MemoryAugmentedModel, config: Config) -> int:
    """Tell, drop the context, ask; then clear the memory and ask again. 0 if recalled."""
    told = INTRODUCTION.format(config.initial_name)
    print(f"told:     {told}")
    answer, info = model.generate(told, session=SESSION)
    print(f"answered: {answer}")
    print(f"stored:   {info['written']['buffer']} buffer slots, {info['written']['store']} store slots")
    print("the context is gone; the memory stays")
    answer, _ = model.generate(QUESTION, update_memory=False, session=SESSION)
    recalled = says(answer, config.initial_name)
    print(f"asked:    {QUESTION}")
    print(f"answered: {answer}")
    model.clear_memory(SESSION)
    control, _ = model.generate(QUESTION, update_memory=False, session=SESSION)
    print(f"the memory is cleared\nanswered: {control}")
    print("recalled" if recalled else "not recalled")
    return 0 if recalled else 1


class _Experiment:
    """Phases, printed and logged as they run."""

    def __init__(self, model: MemoryAugmentedModel, log: Path) -> None:
        self.model = model
        self.log = log
        self.phases: list[dict[str, Any]] = []
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("", encoding="utf-8")

    def say(self, text: str) -> None:
        print(text)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def phase(self, name: str, text: str | None, *, update: bool, expected: str | None = None) -> dict[str, Any]:
        """One turn (text None: none) and what memory holds after it."""
        self.say(f"\n== {name}")
        row: dict[str, Any] = {"phase": name}
        if text is not None:
            answer, info = self.model.generate(text, update_memory=update, session=SESSION)
            row |= {"prompt": text, "answer": answer, "info": info}
            self.say(f"user:  {text}\nmodel: {answer}")
            for token, surprise in info["surprising"]:
                self.say(f"  surprise {surprise:6.3f}  {token!r}")
        if expected is not None:
            row |= {"expected": expected, "recalled": says(row["answer"], expected)}
            self.say(f"expected {expected}: {'recalled' if row['recalled'] else 'not recalled'}")
        row["memory"] = self._memory()
        self.say("memory: " + ", ".join(f"{row['memory'][t]['live']} live {t} slots" for t in TIERS))
        self.phases.append(row)
        return row

    def _memory(self) -> dict[str, Any]:
        memory = self.model.model.memory
        if SESSION not in memory:
            return {tier: {"live": 0, "mean_strength": None} for tier in TIERS}
        layers = memory.inspect(SESSION)["layers"]
        out = {}
        for tier in TIERS:
            strength = [s for layer in layers for s in layer[tier]["strength"]]
            out[tier] = {
                "live": len(strength),
                "slots": sum(layer[tier]["slots"] for layer in layers),
                "mean_strength": sum(strength) / len(strength) if strength else None,
                "live_by_layer": {str(layer["position"]): layer[tier]["live"] for layer in layers},
            }
        return out | {"held": self.model.held(SESSION, 5)}


def full(model: MemoryAugmentedModel, config: Config) -> int:
    """All phases; writes the results file and the log. 0 if the corrected name is recalled in the new conversation."""
    started = time.perf_counter()
    stamp = time.strftime("%Y%m%d_%H%M%S")
    experiment = _Experiment(model, config.output_dir / f"llm_experiment_{stamp}.log")
    first, second = config.initial_name, config.corrected_name
    experiment.phase("introduction", INTRODUCTION.format(first), update=True)
    before = experiment.phase("recall", QUESTION, update=False, expected=first)
    experiment.phase("correction", CORRECTION.format(second), update=True)
    corrected = experiment.phase("recall after the correction", QUESTION, update=False, expected=second)
    model.decay(config.decay_cycles, SESSION)
    experiment.phase(f"{config.decay_cycles} decay cycles", None, update=False)
    later = experiment.phase("recall in a new conversation", QUESTION, update=False, expected=second)
    model.clear_memory(SESSION)
    control = experiment.phase("control: memory cleared", QUESTION, update=False, expected=second)
    final = {
        "initial_recalled": float(before["recalled"]),
        "corrected_recalled": float(corrected["recalled"]),
        "recalled_after_decay": float(later["recalled"]),
        "initial_after_correction": float(says(later["answer"], first)),
        "recalled_when_cleared": float(control["recalled"]),
    }
    base: torch.nn.Module = model.model.base
    path = config.output_dir / f"llm_experiment_results_{stamp}.json"
    results.write(
        path,
        {
            "model": {"base": config.model, "checkpoint": model.config.checkpoint, **asdict(model.model.config)},
            "task": {
                "initial_name": first,
                "corrected_name": second,
                "decay_cycles": config.decay_cycles,
                "session": SESSION,
            },
            "training": {},
        },
        [results.Run(0, final, experiment.phases)],
        results.meta(
            device=model.model.device,
            dtype=next(base.parameters()).dtype,
            backend="auto",
            wall_s=time.perf_counter() - started,
            chance=0.0,
            ceiling=1.0,
        ),
    )
    experiment.say(
        f"\n{'recalled' if later['recalled'] else 'not recalled'}; results in {path}, log in {experiment.log}"
    )
    return 0 if later["recalled"] else 1

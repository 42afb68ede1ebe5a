"""`fastmem memory train`: train memory layers on a frozen language model, on tell, forget, ask."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmem._files import atomic_files, atomic_write
from fastmem.experiments.memory_training import (
    MemoryTrainer,
    Question,
    calibration_texts,
    chatter_pool,
    draw_training_conversation,
)
from fastmem.models.base_model import check_device, fast_dtype, load_base
from fastmem.models.chat import ChatFormat
from fastmem.models.memory_augmented_model import find_checkpoint
from fastmem.models.memory_model import ADAPTER_WEIGHTS, MemoryModel, hidden_size
from fastmem.nn import MemoryConfig
from fastmem.tasks import conversations, facts

log = logging.getLogger(__name__)
STATE = "training_state"


@dataclass(frozen=True)
class TrainingConfig:
    """Train the memory layers of a frozen language model."""

    model: str = "smollm2"
    """Base model: "smollm2" (offline), or a Hugging Face name or folder."""
    lr: float = 1e-3
    """Learning rate of the matrices; scalars learn ten times as fast."""
    epochs: int = 2
    """Passes over `num_train` conversations."""
    batch_size: int = 16
    """Conversations in a batch."""
    grad_accum: int = 1
    """Batches in an optimiser step."""
    eval_every: int = 50
    """Evaluate every so many steps."""
    save_every: int = 200
    """Save a checkpoint every so many steps."""
    checkpoint_dir: Path = Path("checkpoints")
    """Where checkpoints and training_history.json go."""
    resume: Path | None = None
    """Checkpoint to go on from; the numbers are those of a run that never stopped."""
    init: Path | None = None
    """Adapter (a folder or quoted glob) to begin with instead of calibrated layers; what it lacks begins as new."""
    memory_layers: str | None = None
    """Blocks after which memory stands, such as "13,20,27"; None: at 45, 69 and 93 % of the depth."""
    num_train: int = 4800
    """Conversations in an epoch."""
    num_train_names: int = 4939
    """First names that training draws from, at most 4,939."""
    num_val: int = 50
    """Held-out conversations in an evaluation."""
    weight_decay: float = 0.01
    """AdamW's weight decay of the matrices."""
    warmup_steps: int = 30
    """Steps of linear warm-up; a cosine takes the rate down to a tenth."""
    max_grad_norm: float = 1.0
    """Gradient norm at which gradients are clipped."""
    seed: int = 0
    """Seed of initialisation and of the conversations."""
    dtype: str = "auto"
    """Type of the frozen base: float32, bfloat16, or auto, the faster one here. Memory is float32."""
    device: str = "auto"
    """auto, cpu or cuda."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Sizes and rates of the memory; hidden_dim follows the base."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "grad_accum", "eval_every", "save_every", "num_train", "num_val"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("lr", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected a number from 0 on, got {self.weight_decay}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: expected at least 0, got {self.warmup_steps}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype: expected auto, float32 or bfloat16, got {self.dtype!r}")

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return max(1, self.epochs * self.num_train // (self.batch_size * self.grad_accum))


def new_model(config: TrainingConfig, base: Any, chat: ChatFormat) -> MemoryModel:
    """Memory layers on the base, calibrated on training texts."""
    torch.manual_seed(config.seed)
    positions = None if config.memory_layers is None else tuple(int(p) for p in config.memory_layers.split(","))
    memory = asdict(config.memory) | {"hidden_dim": hidden_size(base)}
    if positions is not None:
        memory["memory_layer_positions"] = positions
    model = MemoryModel(base, MemoryConfig(**memory))
    texts = calibration_texts(random.Random(f"{config.seed} calibration"))
    batch = chat.batch(texts, suffix=False).to(model.device)
    hidden, _ = model.record(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for layer, x in zip(model.memory_layers, hidden, strict=True):
        layer.calibrate(x[batch.user].float())
    return model


def begin_with(model: MemoryModel, folder: Path) -> None:
    """Take over the weights of an adapter of the same sizes.

    Raises:
        ValueError: if there is none, or it does not fit.
    """
    from safetensors.torch import load

    folder = find_checkpoint(folder)
    try:
        weights = load((folder / ADAPTER_WEIGHTS).read_bytes())
        model.layers.load_state_dict({name: x.float() for name, x in weights.items()}, strict=False)
    except Exception as error:
        raise ValueError(f"{folder}: no adapter to begin with ({type(error).__name__}: {error})") from None


@torch.no_grad()
def base_replies(
    model: MemoryModel, chat: ChatFormat, prompts: tuple[str, ...], length: int = 24
) -> list[tuple[str, str]]:
    """What the base itself says to each prompt, greedily."""
    out = []
    for i in range(0, len(prompts), 50):
        batch = chat.batch(list(prompts[i : i + 50])).to(model.device)
        with model.disable_memory():
            said = model.base.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=length,
                do_sample=False,
                pad_token_id=chat.pad,
            )
        texts = chat.tokenizer.batch_decode(said[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        out += list(zip(prompts[i : i + 50], texts, strict=True))
    return out


@torch.no_grad()
def validate(trainer: MemoryTrainer, num: int, seed: int) -> dict[str, float]:
    """Exact answers to questions on held-out values, teacher-forced, which is what greedy decoding would say.

    One name alone; five facts; five facts of kinds never trained on; five facts one of which was corrected (the
    corrected ones count); each with chatter in between.
    """
    was_training = trainer.training
    trainer.eval()
    rng = random.Random(f"{seed} validation")
    out = {}
    settings: dict[str, dict[str, Any]] = {
        "name": {"num_facts": 1, "always_name": True},
        "facts": {"num_facts": 5, "num_chatter": 3},
        "held_out_kinds": {"num_facts": 5, "num_chatter": 3, "held_out_kinds": True},
        "corrected": {"num_facts": 4, "num_chatter": 2, "correct": 0.5, "always_name": True},
    }
    for name, setting in settings.items():
        talks = [conversations.draw("eval", rng, **setting) for _ in range(num)]
        right: list[float] = []
        for i in range(0, num, 16):
            some = talks[i : i + 16]
            states, _ = trainer.tell(some)
            questions = [
                Question(f.question, f.answer, owner)
                for owner, talk in enumerate(some)
                for f in talk.facts
                if name != "corrected" or f.kind in talk.corrected
            ]
            if questions:
                right += trainer.ask(questions, states, False)[1].tolist()
        out[name] = sum(right) / max(1, len(right))
    trainer.train(was_training)
    return out


def unrelated_prompts() -> tuple[str, ...]:
    """Prompts of training that nothing stored should change the reply to."""
    impersonal = (question for questions in facts.impersonal_questions().values() for question in questions)
    return (*facts.unrelated_prompts("train"), *impersonal)


def known_replies(file: Path, model: str) -> list[tuple[str, str]] | None:
    """The replies that an earlier run kept, if they are this model's."""
    try:
        kept = json.loads(file.read_text())
        return [(prompt, reply) for prompt, reply in kept["replies"]] if kept["model"] == model else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _flat_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    flat = {}
    for i, state in optimizer.state_dict()["state"].items():
        for key, x in state.items():
            flat[f"optimizer.{i}.{key}"] = torch.as_tensor(x).detach().cpu().contiguous()
    return flat


def save_checkpoint(
    folder: Path, model: MemoryModel, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    """Adapter, optimiser state and progress: the whole folder or none of it; an older one stays until then."""
    from safetensors.torch import save

    new, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    for left_over in (new, old):
        shutil.rmtree(left_over, ignore_errors=True)
    files = {f"{STATE}.safetensors": save(_flat_optimizer(optimizer)), f"{STATE}.json": json.dumps(progress).encode()}
    try:
        model.save_pretrained(new)
        atomic_files(new, files)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path, model: MemoryModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint back into a model and an optimiser; returns the progress.

    Raises:
        ValueError: if there is no complete checkpoint.
    """
    from safetensors.torch import load

    try:
        flat = load((folder / f"{STATE}.safetensors").read_bytes())
        progress = json.loads((folder / f"{STATE}.json").read_text())
        weights = load((folder / ADAPTER_WEIGHTS).read_bytes())
    except Exception as error:
        raise ValueError(f"{folder}: not a training checkpoint ({type(error).__name__}: {error})") from None
    model.layers.load_state_dict(weights)
    state: dict[int, dict[str, Tensor]] = {}
    for name, x in flat.items():
        _, i, key = name.split(".")
        state.setdefault(int(i), {})[key] = x
    entry = optimizer.state_dict()
    entry["state"] = state
    optimizer.load_state_dict(entry)
    return progress


def make_optimizer(model: MemoryModel, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, scalars and vectors learn ten times as fast and do not."""
    scalars = [p for p in model.layers.parameters() if p.numel() <= 2 * model.config.num_heads]
    small = {id(p) for p in scalars}
    matrices = [p for p in model.layers.parameters() if id(p) not in small]
    groups = [
        {"params": matrices, "lr": config.lr, "weight_decay": config.weight_decay, "peak": config.lr},
        {"params": scalars, "lr": 10 * config.lr, "weight_decay": 0.0, "peak": 10 * config.lr},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def rate(step: int, config: TrainingConfig) -> float:
    """Learning rate at a step (1 the first) as a share of its peak."""
    warm = min(1.0, step / max(1, config.warmup_steps))
    return warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / config.steps)))


def train(config: TrainingConfig) -> dict[str, Any]:
    """Train, and return the history that training_history.json holds.

    Runs under `accelerate launch` as well: each process draws its own conversations.
    """
    from accelerate import Accelerator

    if config.device != "auto":
        check_device(config.device)
    folder = config.checkpoint_dir
    folder.mkdir(parents=True, exist_ok=True)  # what is in the way is seen before anything is computed
    accelerator = Accelerator(cpu=config.device == "cpu")
    dtype = fast_dtype(accelerator.device) if config.dtype == "auto" else getattr(torch, config.dtype)
    base, tokenizer = load_base(config.model, dtype, accelerator.device)
    chat = ChatFormat(tokenizer)
    model = new_model(config, base, chat)
    replies_file = folder / "base_replies.json"
    replies = known_replies(replies_file, config.model)
    if replies is None:
        replies = base_replies(model, chat, unrelated_prompts())
        if accelerator.is_main_process:
            atomic_write(replies_file, json.dumps({"model": config.model, "replies": replies}).encode())
    if config.init is not None:
        begin_with(model, config.init)
    trainer = MemoryTrainer(model, chat, replies)
    optimizer = make_optimizer(model, config)
    history: list[dict[str, Any]] = []
    best, first_step = -1.0, 1
    if config.resume is not None:
        progress = load_checkpoint(config.resume, model, optimizer)
        history, best, first_step = progress["history"], progress["best"], progress["step"] + 1
    wrapped, optimizer = accelerator.prepare(trainer, optimizer)
    wrapped.train()
    names = facts.values("first_name", "train")[: config.num_train_names]
    chatter = chatter_pool(random.Random(f"{config.seed} chatter"))
    trainer.reader.learn(chatter)  # all at once: rounding depends on what passes the base together, resumed or not
    started = time.perf_counter()

    def progress_at(step: int) -> dict[str, Any]:
        return {"step": step, "best": best, "history": history, "config": _jsonable(config)}

    for step in range(first_step, config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(step, config)
        row: dict[str, Any] = {"step": step}
        for micro in range(config.grad_accum):
            rng = random.Random(f"{config.seed} {step} {micro} {accelerator.process_index}")
            talks = [draw_training_conversation(rng, names, chatter) for _ in range(config.batch_size)]
            terms = wrapped(talks, rng)
            accelerator.backward(terms["loss"] / config.grad_accum)
            for name, x in terms.items():
                row[name] = row.get(name, 0.0) + x.item() / config.grad_accum
        if not math.isfinite(row["loss"]):
            raise RuntimeError(f"training diverged at step {step}: loss {row['loss']}")
        row["grad_norm"] = float(accelerator.clip_grad_norm_(model.layers.parameters(), config.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
        if step % config.eval_every == 0 or step == config.steps:
            row |= {f"val_{k}": v for k, v in validate(trainer, config.num_val, config.seed).items()}
        history.append(row)
        if accelerator.is_main_process:
            if step % 10 == 0 or "val_name" in row:
                per_step = (time.perf_counter() - started) / (step - first_step + 1)
                log.info("%s", " ".join(f"{k} {v:.3g}" for k, v in row.items()) + f" s/step {per_step:.2f}")
            if "val_name" in row:
                score = sum(v for k, v in row.items() if k.startswith("val_")) / 4
                if score > best:
                    best = score
                    _replace_best(folder, step, model, optimizer, progress_at(step))
                atomic_write(folder / "training_history.json", json.dumps(history, indent=1).encode())
            if step % config.save_every == 0:
                save_checkpoint(folder / f"checkpoint_step{step}", model, optimizer, progress_at(step))
    if accelerator.is_main_process:
        save_checkpoint(folder / f"final_step{config.steps}", model, optimizer, progress_at(config.steps))
    accelerator.end_training()
    return {"history": history, "best": best}


def _replace_best(
    folder: Path, step: int, model: MemoryModel, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    old = list(folder.glob("best_step*"))
    save_checkpoint(folder / f"best_step{step}", model, optimizer, progress)
    for other in old:
        if other.name != f"best_step{step}":
            shutil.rmtree(other)


def _jsonable(config: TrainingConfig) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config), default=str))

"""`fastmem memory demo`: told in one process, recalled in another; correction, another user, forgetting; kernels."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastmem import _system
from fastmem.experiments.llm_memory import find_adapter, open_model
from fastmem.experiments.llm_memory_chat import table
from fastmem.experiments.llm_memory_full import says
from fastmem.models import MemoryAugmentedModel, MemoryDirectory
from fastmem.ops.gated_write import Bank, gated_write
from fastmem.ops.topk_attention import topk_attention

TOLD = {
    "alice": (
        "Hello! My name is Alice. Please remember my name.",
        "I live in Lisbon.",
        "My dog's name is Biscuit.",
        "My favorite color is green.",
    ),
    "bob": ("Hi, I am Robert.", "I work as a carpenter."),
}
ASKED = (
    ("What is my name?", "Alice"),
    ("Where do I live?", "Lisbon"),
    ("What is my dog's name?", "Biscuit"),
    ("What is my favorite color?", "green"),
)
CYCLES = (0, 20, 40, 140)  # 200 in all


@dataclass(frozen=True)
class Config:
    """A conversation told in one process and recalled in another, with correction, another user and forgetting."""

    model: str = "smollm2"
    """Base model: "smollm2" (offline), or a Hugging Face name or folder."""
    checkpoint: str | None = None
    """Trained adapter, a folder or a glob such as ./checkpoints/best_step*; None: the packaged one of smollm2."""
    dtype: str = "auto"
    """Type of the base: float32, bfloat16, float16 or auto (bfloat16 on a GPU)."""
    device: str = "auto"
    """auto, cpu or cuda."""
    skip_kernels: bool = False
    """Leave out the timing of kernels against PyTorch."""


def run(config: Config) -> int:
    """The whole demo; 0 whatever the model answered, which is printed."""
    find_adapter(config.model, config.checkpoint)  # what is missing is said before the first process starts
    with tempfile.TemporaryDirectory(prefix="fastmem-demo-") as folder:
        store = Path(folder)
        _title("1. A first process is told")
        _tell(config, store)
        _title("2. A second process is asked: no context, the memory alone")
        print("loading ...", flush=True)
        demo = Demo(open_model(config.model, config.checkpoint, None, config.dtype, config.device), store)
        demo.recall()
        demo.correct()
        demo.other_user()
        demo.show()
        demo.forget()
    if not config.skip_kernels:
        _title(f"7. Kernels against PyTorch: {_system.cpu_name()}, {torch.get_num_threads()} threads")
        for line in kernel_table():
            print(line, flush=True)
    print(f"\n{sum(demo.held)} of {len(demo.held)} expectations held.")
    return 0


def _title(text: str) -> None:
    print(f"\n{text}\n", flush=True)


def _tell(config: Config, store: Path) -> None:
    """`fastmem memory chat` as another operating system process; its memory files are all that stays of it."""
    lines: list[str] = []
    for session, turns in TOLD.items():
        lines += [*([f"/session {session}"] if lines else []), *turns]
    flags = {"model": config.model, "checkpoint": config.checkpoint, "dtype": config.dtype, "device": config.device}
    command = [sys.executable, "-m", "fastmem.cli", "memory", "chat", "--store", str(store)]
    command += ["--session", next(iter(TOLD))]
    for name, value in flags.items():
        command += [] if value is None else [f"--{name}", value]
    done = subprocess.run(command, input="\n".join(lines), stdout=None, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"the first process failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    for file in sorted(store.glob("*.memory")):
        print(f"saved: {file.name} ({file.stat().st_size / 1e6:.1f} MB)")


class Demo:
    """What the second process does; `held` collects whether each expectation held.

    Args:
        model: what answers.
        store: directory of memories that the first process left.
    """

    def __init__(self, model: MemoryAugmentedModel, store: Path) -> None:
        self.model = model
        self.store = MemoryDirectory(store, model)
        self.held: list[bool] = []

    def expect(self, held: bool, wanted: str) -> None:
        """Note and print whether something expected is so."""
        self.held.append(held)
        print(f"    {'yes' if held else 'NO '}  {wanted}", flush=True)

    def turn(self, session: str, text: str, *, update: bool) -> str:
        """One turn with the memory of the store."""
        with self.store.open(session, save=update):
            answer, _ = self.model.generate(text, update_memory=update, session=session, max_new_tokens=24)
        print(f"{session}> {text}\n{answer}", flush=True)
        return answer

    def ask(self, session: str, question: str, value: str) -> None:
        """A question whose answer should have a value in it."""
        self.expect(says(self.turn(session, question, update=False), value), f"answers {value!r}")

    def recall(self) -> None:
        """All that alice told."""
        for question, value in ASKED:
            self.ask("alice", question, value)

    def correct(self) -> None:
        """The later name wins."""
        _title("3. A correction")
        self.turn("alice", "No, I am Sarah.", update=True)
        self.ask("alice", ASKED[0][0], "Sarah")
        self.ask("alice", ASKED[1][0], ASKED[1][1])

    def other_user(self) -> None:
        """Bob's answers come from bob's memory; somebody new has none."""
        _title("4. Another user")
        answer = self.turn("bob", "What is my name?", update=False)
        self.expect(says(answer, "Robert"), "answers 'Robert'")
        self.expect(not says(answer, "Alice") and not says(answer, "Sarah"), "has no name of alice's in it")
        answer = self.turn("carol", "What is my name?", update=False)
        names = ("Alice", "Sarah", "Robert")
        self.expect(not any(says(answer, name) for name in names), "someone new gets nobody's name (a guess)")

    def show(self) -> None:
        """What alice's memory holds."""
        _title("5. What alice's memory holds, strongest first")
        with self.store.open("alice", save=False):
            print("\n".join(table(self.model, "alice", 6)))

    def forget(self) -> None:
        """Decay empties the buffer; clearing forgets the rest."""
        _title("6. Forgetting")
        total = 0
        for cycles in CYCLES:
            total += cycles
            with self.store.open("alice"):
                self.model.decay(cycles, "alice")
                live = {tier: sum(x[tier]["live"] for x in self._layers()) for tier in ("buffer", "store")}
                activations = [s for x in self._layers() for s in x["buffer"]["strength"]]
                answer, _ = self.model.generate(
                    "What is my name?", update_memory=False, session="alice", max_new_tokens=24
                )
            mean = statistics.fmean(activations) if activations else 0.0
            print(f"after {total:3d} cycles: {live['buffer']:3d} buffer slots (mean activation {mean:.2f}), ", end="")
            print(f"{live['store']} store slots; What is my name? {answer}", flush=True)
        self.expect(live["buffer"] == 0, f"after {total} cycles the buffer is empty")
        self.expect(says(answer, "Sarah"), "the store keeps what surprised: answers 'Sarah'")
        self.store.delete("alice")
        print("alice's memory is cleared")
        answer = self.turn("alice", "What is my name?", update=False)
        self.expect(not says(answer, "Alice") and not says(answer, "Sarah"), "the name is gone (a guess)")

    def _layers(self) -> list[dict[str, Any]]:
        return self.model.model.memory.inspect("alice")["layers"]


def kernel_table(seconds: float = 4.0) -> list[str]:
    """Interleaved medians of the C++ kernels and of their PyTorch references, as lines of text.

    Args:
        seconds: time for each row, about.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def attention(B: int, H: int, Q: int, S: int, E: int, k: int) -> Callable[[str], Any]:
        q, keys, values = randn(B, H, Q, E), randn(B, H, S, E), randn(B, H, S, E)
        return lambda backend: topk_attention(q, keys, values, top_k=k, backend=backend)

    def write(B: int, T: int, S: int, D: int) -> Callable[[str], Any]:
        zeros = torch.zeros(B, S)
        bank, keys, values = Bank(randn(B, S, D), randn(B, S, D), zeros, zeros, zeros), randn(B, T, D), randn(B, T, D)
        surprise = randn(B, T).abs()
        return lambda backend: gated_write(bank, keys, values, surprise, boost=None, backend=backend)

    rows = [
        ("topk_attention  B 2, H 8, Q 32, S 4096, E 64, k 32", attention(2, 8, 32, 4096, 64, 32)),
        ("topk_attention  B 1, H 1, Q 1, S 65536, E 128, k 32", attention(1, 1, 1, 65536, 128, 32)),
        ("gated_write     B 2, T 128, S 256, width 576", write(2, 128, 256, 576)),
    ]
    lines = [f"{'':52} {'PyTorch':>11} {'fastmem':>11} {'ratio':>7}"]
    with torch.no_grad():
        for name, call in rows:
            slow, fast = interleaved([lambda c=call: c("reference"), lambda c=call: c("cpp")], seconds)  # type: ignore[misc]
            lines.append(f"{name:52} {slow * 1e3:8.2f} ms {fast * 1e3:8.2f} ms {slow / fast:6.1f}x")
    return lines


def interleaved(calls: Sequence[Callable[[], Any]], seconds: float, at_least: int = 3) -> list[float]:
    """Median seconds of each call, timed A B A B ... until the time is up, at least 3 and at most 100 rounds."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(times[0]) < at_least or (time.perf_counter() < end and len(times[0]) < 100):
        for call, taken in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]

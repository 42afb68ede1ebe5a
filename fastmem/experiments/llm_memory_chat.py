"""`fastmem memory chat`: talk to a model that remembers. Works at a terminal and with piped input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmem.experiments.llm_memory import open_model
from fastmem.models import MemoryAugmentedModel, MemoryDirectory

COMMANDS = {
    "/memory": "what this session holds, and how strongly",
    "/clear": "forget this session",
    "/decay N": "let N decay cycles pass",
    "/session NAME": "go on as another user",
    "/save PATH": "write this session's memory to a file",
    "/load PATH": "read sessions from a file",
    "/quit": "leave",
}


@dataclass(frozen=True)
class Config:
    """Chat with a model that remembers. Each turn stands alone: what was said before is known from memory only."""

    model: str = "smollm2"
    """Base model: "smollm2" (offline), or a Hugging Face name or folder."""
    checkpoint: str | None = None
    """Trained adapter, a folder or a glob such as ./checkpoints/best_step*; None: the packaged one of smollm2."""
    memory_layers: str | None = None
    """Blocks after which memory stands, such as "3,6,9"; None: the checkpoint's."""
    store: Path | None = None
    """Directory that keeps each session's memory between runs; None: memory ends with the process."""
    session: str = "default"
    """Whose memory."""
    system: str | None = None
    """System message; None: the chat template's own."""
    max_new_tokens: int = 48
    """Longest answer, in tokens."""
    dtype: str = "auto"
    """Type of the base: float32, bfloat16, float16 or auto (bfloat16 on a GPU)."""
    device: str = "auto"
    """auto, cpu or cuda."""


def run(config: Config) -> int:
    """The chat on stdin and stdout; 1 if a turn or command failed."""
    print(f"loading {config.model} ...", file=sys.stderr)
    model = open_model(
        config.model,
        config.checkpoint,
        config.memory_layers,
        config.dtype,
        config.device,
        system=config.system,
        max_new_tokens=config.max_new_tokens,
    )
    return interact(model, config.store, config.session)


def interact(model: MemoryAugmentedModel, store: Path | None = None, session: str = "default") -> int:
    """Chat until /quit or the end of the input; 1 if a turn or command failed."""
    chat = Chat(model, store, session)
    read, write = _terminal() if sys.stdin.isatty() and sys.stdout.isatty() else _pipe()
    write(f"Session {session!r}. /help lists the commands.", "dim")
    return chat.talk(read(lambda: chat.session), write)


class Chat:
    """The state of a chat: the model, whose turn it is, where memories are kept.

    Args:
        model: what answers.
        store: directory of memories; None: the model alone holds them.
        session: whose memory.
    """

    def __init__(self, model: MemoryAugmentedModel, store: Path | None, session: str) -> None:
        self.model = model
        self.store = None if store is None else MemoryDirectory(store, model)
        self.session = session

    def talk(self, lines: Iterable[str], write: Callable[..., None]) -> int:
        """Answer each line; 1 if one failed."""
        status = 0
        for raw in lines:
            line = raw.strip()
            if line == "/quit":
                break
            if not line:
                continue
            try:
                for text in self.command(line) if line.startswith("/") else self.turn(line):
                    write(text, "bold" if not line.startswith("/") else "dim")
            except (KeyError, ValueError, OSError) as error:
                message = error.args[0] if isinstance(error, KeyError) else error
                write(f"error: {message}", "red")
                status = 1
        return status

    def turn(self, text: str) -> list[str]:
        """One turn that is remembered."""
        with self._opened():
            return [self.model.generate(text, session=self.session)[0]]

    def _opened(self, save: bool = True) -> AbstractContextManager[None]:
        return nullcontext() if self.store is None else self.store.open(self.session, save=save)

    def command(self, line: str) -> list[str]:
        """What a slash command prints.

        Raises:
            ValueError, KeyError, OSError: what went wrong, in one line.
        """
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        needs = {c.split()[0]: c for c in COMMANDS}
        if name == "/help":
            return [f"{c:14} {text}" for c, text in COMMANDS.items()]
        if name not in needs:
            raise ValueError(f"unknown command {name}; /help lists them")
        if (" " in needs[name]) != bool(rest):
            raise ValueError(f"expected {needs[name]}")
        return getattr(self, f"_{name[1:]}")(*([rest] if rest else []))

    def _memory(self) -> list[str]:
        with self._opened(save=False):
            return table(self.model, self.session)

    def _clear(self) -> list[str]:
        if self.store is not None:
            self.store.delete(self.session)
        else:
            self.model.clear_memory(self.session)
        return [f"{self.session!r} is forgotten"]

    def _decay(self, cycles: str) -> list[str]:
        if not cycles.isdecimal():
            raise ValueError(f"/decay: expected a number of cycles, got {cycles!r}")
        with self._opened():
            self.model.decay(int(cycles), self.session)
        return [f"{cycles} decay cycles have passed"]

    def _session(self, name: str) -> list[str]:
        self.session = name
        known = name in (self.model.model.memory if self.store is None else self.store)
        return [f"session {name!r}{'' if known else ', new'}"]

    def _save(self, path: str) -> list[str]:
        if self.store is None:
            self.model.save_memory(path, self.session)
        else:
            self.store.export_to(self.session, path)
        return [f"{self.session!r} saved to {path}"]

    def _load(self, path: str) -> list[str]:
        names = self.model.load_memory(path) if self.store is None else self.store.import_from(path)
        return [f"loaded {', '.join(map(repr, names))}"]


def table(model: MemoryAugmentedModel, session: str, top: int = 8) -> list[str]:
    """What a session holds, as lines of text: fill of both tiers, and the strongest tokens of each."""
    layers = model.model.memory.inspect(session)["layers"]
    lines = []
    rows = model.held(session, top)
    for tier, unit in (("buffer", "activation"), ("store", "surprise")):
        live = ", ".join(f"{x[tier]['live']}/{x[tier]['slots']}" for x in layers)
        lines.append(f"{tier}: live slots {live} (layers after blocks {', '.join(str(x['position']) for x in layers)})")
        mine = [row for row in rows if row["tier"] == tier]
        if mine:
            lines.append(f"  {'token':16} {unit:>10} {'age':>5} {'reads':>7} {'layers':>7}")
        for row in mine:
            shown = repr(row["token"].strip())
            lines.append(f"  {shown:16} {row['strength']:10.2f} {row['age']:5d} {row['reads']:7.2f} {row['layers']:7d}")
    return lines


def _pipe() -> tuple[Any, Any]:
    def read(session: Callable[[], str]) -> Iterator[str]:
        for line in sys.stdin:
            if line.strip():
                print(f"{session()}> {line.strip()}", flush=True)
            yield line

    def write(text: str, style: str = "") -> None:
        print(text, flush=True)

    return read, write


def _terminal() -> tuple[Any, Any]:
    try:
        from rich.console import Console
    except ImportError:
        console: Any = None
    else:
        console = Console(highlight=False)

    def read(session: Callable[[], str]) -> Iterator[str]:
        while True:
            try:
                yield input(f"{session()}> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return

    def write(text: str, style: str = "") -> None:
        if console is None:
            print(text, flush=True)
        else:
            console.print(text, style=style, markup=False)

    return read, write

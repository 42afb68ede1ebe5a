"""`fastmem memory`: a frozen language model with a memory. Each subcommand is imported when it is called.

A subcommand is a module llm_memory_NAME with a dataclass Config and run(config), which may return an exit status.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from fastmem.models import MemoryAugmentedModel

log = logging.getLogger(__name__)
T = TypeVar("T")

COMMANDS = {
    "demo": "tell facts in one process, ask in another; correction, another user, forgetting; kernels against PyTorch",
    "chat": "talk to the model; /memory, /clear, /decay, /session, /save, /load",
    "simple": "tell a name, drop the context, ask for it",
    "full": "introduction, correction, decay, recall in a new conversation, with statistics",
    "train": "train memory layers on a frozen model",
    "evaluate": "measure every bar, against controls that cannot remember; --json FILE keeps the numbers",
    "embedding": "the memory alone, on embeddings, without a language model",
}
SHORT = {"-i": "--interactive", "-s": "--simple"}


def main(arguments: list[str]) -> int:
    """Run `fastmem memory NAME ...`; the exit status."""
    parser = argparse.ArgumentParser(
        "fastmem memory",
        description="A frozen language model with a memory.",
        epilog="\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command")
    name = parser.parse_args(arguments[:1]).command
    rest = [SHORT.get(x, x) for x in arguments[1:]]
    if name == "train":
        return _train(rest)
    if name == "simple":
        rest.append("--simple")
    if name in ("evaluate", "embedding"):
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    module: Any = import_module(f"fastmem.experiments.llm_memory_{'full' if name == 'simple' else name}")
    result = module.run(parse(module.Config, rest, name))
    return result if isinstance(result, int) else 0


def parse(config: type[T], arguments: Sequence[str], name: str) -> T:
    """A frozen dataclass from command line flags; field docstrings are the help.

    Raises:
        ImportError: if the extra `experiments` is missing.
        SystemExit: status 2 after a wrong flag or value, 0 after --help.
    """
    try:
        import tyro
    except ImportError:
        raise ImportError(f"fastmem memory {name} needs tyro: pip install tyro rich matplotlib") from None
    options = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(config, args=list(arguments), prog=f"fastmem memory {name}", config=options)


def positions(text: str | None) -> tuple[int, ...] | None:
    """Block numbers from "3,6,9".

    Raises:
        ValueError: if they are no numbers.
    """
    if text is None:
        return None
    try:
        return tuple(int(p) for p in text.split(","))
    except ValueError:
        raise ValueError(f'memory_layers: expected numbers such as "3,6,9", got {text!r}') from None


def find_adapter(name: str, checkpoint: str | None) -> Path:
    """The adapter folder for a base; without a checkpoint the packaged one, which is SmolLM2's.

    Raises:
        ValueError: if there is none.
    """
    from fastmem.models import memory_augmented_model
    from fastmem.models.base_model import OFFLINE_MODEL

    if checkpoint is None and name != OFFLINE_MODEL:
        raise ValueError(f"checkpoint: {name} needs --checkpoint; train one with `fastmem memory train`")
    return memory_augmented_model.find_checkpoint(checkpoint or memory_augmented_model.PACKAGED_ADAPTER)


def open_model(
    name: str, checkpoint: str | None, memory_layers: str | None, dtype: str, device: str, **more: Any
) -> MemoryAugmentedModel:
    """The model of a command.

    Raises:
        ValueError: if there is no checkpoint, or it does not fit.
    """
    from fastmem.models import ExperimentConfig, MemoryAugmentedModel

    adapter = find_adapter(name, checkpoint)
    config = ExperimentConfig(name, positions(memory_layers), adapter, dtype=dtype, device=device, **more)
    return MemoryAugmentedModel(config)


@contextmanager
def log_file(path: Path | None, *names: str) -> Any:
    """Within this context the named loggers write INFO to stderr, and to a file where one is given."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    formatter = logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for handler in handlers:
        handler.setFormatter(formatter)
        for logger in loggers:
            logger.addHandler(handler)
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate = propagate
            for handler in handlers:
                logger.removeHandler(handler)
        for handler in handlers:
            handler.close()


def _train(arguments: list[str]) -> int:
    """Train, with a log and the history in ./training_logs besides the checkpoints."""
    from fastmem.experiments import llm_memory_train as training
    from fastmem.experiments.results import write_json
    from fastmem.models.memory_augmented_model import find_checkpoint

    config = parse(training.TrainingConfig, arguments, "train")
    positions(config.memory_layers)
    if config.resume is not None:
        config = replace(config, resume=find_checkpoint(config.resume))
    if config.init is not None:
        config = replace(config, init=find_checkpoint(config.init))
    logs = Path("training_logs")
    is_main = os.environ.get("RANK", "0") == "0"  # of several processes under `accelerate launch` one keeps the log
    file = logs / f"training_{time.strftime('%Y%m%d_%H%M%S')}.log"
    with log_file(file, "fastmem") if is_main else nullcontext():
        log.info("fastmem memory train %s", " ".join(arguments))
        log.info("%s", config)
        result = training.train(config)
        log.info("done: checkpoints in %s", config.checkpoint_dir)
    if is_main:
        write_json(logs / "training_history.json", result["history"])
        print(f"best mean validation accuracy {result['best']:.3f}; log in {file}", file=sys.stderr)
    return 0

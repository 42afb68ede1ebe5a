"""Base models by name."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

OFFLINE_MODEL = "smollm2"


def load_base(name: str, dtype: torch.dtype, device: torch.device | str) -> tuple[Any, Any]:
    """A causal LM in evaluation mode and its tokenizer, which pads on the left.

    Args:
        name: "smollm2", which needs no model hub, or a Hugging Face name or folder.
        dtype: type of the weights.
        device: where the model goes.

    Raises:
        ImportError: if the extra `llm` is missing.
        OSError: if there is no such model, or its folder lacks files or has damaged ones; one line that names it.
        ValueError: if the device is not here.
    """
    check_device(device)
    if name == OFFLINE_MODEL:
        from fastmem.models import smollm2

        return smollm2.load(dtype, device)
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")):
        _check_folder(path, name)
        name = str(path)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ImportError("a base model needs transformers: pip install transformers") from None
    with _quiet():
        with _one_line(name, "no base model"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
            base, info = loaded
        # transformers fills what it does not find with random numbers.
        missing = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
        if missing:
            raise OSError(f"{name}: its weights lack {missing[0]} as its config.json wants it ({len(missing)} in all)")
        words = "tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model"
        lacks = path.is_dir() and not any(any(path.glob(pattern)) for pattern in words)
        with _one_line(name, "no tokenizer", "tokenizer.json is missing" if lacks else ""):
            tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    return base.to(device).eval(), tokenizer


def check_device(device: torch.device | str) -> None:
    """Raise ValueError for a GPU that is not here."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: no {device} here; PyTorch sees no GPU that it can use")


def _check_folder(path: Path, name: str) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"{name}: {'a file, expected a folder' if path.exists() else 'no such folder'}")
    if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):  # the latter: PEFT's
        adapter = (path / "memory_config.json").is_file()
        what = "a memory adapter, no base model" if adapter else "no base model here"
        raise FileNotFoundError(f"{name}: {what} (config.json is missing)")


@contextmanager
def _one_line(name: str, what: str, reason: str = "") -> Iterator[None]:
    """Whatever a damaged file makes the libraries raise becomes one line with the model's name, and with the reason
    where one is known."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        reason = reason or (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" :")
        raise OSError(f"{name}: {what} to be had ({reason})") from None


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the hardware computes in it: GPUs, and CPUs with AVX-512; without it, bfloat16 is far slower."""
    fast = torch.device(device).type == "cuda" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars where stderr is no terminal, no warning at each of ten retries without a network, and no report
    of missing weights, which `load_base` refuses."""
    from transformers.utils import logging as transformers_logging

    hub_log = logging.getLogger("huggingface_hub")
    level, bars = hub_log.level, transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    hub_log.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        hub_log.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()

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
        OSError: if there is no such model.
    """
    if name == OFFLINE_MODEL:
        from fastmem.models import smollm2

        return smollm2.load(dtype, device)
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise FileNotFoundError(f"{name}: no such folder")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ImportError("a base model needs transformers: pip install transformers") from None
    try:
        with _quiet():
            base: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    except (OSError, ValueError) as error:
        raise OSError(f"{name}: no base model to be had ({str(error).strip().splitlines()[0]})") from None
    return base.to(device).eval(), tokenizer


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the hardware computes in it: GPUs, and CPUs with AVX-512; without it, bfloat16 is far slower."""
    fast = torch.device(device).type == "cuda" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars where stderr is no terminal, and no warning at each of ten retries without a network."""
    from transformers.utils import logging as transformers_logging

    hub_log = logging.getLogger("huggingface_hub")
    level, bars = hub_log.level, transformers_logging.is_progress_bar_enabled()
    hub_log.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        hub_log.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()

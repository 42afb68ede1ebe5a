"""The KV cache of a Hugging Face model: `cache` to transformers from 5.24 on, `past_key_values` to those before."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

_NAMES = ("cache", "past_key_values", "cache_params")  # the last one: Mamba before 5.24


def cache_name(base: Any) -> str:
    """What the forward pass of `base` calls its cache, as an argument and in its output."""
    parameters = inspect.signature(base.forward).parameters
    return next((name for name in _NAMES if name in parameters), _NAMES[0])


def cache_among(named: Mapping[str, Any]) -> Any:
    """The cache among the arguments or in the output of a call, None if there is none."""
    return next((named[name] for name in _NAMES if named.get(name) is not None), None)


def cached_length(cache: Any, passed: int) -> int:
    """Tokens that a cache holds; one of states alone (Mamba) does not know, it holds what has `passed`."""
    if not hasattr(cache, "get_seq_length"):
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return passed if cache.has_previous_state() else 0

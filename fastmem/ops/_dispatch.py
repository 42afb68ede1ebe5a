"""Which backend serves a call, and why the others do not.

Each op states, per backend, a function that returns None when it can serve the call or the reason why not. `choose`
takes the first of `PREFERENCE` that can; a forced backend that cannot raises. Nothing falls back silently.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastmem import _native
from fastmem.ops import _threads as _threads  # before the first kernel runs

PREFERENCE = ("triton", "cpp", "sdpa", "reference")


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call (`chosen`), and for each other one why it was not taken (`refused`)."""

    op: str
    chosen: str
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


_planners: dict[str, Callable[..., Explanation]] = {}


def explainer(op: str) -> Callable[[Callable[..., Explanation]], Callable[..., Explanation]]:
    """Register the function that validates a call of `op` and returns its Explanation, without running it."""

    def register(plan: Callable[..., Explanation]) -> Callable[..., Explanation]:
        _planners[op] = plan
        return plan

    return register


def ops() -> tuple[str, ...]:
    """Names of all ops that explain themselves."""
    return tuple(sorted(_planners))


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would serve `op(*args, **kwargs)` and why the others would not.

    Args:
        op: name of a public op, such as "topk_attention".
        *args, **kwargs: what the op would be called with.

    Raises:
        ValueError: if there is no such op, or the call itself is wrong.
    """
    if op not in _planners:
        raise ValueError(f"op: expected one of {', '.join(ops())}, got {op!r}")
    return _planners[op](*args, **kwargs)


def choose(op: str, backend: str, refusals: dict[str, str | None]) -> Explanation:
    """Pick a backend.

    Args:
        op: the op's name.
        backend: "auto", or the one that the caller insists on.
        refusals: backend name -> None where it can serve the call, else the reason.

    Raises:
        ValueError: if the forced backend cannot serve the call, or its name is unknown.
    """
    chosen = pick(op, backend, refusals)
    if backend != "auto":
        others = {name: f"backend={backend!r} was asked for" for name in refusals if name != backend}
        return Explanation(op, backend, others)
    others = {
        name: reason if reason is not None else f"{chosen} is faster"
        for name, reason in refusals.items()
        if name != chosen
    }
    return Explanation(op, chosen, others)


def pick(op: str, backend: str, refusals: dict[str, str | None]) -> str:
    """The backend that `choose` would name, without the reasons: calls take microseconds, and so do words."""
    if backend == "auto":
        for name in PREFERENCE:
            if name in refusals and refusals[name] is None:
                return name
        raise AssertionError(f"{op}: the reference serves every call")
    if not isinstance(backend, str) or backend not in refusals:
        raise ValueError(f"backend: expected one of auto, {', '.join(refusals)}, got {backend!r}")
    reason = refusals[backend]
    if reason is not None:
        raise ValueError(f"{op}: backend {backend!r} cannot serve this call: {reason}")
    return backend


# Found out at import: torch.compile does not look into a cached function, and warns of it.
_TRITON_MISSING = None if importlib.util.find_spec("triton") else "triton is not installed"


def no_triton(*tensors: Tensor | None) -> str | None:
    """Why Triton cannot take these tensors, or None."""
    if _TRITON_MISSING:
        return _TRITON_MISSING
    for tensor in tensors:
        if tensor is not None and not tensor.is_cuda:
            return f"tensors are on {tensor.device.type}, not on a GPU"
    return None


def no_cpp(*tensors: Tensor | None) -> str | None:
    """Why the C++ kernels cannot take these tensors, or None."""
    if _native.missing:
        return _native.missing
    for tensor in tensors:
        if tensor is not None and not tensor.is_cpu:
            return f"tensors are on {tensor.device.type}, not on the CPU"
    return None


_warned: set[tuple[str, str]] = set()


def warn_slow(op: str, reason: str) -> None:
    """Warn once per op and reason that the reference serves what a kernel would do far faster."""
    if (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(f"fastmem.{op} runs its slow PyTorch reference: {reason}", RuntimeWarning, stacklevel=3)

"""What a module says of an argument that does not fit: its name, what was expected, what came."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(name: str, x: object, shape: tuple[int | str, ...], *, mask: bool = False) -> None:
    """Refuse what is not a float tensor, or with `mask` a bool tensor, of this shape.

    Args:
        name: of the argument.
        x: what came.
        shape: its sizes; a letter stands for any.
        mask: whether it marks tokens.

    Raises:
        TypeError: no tensor, or another dtype.
        ValueError: another shape.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.shape != shape and not _fits(x.shape, shape):
        expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name}: expected ({expected}), got {tuple(x.shape)}")
    if mask and x.dtype != torch.bool:
        raise TypeError(f"{name}: expected torch.bool, got {x.dtype}")
    if not mask and not x.is_floating_point():
        raise TypeError(f"{name}: expected a float dtype, got {x.dtype}")


def _fits(sizes: torch.Size, shape: tuple[int | str, ...]) -> bool:
    return len(sizes) == len(shape) and all(
        isinstance(want, str) or n == want for n, want in zip(sizes, shape, strict=True)
    )


def check_layer_takes(name: str, x: Tensor, layer: torch.nn.Module) -> None:
    """Refuse a dtype that `layer`, a Linear, cannot multiply. What stands in for a Linear has rules of its own.

    Raises:
        TypeError: x is of another dtype than the weights, outside of autocast.
    """
    if type(layer) is not torch.nn.Linear or x.dtype == layer.weight.dtype:
        return
    if not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name}: expected {layer.weight.dtype} like the module's weights, got {x.dtype}")


def check_count(name: str, x: object) -> None:
    """Refuse what is not an int of at least 1.

    Raises:
        TypeError: no int.
        ValueError: below 1.
    """
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name}: expected an int, got {x!r}")
    if x < 1:
        raise ValueError(f"{name}: expected at least 1, got {x}")


def check_number(name: str, x: object, *, above: float | None = None) -> None:
    """Refuse what is not a finite number, larger than `above` where that is given.

    Raises:
        TypeError: no number.
        ValueError: nan, an infinity, or too small.
    """
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name}: expected a number, got {x!r}")
    if not (-float("inf") < x < float("inf")) or (above is not None and x <= above):
        raise ValueError(f"{name}: expected a finite number{'' if above is None else f' above {above:g}'}, got {x}")


def check_cycles(cycles: int | Tensor) -> None:
    """Refuse that time runs backwards. What is in a tensor is not looked at while a graph is compiled.

    Raises:
        ValueError: below 0.
    """
    if isinstance(cycles, Tensor):
        if torch.compiler.is_compiling() or not cycles.numel():
            return
        cycles = cycles.min().item()  # type: ignore[assignment]
    if cycles < 0:
        raise ValueError(f"cycles: expected at least 0, got {cycles}")

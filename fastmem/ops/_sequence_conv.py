"""The two ways to keep sequences apart inside a batch row: `reset` marks and packed sequences by `cu_seqlens`."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


def check_reset(reset: Tensor, B: int, L: int, device: torch.device) -> None:
    """Refuse a `reset` that is not (B, L) bool on the device.

    Raises:
        TypeError: not a tensor, or not bool.
        ValueError: a wrong shape or device.
    """
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset: expected a tensor, got {type(reset).__name__}")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset: expected torch.bool, true where what came before is dropped, got {reset.dtype}")
    if reset.shape != (B, L):
        raise ValueError(f"reset: expected (B, L) = ({B}, {L}), got {tuple(reset.shape)}")
    if reset.device != device:
        raise ValueError(f"reset: expected device {device}, got {reset.device}")


def check_cu_seqlens(cu_seqlens: Tensor, B: int, L: int, device: torch.device) -> int:
    """Refuse a `cu_seqlens` that does not cut one row of length L into sequences; return their number n.

    Sequence i holds steps cu_seqlens[i] to cu_seqlens[i + 1] - 1; it may be empty. The numbers are read (on a GPU:
    once per tensor, as it waits for the device), except while a graph is compiled or captured: kernels must not trust
    them.

    Raises:
        TypeError: not a tensor, or not int32 or int64.
        ValueError: a wrong shape or device, B is not 1, or numbers that do not run from 0 up to L.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: expected a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected torch.int32 or torch.int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected (n + 1,) for n sequences, got {tuple(cu_seqlens.shape)}")
    if B != 1:
        raise ValueError(f"cu_seqlens: expected packed sequences in one row, B = 1, got B = {B}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected device {device}, got {cu_seqlens.device}")
    if not (torch.compiler.is_compiling() or _capturing(device)):
        _check_numbers(cu_seqlens, L)
    return cu_seqlens.shape[0] - 1


def _capturing(device: torch.device) -> bool:
    return device.type == "meta" or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


_last_checked: tuple[weakref.ref[Tensor], int, int] | None = None
"""The GPU tensor that passed last, its version and L: the layers of one model share it and wait once."""


def _check_numbers(cu_seqlens: Tensor, L: int) -> None:
    global _last_checked
    remember = cu_seqlens.device.type != "cpu" and not cu_seqlens.is_inference()
    if remember and _last_checked is not None:
        known, version, length = _last_checked
        if known() is cu_seqlens and version == cu_seqlens._version and length == L:
            return
    numbers = cu_seqlens.tolist()
    if numbers[0] != 0:
        raise ValueError(f"cu_seqlens: expected 0 at its start, got {numbers[0]}")
    if numbers[-1] != L:
        raise ValueError(f"cu_seqlens: expected L = {L} at its end, got {numbers[-1]}")
    for i in range(1, len(numbers)):
        if numbers[i] < numbers[i - 1]:
            raise ValueError(f"cu_seqlens: expected no decrease, got {numbers[i - 1]} then {numbers[i]} at index {i}")
    if remember:
        _last_checked = (weakref.ref(cu_seqlens), cu_seqlens._version, L)

"""Arguments that say where a sequence starts anew, checked alike for every op over time."""

from __future__ import annotations

import torch
from torch import Tensor


def check_reset(reset: object, B: int, L: int, device: torch.device) -> Tensor:
    """`reset`, if it is (B, L) bool on the device.

    Raises:
        TypeError, ValueError: if it is not.
    """
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset: expected a tensor, got {type(reset).__name__}")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset: expected torch.bool, true where what came before is dropped, got {reset.dtype}")
    if reset.shape != (B, L):
        raise ValueError(f"reset: expected ({B}, {L}), got {tuple(reset.shape)}")
    if reset.device != device:
        raise ValueError(f"reset: expected the device of the sequence, {device}, got {reset.device}")
    return reset


def check_cu_seqlens(cu_seqlens: object, B: int, L: int, device: torch.device) -> Tensor:
    """`cu_seqlens` (n + 1,) as contiguous int64, if it cuts one row of length L into n sequences, 0 = first <= ... <= L.

    Under torch.compile the values are left to the kernel.

    Raises:
        TypeError, ValueError: if it does not.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: expected a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected (n + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected the device of the sequence, {device}, got {cu_seqlens.device}")
    if B != 1:
        raise ValueError(f"cu_seqlens: expected packed sequences in one row, B = 1, got B = {B}")
    if not torch.compiler.is_compiling():
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != L or any(a > b for a, b in zip(values, values[1:], strict=False)):
            raise ValueError(f"cu_seqlens: expected values that rise from 0 to L = {L}, got {_short(values)}")
    return cu_seqlens.to(torch.int64).contiguous()


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"

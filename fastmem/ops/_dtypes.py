"""The type that a call computes in, the same rule for every op."""

from __future__ import annotations

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else; states are kept in it too."""
    return torch.float64 if dtype == torch.float64 else torch.float32

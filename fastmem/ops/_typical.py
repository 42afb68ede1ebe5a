"""One small, typical call of every op: what `fastmem info` explains and what the GPU check runs under a sanitizer."""

from __future__ import annotations

from typing import Any

import torch

from fastmem.ops.gated_write import Bank


def calls(device: torch.device | str) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """op name -> (arguments, keyword arguments), float32 tensors on `device`, the same numbers every time."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    B, H, Q, S, E, T = 2, 4, 16, 256, 64, 24
    half = (torch.arange(S) < S // 2).expand(B, S).float().to(device)  # half of the slots are live
    bank = Bank(randn(B, S, E), randn(B, S, E), half, torch.zeros_like(half), torch.zeros_like(half))
    surprise = {"surprise": randn(B, T).abs(), "boost": None}
    conv, conv_step = (randn(B, T, E), randn(E, 4), randn(E)), (randn(B, 3, E), randn(B, E), randn(E, 4), randn(E))
    return {
        "causal_conv1d": (conv, {"activation": "silu"}),
        "causal_conv1d_step": (conv_step, {"activation": "silu"}),
        "causal_conv1d_step_": (conv_step, {"activation": "silu"}),
        "gated_write": ((bank, randn(B, T, E), randn(B, T, E)), surprise),
        "topk_attention": ((randn(B, H, Q, E), randn(B, H, S, E), randn(B, H, S, E)), {"top_k": 32}),
    }

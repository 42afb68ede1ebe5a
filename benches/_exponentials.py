"""Exponentials alone on a GPU: the rate of its special-function units."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

B, UNROLLED = 1024, 16


@triton.jit
def _repeat(p, rounds, b: tl.constexpr, unrolled: tl.constexpr):
    at = tl.program_id(0) * b + tl.arange(0, b)
    x = tl.load(p + at)
    for _ in range(rounds):
        for _ in tl.static_range(unrolled):
            x = tl.exp2(-x)  # stays in (0, 1)
    tl.store(p + at, x)


def launch(count: int) -> float:
    """At least `count` exponentials in registers, by all multiprocessors; does not wait for them."""
    programs = 8 * torch.cuda.get_device_properties("cuda").multi_processor_count
    x = torch.zeros(programs * B, device="cuda")
    _repeat[(programs,)](x, -(-count // (programs * B * UNROLLED)), B, UNROLLED, num_warps=4)
    return 0.0

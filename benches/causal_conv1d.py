"""causal_conv1d: a prompt, training, packed sequences, and a decode step; against torch's own convolution, and on a GPU
against causal-conv1d where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benches._harness import Candidate, Group, Ratio, Work, forward_backward, on_gpu, ratio_of_present, rows
from fastmem.ops.causal_conv1d import causal_conv1d, causal_conv1d_step

L, D, W = 2048, 1536, 4
BITS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
EDGES = torch.tensor([0, 300, 310, 1024, 1500, L])
WEIGHTS_BYTES = (W + 1) * D * 4


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias, activation="silu")


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torch's depthwise convolution, which wants time last."""
    x = F.pad(x.mT, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(x, weight[:, None], bias, groups=weight.shape[0])).mT


def shifted_sums(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    L, W = x.shape[1], weight.shape[1]
    x = F.pad(x, (0, 0, W - 1, 0))
    return F.silu(bias + sum(weight[:, w] * x[:, w : w + L] for w in range(W)))


def truth(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x, weight, bias = (t.double() for t in (x, weight, bias))
    return causal_conv1d(x, weight, bias, activation="silu", backend="reference")


def sequences(dtype: torch.dtype, B: int = 1) -> Callable[..., tuple]:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
        shapes = ((B, L, D), (D, W), (D,))
        return tuple(torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes)

    return make


def sequence_group(dtype: torch.dtype, training: bool, B: int = 1) -> Group:
    wrap = forward_backward if training else lambda run: run
    elements = B * L * D
    return Group(
        name=f"causal_conv1d silu{' forward + backward' if training else ''} B{B} L{L} D{D} W{W} {BITS[dtype]}",
        inputs=sequences(dtype, B),
        candidates={"fastmem": wrap(ours), "conv1d": wrap(conv1d), "shifted sums": wrap(shifted_sums)},
        reference=wrap(truth),
        # Backward: x and grad_y in, grad_x out.
        work=Work(
            bytes=(5 if training else 2) * elements * dtype.itemsize + WEIGHTS_BYTES,
            ops=(6 if training else 2) * elements * W,
            dtype=dtype,
        ),
        tolerance=1e-5 if dtype == torch.float32 else 2e-2,
    )


def each_sequence(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Packed sequences without a kernel for them: one after the other."""
    return lambda x, *w: torch.cat([run(part, *w) for part in x.split(EDGES.diff().tolist(), 1)], 1)


def packed_group() -> Group:
    def packed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d(x, weight, bias, activation="silu", cu_seqlens=EDGES)

    return Group(
        name=f"causal_conv1d silu, 5 packed sequences L{L} D{D} W{W} fp32",
        inputs=sequences(torch.float32),
        candidates={
            "fastmem": packed,
            "conv1d": each_sequence(conv1d),
            "shifted sums": each_sequence(shifted_sums),
        },
        reference=each_sequence(truth),
        work=Work(2 * L * D * 4 + WEIGHTS_BYTES, 2 * L * D * W),
    )


def step_group(B: int) -> Group:
    """One token: the state is shifted, the new input appended, and W inputs weighted."""

    def make(device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
        shapes = ((B, W - 1, D), (B, D), (D, W), (D,))
        return tuple(torch.randn(s, generator=generator, device=device) for s in shapes)

    def with_state(run: Callable[..., Tensor]) -> Callable[..., Any]:
        def step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            window = torch.cat([state, x[:, None]], 1)
            return run(window, weight, bias), window[:, 1:]

        return step

    def convolved(window: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.conv1d(window.mT, weight[:, None], bias, groups=D))[..., 0]

    def summed(window: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu((window * weight.t()).sum(1) + bias)

    def step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d_step(state, x, weight, bias, activation="silu")

    def exact(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        tensors = (t.double() for t in (state, x, weight, bias))
        return causal_conv1d_step(*tensors, activation="silu", backend="reference")

    return Group(
        name=f"causal_conv1d_step silu B{B} D{D} W{W} fp32",
        inputs=make,
        candidates={"fastmem": step, "conv1d": with_state(convolved), "eager sum": with_state(summed)},
        reference=exact,
        work=Work(2 * B * W * D * 4 + WEIGHTS_BYTES, 2 * B * D * W),
    )


PROMPT, PROMPT_HALF = (sequence_group(dtype, training=False) for dtype in BITS)
TRAINING, TRAINING_HALF = (sequence_group(dtype, training=True) for dtype in BITS)
PACKED, STEP, STEPS = packed_group(), step_group(1), step_group(64)


def time_last(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """The inputs as causal-conv1d wants them."""
    return x.mT.contiguous(), weight, bias


def gpu_group(dtype: torch.dtype, training: bool, B: int = 8) -> Group:
    group = sequence_group(dtype, training, B)
    candidates = dict(group.candidates)
    if importlib.util.find_spec("causal_conv1d_cuda"):
        from causal_conv1d import causal_conv1d_fn

        def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return causal_conv1d_fn(x, weight, bias, activation="silu")

        def time_first(result: Any) -> Any:
            return (result[0].mT, result[1].mT, *result[2:]) if training else result.mT

        run = forward_backward(theirs) if training else theirs
        candidates["causal-conv1d"] = Candidate(run, prepare=time_last, output=time_first)
    return on_gpu(group, candidates=candidates)


GPU_SEQUENCES = [gpu_group(dtype, training) for dtype in BITS for training in (False, True)]
GPU_STEPS = on_gpu(STEPS)


@rows(PROMPT, PROMPT_HALF, PACKED, *GPU_SEQUENCES[::2])
def test_forward(benchmark, group, candidate): ...


@rows(TRAINING, TRAINING_HALF, *GPU_SEQUENCES[1::2])
def test_training(benchmark, group, candidate): ...


@rows(STEP, STEPS, GPU_STEPS)
def test_step(benchmark, group, candidate): ...


RATIOS = [
    Ratio(PROMPT, "fastmem", {"conv1d": 3.0, "shifted sums": 5.0}),
    Ratio(PROMPT_HALF, "fastmem", {"conv1d": 3.0, "shifted sums": 3.0}),
    Ratio(TRAINING, "fastmem", {"conv1d": 3.0, "shifted sums": 3.0}),
    Ratio(TRAINING_HALF, "fastmem", {"conv1d": 3.0, "shifted sums": 3.0}),
    Ratio(PACKED, "fastmem", {"conv1d": 3.0, "shifted sums": 5.0}),
    Ratio(STEP, "fastmem", {"conv1d": 1.5, "eager sum": 1.2}),
    Ratio(STEPS, "fastmem", {"conv1d": 3.0, "eager sum": 1.5}),
    *(ratio_of_present(group, {"conv1d": 1.0, "causal-conv1d": 1.0}) for group in GPU_SEQUENCES),
    Ratio(GPU_STEPS, "fastmem", {"conv1d": 1.0, "eager sum": 1.0}),
]

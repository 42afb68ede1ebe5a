"""selective_scan: a prompt, training, many short sequences, a second-order step, long context, decoding.

Peers: the loop over time that one writes in PyTorch, mambapy's parallel scan, on a GPU mamba-ssm's CUDA kernel where it
is installed, and on the same tensors the exponentials alone, which no scan can do without.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benches._harness import (
    Candidate,
    Group,
    Ratio,
    Work,
    exponentials,
    forward_backward,
    on_gpu,
    ratio_of_present,
    relative_error,
    rows,
)
from fastmem.ops.selective_scan import selective_scan, selective_scan_step_

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The scan as one writes it in PyTorch with care: nothing of size L N is kept, nothing is sliced step by step."""
    h, ys = u.new_zeros(*u.shape[::2], A.shape[1]), []
    for x, dt, b, c in zip(u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        h = torch.exp(dt[..., None] * A) * h + (dt * x)[..., None] * b[:, None]
        ys.append((h * c[:, None]).sum(-1))
    return torch.stack(ys, 1)


def usual_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The order of operations of transformers' Mamba without kernels and of mamba-ssm's reference: (B, D, L, N) first,
    then slices of it. Its backward fills a tensor of that size at every step: over 2048 steps it takes minutes."""
    u, delta = u.transpose(1, 2), delta.transpose(1, 2)
    decay = torch.exp(A[None, :, None] * delta[..., None])
    fed = delta[..., None] * B[:, None] * u[..., None]
    h, ys = torch.zeros_like(fed[:, :, 0]), []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + fed[:, :, t]
        ys.append((h @ C[:, t, :, None]).squeeze(2))
    return torch.stack(ys, 1)


def mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    h = pscan(torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None])
    return (h @ C[..., None]).squeeze(3)


def exact(*args: Tensor) -> Tensor:
    """In float64, by the CPU kernel that the tests hold against the definition: the loop would take minutes here."""
    return selective_scan(*(x.cpu().double() for x in args)).to(args[0].device)


def tensors(B: int, L: int, D: int, N: int, dtype: torch.dtype = torch.float32) -> Callable[..., tuple]:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        delta = torch.nn.functional.softplus(randn(B, L, D) - 3)
        A = -(randn(D, N) * 0.5 + torch.arange(1, N + 1, device=device).log()).exp()
        u, B_, C = (randn(B, L, size).to(dtype) for size in (D, N, N))
        return u, delta.to(dtype), A, B_, C

    return make


def work(B: int, L: int, D: int, N: int, training: bool = False, dtype: torch.dtype = torch.float32) -> Work:
    """Forward: u, delta, B, C in, y out. Backward: the same and grad_y in, their gradients out."""
    streams = B * L * (3 * D + 2 * N) + (B * L * (5 * D + 4 * N) if training else 0)
    return Work(
        bytes=dtype.itemsize * streams + 4 * D * N,
        ops=B * L * D * N * (22 if training else 6),
        exponentials=B * L * D * N * (2 if training else 1),
    )


def group(name: str, size: tuple[int, int, int, int], candidates: dict[str, Any], training: bool = False) -> Group:
    wrap = forward_backward if training else lambda run: run
    label = "B{} L{} D{} N{} fp32".format(*size)
    return Group(
        name=f"selective_scan{' ' + name if name else ''}{' forward + backward' if training else ''} {label}",
        inputs=tensors(*size),
        candidates={k: run if isinstance(run, Candidate) else wrap(run) for k, run in candidates.items()},
        reference=wrap(exact),
        work=work(*size, training),
        tolerance=1e-4 if training else 1e-5,
    )


PROMPT, SHORT = (1, 2048, 1536, 16), (2048, 16, 64, 16)
FORWARD = group("", PROMPT, {"fastmem": selective_scan, "loop": loop, "usual loop": usual_loop, "mambapy": mambapy})
TRAINING = group("", PROMPT, {"fastmem": selective_scan, "loop": loop, "mambapy": mambapy}, training=True)
SHORT_TRAINING = group("", SHORT, {"fastmem": selective_scan, "loop": loop, "usual loop": usual_loop}, training=True)


def against_exponentials(size: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> Group:
    count = size[0] * size[1] * size[2] * size[3]
    name = "selective_scan against its exponentials B{} L{} D{} N{}".format(*size)

    def check(result: Any, inputs: tuple) -> None:
        assert isinstance(result, float) or relative_error(result, exact(*inputs)) < (
            1e-5 if dtype == torch.float32 else 2e-2
        )

    return Group(
        name=f"{name} fp32" if device == "cpu" else f"{name} bf16 cuda",
        inputs=tensors(*size, dtype=dtype),
        candidates={"fastmem": selective_scan, "exponentials": lambda *args: exponentials(count, device)},
        check=check,
        work=work(*size, dtype=dtype),
        device=device,
    )


EXPONENTIALS = against_exponentials(PROMPT, "cpu", torch.float32)


def first(results: tuple[Tensor, ...]) -> Tensor:
    return results[0]


# Backward <= 3x forward: then a forward takes at least a quarter of forward + backward.
PASSES = group(
    "its passes",
    PROMPT,
    {"forward + backward": Candidate(forward_backward(selective_scan), output=first), "forward": selective_scan},
)


def second_order(scan: Scan) -> Callable[..., Tensor]:
    """The meta-gradient of one MAML step: A moves along the gradient of a loss; the loss after it is differentiated."""

    def step(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        A = A.detach().requires_grad_()
        (slope,) = torch.autograd.grad(scan(u, delta, A, B, C).square().mean(), A, create_graph=True)
        return torch.autograd.grad(scan(u, delta, A - 0.1 * slope, B, C).square().mean(), A)[0]

    return step


SECOND = Group(
    name="selective_scan second-order MAML step B2048 L16 D64 N16 fp32",
    inputs=tensors(*SHORT),
    candidates={
        "fastmem": second_order(selective_scan),
        "loop": second_order(loop),
        "usual loop": second_order(usual_loop),
    },
    reference=lambda *args: second_order(selective_scan)(*(x.double() for x in args)),
    work=work(*SHORT, training=True),
    tolerance=1e-4,
)


def on_threads(run: Callable[..., Any], threads: int) -> Callable[..., Any]:
    def limited(*args: Any) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return run(*args)
        finally:
            torch.set_num_threads(before)

    return limited


def pieces(*args: Tensor) -> Tensor:
    """The long sequence in eight, the state handed on: what a scan that is linear in L takes as long for."""
    u, delta, A, B, C = args
    state, ys = None, []
    for piece in zip(*(x.chunk(8, 1) for x in (u, delta, B, C)), strict=True):
        u, delta, B, C = piece
        y, state = selective_scan(u, delta, A, B, C, initial_state=state, return_final_state=True)
        ys.append(y)
    return torch.cat(ys, 1)


LONG = group(
    "long",
    (1, 1 << 20, 64, 16),
    {"fastmem": selective_scan, "one thread": on_threads(selective_scan, 1), "eight pieces": pieces},
)


# --- decoding ---------------------------------------------------------------------------------------------------------


def step_expression(state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    h = torch.exp(delta[..., None] * A) * state + (delta * u)[..., None] * B[:, None]
    state.copy_(h)
    return (h @ C[..., None]).squeeze(-1)


def decode(B: int) -> Group:
    D, N = 1536, 16

    def make(device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
        u, delta, A, maps, out = tensors(B, 1, D, N)(device, generator)
        return torch.zeros(B, D, N, device=device), u[:, 0], delta[:, 0], A, maps[:, 0], out[:, 0]

    def fresh(*args: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros_like(args[0]), *args[1:]

    def truth(state: Tensor, *args: Tensor) -> Tensor:
        return step_expression(torch.zeros_like(state).double(), *(x.double() for x in args))

    return Group(
        name=f"selective_scan_step_ B{B} D{D} N{N} fp32",
        inputs=make,
        candidates={
            "fastmem": Candidate(selective_scan_step_, prepare=fresh),
            "expression": Candidate(step_expression, prepare=fresh),
        },
        reference=truth,
        work=Work(bytes=4 * (2 * B * D * N + D * N + 3 * B * D), ops=6 * B * D * N, exponentials=B * D * N),
    )


DECODE_1, DECODE_64 = decode(1), decode(64)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def time_last(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    """The inputs as mamba-ssm wants them."""
    return u.mT.contiguous(), delta.mT.contiguous(), A, B.mT.contiguous(), C.mT.contiguous()


def time_first(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The result and the gradients of inputs that lie so, as ours."""
    y, grad_u, grad_delta, grad_A, grad_B, grad_C = results
    return y.mT, grad_u.mT, grad_delta.mT, grad_A, grad_B.mT, grad_C.mT


def gpu_group(size: tuple[int, int, int, int], training: bool, peers: dict[str, Scan]) -> Group:
    """In bfloat16 against `peers`, and against mamba-ssm where its extension is installed."""
    wrap = forward_backward if training else lambda run: run
    candidates: dict[str, Any] = {name: wrap(run) for name, run in {"fastmem": selective_scan, **peers}.items()}
    if importlib.util.find_spec("selective_scan_cuda"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        output = time_first if training else lambda y: y.mT
        candidates["mamba-ssm"] = Candidate(wrap(selective_scan_fn), prepare=time_last, output=output)
    return Group(
        name="selective_scan{} B{} L{} D{} N{} bf16 cuda".format(" forward + backward" if training else "", *size),
        inputs=tensors(*size, dtype=torch.bfloat16),
        candidates=candidates,
        reference=wrap(exact),
        work=work(*size, training, torch.bfloat16),
        device="cuda",
        tolerance=2e-2,
    )


GPU_PROMPT, GPU_LONG, GPU_SHORT = (8, 2048, 2048, 16), (1, 65536, 2048, 16), (4096, 16, 1024, 16)
GPU_FORWARD = [gpu_group(size, False, {"loop": loop} if size[1] <= 2048 else {}) for size in (GPU_PROMPT, GPU_LONG)]
GPU_TRAINING = [gpu_group(size, True, {}) for size in (GPU_PROMPT, GPU_LONG)]
GPU_SHORTS = [gpu_group(GPU_SHORT, training, {"loop": loop}) for training in (False, True)]
GPU_EXPONENTIALS = against_exponentials(GPU_PROMPT, "cuda", torch.bfloat16)
GPU_SECOND, GPU_DECODE = on_gpu(SECOND), [on_gpu(DECODE_1), on_gpu(DECODE_64)]


@rows(FORWARD, LONG, DECODE_1, DECODE_64, *GPU_FORWARD, GPU_SHORTS[0], *GPU_DECODE)
def test_forward(benchmark, group, candidate): ...


@rows(TRAINING, SHORT_TRAINING, SECOND, *GPU_TRAINING, GPU_SHORTS[1], GPU_SECOND)
def test_training(benchmark, group, candidate): ...


RATIOS = [
    Ratio(FORWARD, "fastmem", {"loop": 150.0, "usual loop": 150.0, "mambapy": 200.0}),
    Ratio(EXPONENTIALS, "fastmem", {"exponentials": 0.5}),
    Ratio(TRAINING, "fastmem", {"loop": 50.0, "mambapy": 50.0}),
    Ratio(PASSES, "forward + backward", {"forward": 0.25}),
    Ratio(SHORT_TRAINING, "fastmem", {"loop": 10.0, "usual loop": 10.0}),
    Ratio(SECOND, "fastmem", {"loop": 10.0, "usual loop": 10.0}),
    Ratio(LONG, "fastmem", {"one thread": 1.6, "eight pieces": 0.9}),
    Ratio(DECODE_1, "fastmem", at_most_s=25e-6),
    Ratio(DECODE_64, "fastmem", {"expression": 1.0}),
    *(ratio_of_present(group, {"mamba-ssm": 1.0}) for group in (*GPU_FORWARD, *GPU_TRAINING)),
    *(ratio_of_present(group, {"mamba-ssm": 3.0}) for group in GPU_SHORTS),
    Ratio(GPU_EXPONENTIALS, "fastmem", {"exponentials": 0.6}),
    Ratio(GPU_SECOND, "fastmem", {"loop": 10.0, "usual loop": 10.0}),
    *(Ratio(group, "fastmem", {"expression": 1.0}) for group in GPU_DECODE),
]

"""selective_scan on the GPU: block sizes, and how its programs, those of selective_scan_programs.py, are launched."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from fastmem.kernels._device import on
from fastmem.kernels.selective_scan_backward import _backward
from fastmem.kernels.selective_scan_programs import _carry, _forward, _local, _step
from torch import Tensor

from fastmem.ops._selective_scan_autograd import CHUNK

MAX_N = 256
WARPS = 1188  # that an H100 holds of `_forward`, nine to a multiprocessor
BACKWARD_WARPS = 1056  # and of `_backward`; more of them wait, and each has scratch, which should stay in the cache
CARRY_CONFIG = {"b": 128, "b_t": 4, "num_warps": 4}


def scan_config(N: int, width: int, dual: bool) -> dict[str, int]:
    """Block sizes of `_local` and `_forward`: one warp, up to 16 states (with `dual` 8) to a thread.

    More of them spill in some variant. `width`: channels of a group.
    """
    b_n = triton.next_power_of_2(N)
    b_d = min(32, (256 if dual else 512) // b_n, triton.next_power_of_2(max(width, 1)))
    b_t = 1 if b_n > 64 else 4 if 4 <= b_n <= 16 and not dual else 2  # where more spill
    return {"b_d": b_d, "b_n": b_n, "b_t": b_t, "num_warps": 1}


def backward_config(N: int, dual: bool) -> dict[str, int]:
    """Block sizes of `_backward`: up to 8 states (with `dual` 4) to a thread, which holds several of each.

    Loads ahead spill in some variant of most sizes, not of the usual one.
    """
    b_n = triton.next_power_of_2(N)
    states = 128 if dual else 256  # to a warp
    b_d = min(32, max(states // b_n, states // 16), 8 * states // b_n)
    b_t = 1 if dual or b_n > 32 else 2  # where 2 spill
    warps = max(1, b_d * b_n // states)
    return {"b_d": b_d, "b_n": b_n, "b_t": b_t, "ahead": b_n == 16, "num_warps": warps}


@functools.cache
def step_config(N: int) -> dict[str, int]:
    """Block sizes of `_step`."""
    b_n = triton.next_power_of_2(N)
    return {"b_d": max(4, 512 // b_n), "b_n": b_n, "num_warps": 1 if b_n <= 128 else 2}


def split(L: int, warps: int, most: int, least: int) -> tuple[int, int]:
    """(segments, steps to a segment), given how many warps there are without a split, and how many there may be.

    Fewer segments than `least` do not pay.
    """
    chunks = triton.cdiv(L, CHUNK)
    segments = min(chunks, most // max(warps, 1))
    if segments < least:
        return 1, max(L, 1)
    per_segment = triton.cdiv(chunks, segments) * CHUNK
    return triton.cdiv(L, per_segment), per_segment


def refuses(dtype: torch.dtype, N: int) -> str | None:
    """Why these kernels cannot serve a call whose state is kept in `dtype`, or None."""
    if dtype == torch.float64:
        return "the Triton kernels compute in float32, inputs are float64"
    if N > MAX_N:
        return f"N is {N}; the Triton kernels go up to {MAX_N}"
    return None


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


class _Call:
    """The inputs of a call as the kernels take them, and along a direction or not."""

    def __init__(self, inputs: tuple[Any, ...], directions: tuple[Tensor | None, ...] | None = None) -> None:
        u, delta, A, B, C, D, z, bias, state, reset, cu_seqlens, self.softplus = inputs
        self.u, self.delta, self.B, self.C = map(_rows, (u, delta, B, C))
        self.z = None if z is None else _rows(z)
        contiguous = [None if x is None else x.contiguous() for x in (A, D, bias, state, reset)]
        self.A, self.D, self.bias, self.state, self.reset = contiguous
        self.cu_seqlens = cu_seqlens
        self.dual = directions is not None
        self.to = tuple(None if x is None else x.contiguous() for x in directions or (None,) * 9)
        self.R, self.L, self.width = u.shape
        self.P, _, self.N = A.shape
        self.G = B.shape[2]
        self.packed = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.S = self.R * self.packed
        self.per_set = max(1, self.S // self.P)

    def strides(self, *more: Tensor) -> list[int]:
        z = (0, 0) if self.z is None else self.z.stride()[:2]
        streams = [*self.u.stride()[:2], *self.delta.stride()[:2], *self.B.stride()[:3], *self.C.stride()[:3], *z]
        return streams + [stride for x in more for stride in x.stride()[:2]]

    def decays(self, programs: int) -> tuple[Tensor, Tensor | None, list[int]]:
        """A, its direction, and how far channels and states lie. Many programs read it along their lanes."""
        to_A = self.to[2]
        if programs <= WARPS:
            return self.A, to_A, [self.N, 1]
        A, to_A = (None if x is None else x.mT.contiguous() for x in (self.A, to_A))
        return A, to_A, [1, self.width]

    def blocks(self, config: dict[str, int]) -> tuple[int, int]:
        """Blocks of channels, and how many of them a group has."""
        per_group = triton.cdiv(self.width // self.G, config["b_d"])
        return self.G * per_group, per_group

    def empty(self, *shape: int) -> Tensor:
        return self.A.new_empty(shape)

    def final(self, saved: bool) -> Tensor:
        return self.empty(self.S, self.width, self.N) if saved else self.empty(0)


def _starts(call: _Call, segments: int, per_segment: int, grad_y: Tensor | None, first: Tensor | None) -> Tensor | None:
    """What comes into each segment (1 or 2, S, segments, N, D): states, or given grad_y adjoints. None: one segment."""
    if segments == 1:
        return None
    adjoint = grad_y is not None
    grad_y = call.u if grad_y is None else grad_y
    config = scan_config(call.N, call.width // call.G, call.dual)
    blocks, per_group = call.blocks(config)
    copies = 2 if call.dual else 1
    ends = call.empty(copies, call.S, segments, call.N, call.width)
    sums = call.empty(copies, call.S, segments, call.width)
    dropped = torch.empty(call.S, segments, dtype=torch.int8, device=ends.device)
    to_u, to_delta, _, to_B, to_C, _, to_z, to_bias, to_state = call.to
    A, to_A, by_A = call.decays(call.S * segments * blocks)
    sizes = call.L, call.width, call.packed, call.per_set, call.S, segments, per_segment
    _local[(call.S * segments * blocks,)](
        call.u, call.delta, A, call.B, call.C, call.z, call.bias, call.reset, call.cu_seqlens, grad_y,
        to_u, to_delta, to_A, to_B, to_C, to_z, to_bias,
        ends, sums, dropped, *call.strides(), *by_A, *grad_y.stride()[:2], *sizes, blocks, call.G, per_group,
        N=call.N, softplus=call.softplus, adjoint=adjoint, dual=call.dual, **config,
    )  # fmt: skip
    blocks = triton.cdiv(call.N * call.width, CARRY_CONFIG["b"])
    _carry[(call.S * blocks,)](
        ends, sums, dropped, call.A, call.to[2], first, None if adjoint else to_state, call.cu_seqlens, *sizes, blocks,
        N=call.N, adjoint=adjoint, dual=call.dual, **CARRY_CONFIG,
    )  # fmt: skip
    return ends


def _run_forward(call: _Call, y: Tensor, final: Tensor | None, carries: Tensor | None) -> None:
    config = scan_config(call.N, call.width // call.G, call.dual)
    blocks, per_group = call.blocks(config)
    if call.S * blocks == 0:
        return
    segments, per_segment = split(call.L, call.S * blocks * config["num_warps"], WARPS, 3)  # exponentials double
    starts = _starts(call, segments, per_segment, None, call.state)
    plane = call.R * (call.L // CHUNK) * call.N * call.width
    A, to_A, by_A = call.decays(call.S * segments * blocks)
    _forward[(call.S * segments * blocks,)](
        call.u, call.delta, A, call.B, call.C, call.D, call.z, call.bias, call.state, call.reset, call.cu_seqlens,
        *call.to[:2], to_A, *call.to[3:], starts, y, final, carries, *call.strides(), *by_A,
        call.L, call.width, call.packed, call.per_set, call.S, segments, per_segment, blocks, call.G, per_group, plane,
        N=call.N, softplus=call.softplus, dual=call.dual, chunk=CHUNK, **config,
    )  # fmt: skip


def _run_backward(call: _Call, grad_y: Tensor, grad_final: Tensor | None, carries: Tensor) -> tuple[Tensor, ...]:
    R, L, width, P, N, G, S = call.R, call.L, call.width, call.P, call.N, call.G, call.S
    grad_y = _rows(grad_y)
    grad_final = None if grad_final is None else grad_final.contiguous()
    grad_u, grad_delta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (call.u, call.delta))
    grad_z = None if call.z is None else torch.empty_like(call.z, memory_format=torch.contiguous_format)
    grad_state = None if call.state is None else torch.empty_like(call.state)
    config = backward_config(N, call.dual)
    blocks, per_group = call.blocks(config)
    segments, per_segment = split(L, S * blocks * config["num_warps"], BACKWARD_WARPS, 2)
    direct = per_group == 1  # the gradients of B and C need no more sum
    grad_B, grad_C = (
        torch.empty(per_group, R, L, G, N, dtype=x.dtype if direct else torch.float32, device=x.device)
        for x in (call.B, call.C)
    )
    of_set, most = S // P * segments, BACKWARD_WARPS // (max(blocks, 1) * config["num_warps"])
    a_set = min(of_set, max(1, most // P))
    teams = P * a_set
    grad_A = call.empty(teams, N, width)
    grad_D = None if call.D is None else call.empty(teams, width)
    grad_bias = None if call.bias is None else call.empty(teams, width)
    if S * blocks > 0:
        starts = _starts(call, segments, per_segment, grad_y, grad_final)
        states = config["b_n"] * config["b_d"] * (2 if call.dual else 1)
        programs = blocks * min(teams, max(1, most))
        kept = call.empty(programs, CHUNK // config["b_t"], states)
        _backward[(programs,)](
            call.u, call.delta, call.A, call.B, call.C, call.D, call.z, call.bias, call.state, call.reset,
            call.cu_seqlens, *call.to, grad_y, grad_final, starts, carries, kept,
            grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_state,
            *call.strides(grad_y), L, width, call.packed, call.per_set, S, segments, per_segment, blocks, G, per_group,
            R * (L // CHUNK) * N * width, R * L * G * N, teams, a_set,
            N=N, softplus=call.softplus, dual=call.dual, chunk=CHUNK, **config,
        )  # fmt: skip

    def per_set(partial: Tensor | None) -> Tensor:
        return call.empty(0) if partial is None else partial.view(P, a_set, *partial.shape[1:]).sum(1)

    grad_B, grad_C = (
        grad[0] if direct else grad.sum(0).to(x.dtype) for grad, x in ((grad_B, call.B), (grad_C, call.C))
    )
    absent = call.u.new_empty(0)
    return (
        grad_u,
        grad_delta,
        per_set(grad_A).transpose(1, 2).contiguous(),
        grad_B,
        grad_C,
        absent if grad_D is None else per_set(grad_D),
        absent if grad_z is None else grad_z,
        absent if grad_bias is None else per_set(grad_bias),
        absent if grad_state is None else grad_state,
    )


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The raw op fastmem::selective_scan_forward."""
    *inputs, save_final, save_carries = args
    call = _Call(tuple(inputs))
    y = torch.empty_like(call.u, memory_format=torch.contiguous_format)
    final = call.final(save_final)
    carries = call.empty(call.R, call.L // CHUNK if save_carries else 0, call.N, call.width)
    with on(y):
        _run_forward(call, y, final if save_final else None, carries if save_carries else None)
    return y, final, carries


def backward(
    grad_y: Tensor, grad_final: Tensor | None, carries: Tensor, wanted: list[bool], *inputs: Any
) -> tuple[Tensor, ...]:
    """The raw op fastmem::selective_scan_backward."""
    with on(grad_y):
        return _of(wanted, _run_backward(_Call(inputs), grad_y, grad_final, carries.contiguous()))


def _of(wanted: list[bool], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The kernel computes all gradients; nothing is left of those that are not wanted."""
    return tuple(grad if want else grad.new_empty(0) for grad, want in zip(grads, wanted, strict=True))


def tangent(*args: Any) -> tuple[Tensor, ...]:
    """The raw op fastmem::selective_scan_tangent."""
    directions, (grad_y, grad_final, wanted, *inputs) = args[:9], args[9:]
    call = _Call(tuple(inputs), directions)
    y = torch.empty_like(call.u, memory_format=torch.contiguous_format)
    final = call.final(grad_final is not None)
    carries = call.empty(2, call.R, call.L // CHUNK, call.N, call.width)  # of the states, and of their tangents
    with on(y):
        _run_forward(call, y, None if grad_final is None else final, carries)
        return y, final, *_of(wanted, _run_backward(call, grad_y, grad_final, carries))


def step_(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """The raw op fastmem::selective_scan_step_."""
    (R, width), G, N = u.shape, B.shape[1], A.shape[1]
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    u, delta, B, C = map(_rows, (u, delta, B, C))
    z = None if z is None else _rows(z)
    A, D, delta_bias = (None if x is None else x.contiguous() for x in (A, D, delta_bias))
    config = step_config(N)
    blocks = triton.cdiv(width, config["b_d"])
    if R * blocks > 0:
        with on(y):
            _step[(R * blocks,)](
                state, u, delta, A, B, C, D, z, delta_bias, y,
                u.stride(0), delta.stride(0), *B.stride()[:2], *C.stride()[:2], 0 if z is None else z.stride(0),
                width, G, blocks, N=N, softplus=delta_softplus, **config,
            )  # fmt: skip
    return y

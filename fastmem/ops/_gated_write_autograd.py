"""gated_write's raw ops on the CPU, their fakes, and the autograd.Functions around them.

Given the decisions, the new bank is linear in the old one and the tokens. So there are two linear maps: replay
(forward) and backward (its transpose, tokens in reverse), each the other's derivative: all orders are exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastmem import _native
from fastmem.ops import _direct
from fastmem.ops._gated_write_reference import Rule
from fastmem.ops._library import lib


def _code(x: Tensor) -> int:
    return 1 if x.dtype == torch.float64 else 0


def _addresses(tensors: tuple[Tensor | None, ...] | list[Tensor | None]) -> tuple[int, ...]:
    return tuple(0 if x is None else x.data_ptr() for x in tensors)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _results(bank: tuple[Tensor, ...], keys: Tensor) -> tuple[Tensor, ...]:
    """Empty results of the raw op gated_write, contiguous."""
    B, T = keys.shape[:2]
    new_bank = tuple(x.new_empty(x.shape) for x in bank)
    stats = tuple(keys.new_zeros(B) for _ in range(3))
    slot, route = keys.new_empty((B, T), dtype=torch.int64), keys.new_empty((B, T), dtype=torch.int8)
    return *new_bank, *stats, slot, *(keys.new_empty((B, T)) for _ in range(3)), route


def _gated_write_cpu(
    bank_keys: Tensor,  # (B, S, E)
    bank_values: Tensor,  # (B, S, F)
    strength: Tensor,  # (B, S)
    access: Tensor,  # (B, S)
    age: Tensor,  # (B, S)
    keys: Tensor,  # (B, T, E)
    values: Tensor,  # (B, T, F)
    surprise: Tensor | None,  # (B, T)
    mean: Tensor | None,  # (B,)
    var: Tensor | None,  # (B,)
    count: Tensor | None,  # (B,)
    mask: Tensor | None,  # (B, T)
    rule: list[float],
) -> tuple[Tensor, ...]:
    bank = (bank_keys, bank_values, strength, access, age)
    out = _results(bank, keys)
    inputs = _contiguous(*bank, keys, values, surprise, mean, var, count, mask)
    sizes = (*bank_keys.shape[:2], keys.shape[1], bank_keys.shape[2], bank_values.shape[2])
    assert _native.kernels is not None
    _native.kernels.gated_write(
        _code(keys), sizes, tuple(rule), _addresses(inputs), _addresses(out), torch.get_num_threads()
    )
    return out


def _linear_cpu(
    inputs: tuple[Tensor, ...], out: tuple[Tensor, ...], decisions: tuple[Tensor, ...], transposed: bool
) -> tuple[Tensor, ...]:
    slot, blend, _ = decisions
    (B, T), (_, S, E), F = slot.shape, inputs[0].shape, inputs[1].shape[2]
    held = _contiguous(*decisions), _contiguous(*inputs)
    assert _native.kernels is not None
    _native.kernels.gated_write_linear(
        _code(blend), (B, S, T, E, F), *map(_addresses, held), _addresses(out), transposed, torch.get_num_threads()
    )
    return out


def _replay_results(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:3])


def _backward_results(*inputs: Tensor) -> tuple[Tensor, ...]:
    grad_keys, grad_values, grad_strength, _, blend, _ = inputs
    B, T = blend.shape
    bank = tuple(x.new_empty(x.shape) for x in (grad_keys, grad_values, grad_strength))
    return *bank, *(x.new_empty((B, T, x.shape[2])) for x in (grad_keys, grad_values)), blend.new_empty((B, T))


def _replay_cpu(*inputs: Tensor) -> tuple[Tensor, ...]:
    return _linear_cpu(inputs[:6], _replay_results(*inputs), inputs[6:], transposed=False)


def _backward_cpu(*inputs: Tensor) -> tuple[Tensor, ...]:
    return _linear_cpu(inputs[:3], _backward_results(*inputs), inputs[3:], transposed=True)


def _gated_write_cuda(*args: Any) -> tuple[Tensor, ...]:
    from fastmem.kernels import gated_write as kernels

    out = _results(args[:5], args[5])
    kernels.forward(_contiguous(*args[:12]), list(out), Rule(*args[12]))
    return out


def _replay_cuda(*inputs: Tensor) -> tuple[Tensor, ...]:
    from fastmem.kernels import gated_write as kernels

    out = _replay_results(*inputs)
    kernels.replay(_contiguous(*inputs), list(out))
    return out


def _backward_cuda(*inputs: Tensor) -> tuple[Tensor, ...]:
    from fastmem.kernels import gated_write as kernels

    out = _backward_results(*inputs)
    kernels.backward(_contiguous(*inputs), list(out))
    return out


lib.impl("gated_write", _gated_write_cpu, "CPU")
lib.impl("gated_write_replay", _replay_cpu, "CPU")
lib.impl("gated_write_backward", _backward_cpu, "CPU")
lib.impl("gated_write", _gated_write_cuda, "CUDA")
lib.impl("gated_write_replay", _replay_cuda, "CUDA")
lib.impl("gated_write_backward", _backward_cuda, "CUDA")
torch.library.register_fake("fastmem::gated_write", lambda *args: _results(args[:5], args[5]), lib=lib)
torch.library.register_fake("fastmem::gated_write_replay", _replay_results, lib=lib)
torch.library.register_fake("fastmem::gated_write_backward", _backward_results, lib=lib)


def _fold(info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> list[Any]:
    """(N, B, ...) -> (N * B, ...): a vmapped axis is more memories."""
    folded: list[Any] = []
    for x, dim in zip(args, in_dims, strict=True):
        if isinstance(x, Tensor):
            x = x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape)
            x = x.flatten(0, 1)
        folded.append(x)
    return folded


def _unfold(info: Any, out: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    N = info.batch_size
    return tuple(x.unflatten(0, (N, x.shape[0] // N)) for x in out), (0,) * len(out)


def apply(*args: Any) -> tuple[Tensor, ...]:
    """GatedWrite, or the raw op where no derivative can be asked for: binding arguments takes a Function long."""
    if _direct.untracked(*(x for x in args if isinstance(x, Tensor))):
        return torch.ops.fastmem.gated_write(*args)
    return _direct.apply(GatedWrite, *args)


class GatedWrite(Function):
    """The raw op gated_write; gradients to the bank's keys, values and strength, the tokens and their surprise."""

    @staticmethod
    def forward(
        bank_keys: Tensor,
        bank_values: Tensor,
        strength: Tensor,
        access: Tensor,
        age: Tensor,
        keys: Tensor,
        values: Tensor,
        surprise: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        count: Tensor | None,
        mask: Tensor | None,
        rule: Rule,
    ) -> tuple[Tensor, ...]:
        bank = (bank_keys, bank_values, strength, access, age)
        return torch.ops.fastmem.gated_write(*bank, keys, values, surprise, mean, var, count, mask, rule)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.gated = inputs[7] is not None
        ctx.save_for_backward(output[8], output[9], output[12])
        ctx.mark_non_differentiable(*output[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        bank_keys, bank_values, strength, keys, values, surprise = Backward.apply(*grads[:3], *ctx.saved_tensors)
        by_input = bank_keys, bank_values, strength, None, None, keys, values, surprise if ctx.gated else None
        return *by_input, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _unfold(info, GatedWrite.apply(*_fold(info, in_dims[:12], args[:12]), args[12]))


class Replay(Function):
    """The bank's keys, values, strength and the tokens' keys, values, surprise -> the new keys, values, strength."""

    @staticmethod
    def forward(
        bank_keys: Tensor,
        bank_values: Tensor,
        strength: Tensor,
        keys: Tensor,
        values: Tensor,
        surprise: Tensor,
        slot: Tensor,
        blend: Tensor,
        route: Tensor,
    ) -> tuple[Tensor, ...]:
        return torch.ops.fastmem.gated_write_replay(
            bank_keys, bank_values, strength, keys, values, surprise, slot, blend, route
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[6:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *Backward.apply(*grads, *ctx.saved_tensors), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> Any:
        return _unfold(info, Replay.apply(*_fold(info, in_dims, args)))


class Backward(Function):
    """The transpose of Replay: gradients of the new keys, values, strength -> gradients of Replay's six inputs."""

    @staticmethod
    def forward(
        grad_keys: Tensor, grad_values: Tensor, grad_strength: Tensor, slot: Tensor, blend: Tensor, route: Tensor
    ) -> tuple[Tensor, ...]:
        return torch.ops.fastmem.gated_write_backward(grad_keys, grad_values, grad_strength, slot, blend, route)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *Replay.apply(*grads, *ctx.saved_tensors), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> Any:
        return _unfold(info, Backward.apply(*_fold(info, in_dims, args)))

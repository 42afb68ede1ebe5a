"""Raw ops of causal_conv1d, their fakes, and the two autograd Functions around them.

Everything is made of one bilinear map and its transpose, so the second derivative consists of the same two again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastmem import _native
from fastmem.ops._direct import KERNELS_READ_TENSORS
from fastmem.ops._library import lib

# Shapes here: x (B, L, D); weight (K, D, W), bias (K, D), row b uses those of b // (B // K); initial and final state
# (B * n, W - 1, D) with n sequences in a row; reset (B, L); cu_seqlens (n + 1,). Weight and bias are in the dtype that
# is computed in.

# ----------------------------------------------------------------------------------------------------------------- CPU


CODES = {getattr(torch, name): code for name, code in _native.DTYPE_CODES.items()}


def _strided(x: Tensor) -> tuple[int, ...]:
    """Address and strides of row, step and channel; one channel lies as well as many."""
    return (x.data_ptr(), x.stride(0), x.stride(1), x.stride(2) if x.shape[2] > 1 else 1)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _inputs(*tensors: Tensor | None) -> tuple[list[Tensor | None], tuple[int, ...]]:
    """The tensors made contiguous, to be kept until the kernel is done, and their addresses."""
    held = [None if x is None else x.contiguous() for x in tensors]
    return held, tuple(_address(x) for x in held)


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    return (*x.shape, weight.shape[2], weight.shape[0])


def _sequences(cu_seqlens: Tensor | None) -> int:
    """Sequences in a row."""
    return 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _forward_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    assert _native.kernels is not None
    y, final_state = _results(x, weight, bias, initial_state, reset, cu_seqlens, silu)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.long()
    _held, addresses = _inputs(weight, bias, initial_state, reset, cu_seqlens)
    _native.kernels.causal_conv1d(
        CODES[x.dtype], _sizes(x, weight), _strided(x), addresses, silu, _sequences(cu_seqlens),
        (y.data_ptr(), final_state.data_ptr()), torch.get_num_threads(),
    )  # fmt: skip
    return y, final_state


def _backward_cpu(
    grad_y: Tensor,
    grad_final: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert _native.kernels is not None
    grads = _gradients(grad_y, grad_final, x, weight, bias, initial_state, reset, cu_seqlens, silu)
    present = (True, True, bias is not None, initial_state is not None)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.long()
    grad_final = grad_final.contiguous()
    _held, addresses = _inputs(weight, bias, initial_state, reset, cu_seqlens)
    _native.kernels.causal_conv1d_backward(
        CODES[x.dtype], _sizes(x, weight), _strided(x), addresses, silu, _sequences(cu_seqlens), _strided(grad_y),
        grad_final.data_ptr(), tuple(g.data_ptr() if p else 0 for g, p in zip(grads, present, strict=True)),
        torch.get_num_threads(),
    )  # fmt: skip
    return grads


def step_directly(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, new_state: Tensor) -> Any:
    """y of one step, new_state filled; None, and nothing done, where the kernel does not take the tensors as they are.

    The kernel looks at shapes, types and strides, but says nothing about what is wrong.
    """
    assert _native.kernels is not None
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    tensors = state, x, weight, bias, silu, torch.get_num_threads(), y, new_state
    return y if _native.kernels.causal_conv1d_step(*tensors) else None


def _step_cpu(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    if KERNELS_READ_TENSORS:
        new_state = torch.empty_like(state, memory_format=torch.contiguous_format)
        y = step_directly(state, x, weight, bias, silu, new_state)
        if y is not None:
            return y, new_state
    bias = None if bias is None else bias[None]
    y, new_state = _forward_cpu(x[:, None], weight[None], bias, state, None, None, silu)
    return y[:, 0], new_state


def _step_inplace_cpu(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    if KERNELS_READ_TENSORS:
        y = step_directly(state, x, weight, bias, silu, state)
        if y is not None:
            return y
    y, new_state = _step_cpu(state, x, weight, bias, silu)
    state.copy_(new_state)
    return y


# ----------------------------------------------------------------------------------------------------------------- GPU


def _forward_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    from fastmem.kernels import causal_conv1d as kernels

    results = _results(*args)
    kernels.forward(*args, *results)
    return results


def _backward_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastmem.kernels import causal_conv1d as kernels

    grads = _gradients(*args)
    kernels.backward(*args, *grads)
    return grads


def _step_cuda(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    from fastmem.kernels import causal_conv1d as kernels

    y, new_state = _step_results(state, x, weight, bias, silu)
    kernels.step(state, x, weight, bias, silu, y, new_state)
    return y, new_state


def _step_inplace_cuda(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    from fastmem.kernels import causal_conv1d as kernels

    y = x.new_empty(x.shape)
    kernels.step(state, x, weight, bias, silu, y, state)
    return y


# --------------------------------------------------------------------------------------------------- results and fakes


def _results(x, weight, bias, initial_state, reset, cu_seqlens, silu):  # type: ignore[no-untyped-def]
    """Empty y and final state."""
    B, _, D = x.shape
    return x.new_empty(x.shape), x.new_empty((B * _sequences(cu_seqlens), weight.shape[2] - 1, D))


def _gradients(  # type: ignore[no-untyped-def]
    grad_y, grad_final, x, weight, bias, initial_state, reset, cu_seqlens, silu
):
    """Empty gradients of x, weight, bias and initial state, contiguous; of no elements for what is not given."""
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, weight, bias, initial_state))


def _step_results(state, x, weight, bias, silu):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), state.new_empty(state.shape)


for _name, _cpu, _cuda, _fake in (
    ("causal_conv1d", _forward_cpu, _forward_cuda, _results),
    ("causal_conv1d_backward", _backward_cpu, _backward_cuda, _gradients),
    ("causal_conv1d_step", _step_cpu, _step_cuda, _step_results),
    ("causal_conv1d_step_", _step_inplace_cpu, _step_inplace_cuda, lambda *args: _step_results(*args)[0]),
):
    lib.impl(_name, _cpu, "CPU")
    lib.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"fastmem::{_name}", _fake, lib=lib)

# ------------------------------------------------------------------------------------------------------------ autograd


class CausalConv1d(Function):
    """(x, weight, bias, initial_state, reset, cu_seqlens, silu) -> (y, final_state), shapes as above."""

    @staticmethod
    def forward(x, weight, bias, initial_state, reset, cu_seqlens, silu):  # type: ignore[no-untyped-def,override]
        return torch.ops.fastmem.causal_conv1d(x, weight, bias, initial_state, reset, cu_seqlens, silu)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[:6])
        ctx.silu = inputs[6]

    @staticmethod
    def backward(ctx, grad_y, grad_final):  # type: ignore[no-untyped-def,override]
        x, weight, bias, initial_state, reset, cu_seqlens = ctx.saved_tensors
        grads = CausalConv1dBackward.apply(
            grad_y, grad_final, x, weight, bias, initial_state, reset, cu_seqlens, ctx.silu
        )
        wanted = zip(grads, ctx.needs_input_grad[:4], strict=True)
        return (*(grad if want else None for grad, want in wanted), None, None, None)

    @staticmethod
    def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
        *tensors, silu = args
        tasks = _Tasks(info.batch_size)
        weights = [tasks.shared(x, dim) for x, dim in zip(tensors[1:3], in_dims[1:3], strict=True)]
        if in_dims[1] is not None and in_dims[2] is None:
            weights[1] = tasks.fold(tensors[2], None)
        elif in_dims[1] is None and in_dims[2] is not None:
            weights[0] = tasks.fold(tensors[1], None)
        x, state, reset = (tasks.fold(tensors[i], in_dims[i]) for i in (0, 3, 4))
        results = CausalConv1d.apply(x, *weights, state, reset, tasks.whole(tensors[5], in_dims[5]), silu)
        return tuple(map(tasks.unfold, results)), (0, 0)


class CausalConv1dBackward(Function):
    """Gradients of (x, weight, bias, initial_state), those of no elements where None was given."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        grad_y, grad_final, x, weight, bias, initial_state, reset, cu_seqlens, silu
    ):
        return torch.ops.fastmem.causal_conv1d_backward(
            grad_y, grad_final, x, weight, bias, initial_state, reset, cu_seqlens, silu
        )

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[:8])
        ctx.silu = inputs[8]

    @staticmethod
    def backward(ctx, v_x, v_weight, v_bias, v_state):  # type: ignore[no-untyped-def,override]
        """docs/ops/causal_conv1d.md, second derivative; v are the cotangents."""
        grad_y, grad_final, x, weight, bias, state, reset, cu_seqlens = ctx.saved_tensors
        dtypes = grad_y.dtype, grad_final.dtype, x.dtype, weight.dtype, x.dtype, x.dtype
        compute = weight.dtype
        grad_y, x, v_x = grad_y.to(compute), x.to(compute), v_x.to(compute)
        if state is not None:
            state, v_state = state.to(compute), v_state.to(compute)
        else:
            v_state = None
        v_bias = None if bias is None else v_bias

        def conv(x, weight, bias, state):  # type: ignore[no-untyped-def]
            return CausalConv1d.apply(x, weight, bias, state, reset, cu_seqlens, False)

        def transposed(grad, x, weight, bias, state):  # type: ignore[no-untyped-def]
            no_final = torch.zeros_like(v_final)
            return CausalConv1dBackward.apply(grad, no_final, x, weight, bias, state, reset, cu_seqlens, False)

        along_x, v_final = conv(v_x, weight, None, v_state)
        along = along_x + conv(x, v_weight, v_bias, state)[0]  # the change of the sum before the activation
        if not ctx.silu:
            onto_grad_y, grad = along, grad_y
            second = [None] * 4
        else:
            pre = conv(x, weight, bias, state)[0]
            s = torch.sigmoid(pre)
            first = s * (1 + pre * (1 - s))
            onto_grad_y, grad = first * along, grad_y * first
            curved = s * (1 - s) * (2 + pre * (1 - 2 * s))
            second = transposed(grad_y * curved * along, x, weight, bias, state)
        mixed = transposed(grad, v_x, v_weight, None, v_state)
        totals = [
            onto_grad_y,
            v_final,
            *(a if b is None else a + b for a, b in zip(mixed[:2], second[:2], strict=True)),
            second[2] if bias is not None and ctx.silu else None,
            None if state is None else mixed[3] if second[3] is None else mixed[3] + second[3],
        ]
        cast = [x if x is None or i == 4 else x.to(dtypes[i]) for i, x in enumerate(totals)]
        return (*cast, None, None, None)

    @staticmethod
    def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
        *tensors, silu = args
        tasks = _Tasks(info.batch_size)
        folded = [tasks.fold(x, dim) for x, dim in zip(tensors[:7], in_dims[:7], strict=True)]
        grads = CausalConv1dBackward.apply(*folded, tasks.whole(tensors[7], in_dims[7]), silu)
        given = [tensors[i] is not None for i in (2, 3, 4, 5)]
        grads = tuple(tasks.unfold(x) if there else x for x, there in zip(grads, given, strict=True))
        return grads, tuple(0 if there else None for there in given)


class _Tasks:
    """vmap's axis folded into the rows: T tasks of B rows are T * B rows, with the weights of T groups."""

    def __init__(self, count: int) -> None:
        self.count = count

    def fold(self, x: Tensor | None, dim: int | None) -> Tensor | None:
        """(N, ...) with a task axis -> (T * N, ...)."""
        if x is None:
            return None
        x = x.unsqueeze(0).expand(self.count, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    def shared(self, x: Tensor | None, dim: int | None) -> Tensor | None:
        """The same for weights, which all tasks may share where there is one group of them."""
        return x if x is not None and dim is None and x.shape[0] == 1 else self.fold(x, dim)

    def whole(self, cu_seqlens: Tensor | None, dim: int | None) -> Tensor | None:
        if dim is not None:
            raise ValueError("cu_seqlens: expected the same for all tasks of vmap, got one per task")
        return cu_seqlens

    def unfold(self, x: Tensor) -> Tensor:
        """(T * N, ...) -> (T, N, ...)."""
        return x.unflatten(0, (self.count, x.shape[0] // self.count))

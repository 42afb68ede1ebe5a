"""selective_scan's raw ops on the CPU, their fakes, and the two autograd.Functions around them.

Shapes as in _library.py. The second derivative is forward over reverse: with H the Hessian of <y, g> + <final, g'>, the
vector-Jacobian product of the backward along v is H v, which is the tangent of the backward, and the tangent of the
forward is what goes to g. Both are scans, so one more pair of passes of the same kernels on dual numbers gives it all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastmem import _native
from fastmem.ops._direct import KERNELS_READ_TENSORS
from fastmem.ops._library import lib
from fastmem.ops._topk_attention_autograd import rows

CHUNK = 64  # steps between the states that a forward keeps; the backward recomputes what lies between
INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")  # what has a gradient, in raw order


def sequences(u: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences the rows of u hold."""
    return u.shape[0] * (1 if cu_seqlens is None else cu_seqlens.shape[0] - 1)


def _final(u: Tensor, A: Tensor, cu_seqlens: Tensor | None, saved: bool) -> Tensor:
    return A.new_empty((sequences(u, cu_seqlens), *A.shape[1:]) if saved else (0,))


def _carries(u: Tensor, A: Tensor, kept: bool) -> Tensor:
    return A.new_empty(u.shape[0], u.shape[1] // CHUNK if kept else 0, A.shape[2], A.shape[1])


# ----------------------------------------------------------------------------------------------------------------- CPU


def _view(x: Tensor | None) -> tuple[int, ...] | None:
    """Address, dtype and strides of row, step and group, as csrc/selective_scan.h reads a (R, L, [G,] X) tensor."""
    if x is None:
        return None
    strides = [stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True)]
    return (x.data_ptr(), _native.DTYPE_CODES[str(x.dtype)[6:]], *(strides[:-1] + [0, 0])[:3])


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class _Call:
    """What the kernels read, brought into the form that they take; keeps it alive while they run."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        initial_state: Tensor | None,
        reset: Tensor | None,
        cu_seqlens: Tensor | None,
        delta_softplus: bool,
    ) -> None:
        (R, L, width), (P, _, N), G = u.shape, A.shape, B.shape[2]
        self.streams = [None if x is None else rows(x) for x in (u, delta, B, C, z)]
        self.parameters = [None if x is None else x.contiguous() for x in (A, D, delta_bias, initial_state)]
        self.places = [None if reset is None else reset.contiguous(), cu_seqlens]
        packed = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.arguments = (
            _native.DTYPE_CODES[str(A.dtype)[6:]],
            (R, L, width, N, G, P, packed, CHUNK),
            tuple(map(_view, self.streams)),
            tuple(map(_address, self.parameters)),
            tuple(map(_address, self.places)),
            delta_softplus,
            torch.get_num_threads(),
        )


def _forward_cpp(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, save_final, save_carries = args
    y, final, carries = _forward_fake(*args)
    call = _Call(*inputs)
    assert _native.kernels is not None
    _native.kernels.selective_scan_forward(
        *call.arguments,
        _view(y),
        final.data_ptr() if save_final else 0,
        carries.data_ptr() if save_carries else 0,
    )
    return y, final, carries


def _backward_cpp(
    grad_y: Tensor, grad_final: Tensor | None, carries: Tensor, wanted: list[bool], *inputs: Any
) -> tuple[Tensor, ...]:
    call, grads = _Call(*inputs), _gradients(wanted, *inputs)
    kept = _carries(inputs[0], inputs[2], True)
    if carries.shape != kept.shape or carries.dtype != kept.dtype:
        raise ValueError(f"carries: expected those of a forward with save_carries, {tuple(kept.shape)} in {kept.dtype}")
    grad_y, carries = rows(grad_y), carries.contiguous()
    grad_final = None if grad_final is None else grad_final.contiguous()
    assert _native.kernels is not None
    _native.kernels.selective_scan_backward(
        *call.arguments, _view(grad_y), _address(grad_final), carries.data_ptr(), *_targets(grads)
    )
    return grads


def _tangent_cpp(*args: Any) -> tuple[Tensor, ...]:
    directions, (grad_y, grad_final, wanted, *inputs) = args[:9], args[9:]
    u, A, cu_seqlens = inputs[0], inputs[2], inputs[10]
    call, grads = _Call(*inputs), _gradients(wanted, *inputs)
    to_u, to_delta, to_A, to_B, to_C, to_D, to_z, to_delta_bias, to_state = directions
    streams = [None if x is None else rows(x) for x in (to_u, to_delta, to_B, to_C, to_z)]
    parameters = [None if x is None else x.contiguous() for x in (to_A, to_D, to_delta_bias, to_state)]
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    final = _final(u, A, cu_seqlens, grad_final is not None)
    carries = A.new_empty(2, *_carries(u, A, True).shape)  # of the state, and of its tangent
    grad_y = rows(grad_y)
    grad_final = None if grad_final is None else grad_final.contiguous()
    assert _native.kernels is not None
    _native.kernels.selective_scan_tangent(
        *call.arguments,
        tuple(map(_view, streams)),
        tuple(map(_address, parameters)),
        _view(grad_y),
        _address(grad_final),
        carries.data_ptr(),
        _view(y),
        0 if grad_final is None else final.data_ptr(),
        *_targets(grads),
    )
    return y, final, *grads


def _targets(grads: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The nine gradients, as the kernels take them: streams (u, delta, B, C, z) and parameters (A, D, bias, state)."""
    u, delta, A, B, C, D, z, bias, state = (grad if grad.numel() else None for grad in grads)
    return tuple(map(_view, (u, delta, B, C, z))), tuple(map(_address, (A, D, bias, state)))


def step_directly(state: Tensor, u: Tensor, *rest: Any) -> Tensor | None:
    """y of one step, the state changed; None, and nothing done, where the kernel does not take the tensors as they are.

    The kernel looks at shapes, types and strides, but says nothing about what is wrong.
    """
    assert _native.kernels is not None
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y if _native.kernels.selective_scan_step(state, u, *rest, torch.get_num_threads(), y) else None


def _step_cpp(
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
    if KERNELS_READ_TENSORS:
        y = step_directly(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        if y is not None:
            return y
    u, delta, B, C = (x[:, None] for x in (u, delta, B, C))
    z = None if z is None else z[:, None]
    D, delta_bias = (None if x is None else x[None] for x in (D, delta_bias))
    y, new, _ = _forward_cpp(u, delta, A[None], B, C, D, z, delta_bias, state, None, None, delta_softplus, True, False)
    state.copy_(new)
    return y[:, 0]


# --------------------------------------------------------------------------------------------------------------- fakes


def _forward_fake(*args):  # type: ignore[no-untyped-def]
    u, A, cu_seqlens, save_final, save_carries = args[0], args[2], args[10], args[12], args[13]
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, _final(u, A, cu_seqlens, save_final), _carries(u, A, save_carries)


def _gradients(wanted: list[bool], *inputs: Any) -> tuple[Tensor, ...]:
    """Empty gradients of the nine inputs, contiguous; of no elements for those that are absent or not wanted."""
    u = inputs[0]
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and want else u.new_empty(0)
        for x, want in zip(inputs, wanted, strict=False)
    )


def _backward_fake(grad_y, grad_final, carries, wanted, *inputs):  # type: ignore[no-untyped-def]
    return _gradients(wanted, *inputs)


def _tangent_fake(*args):  # type: ignore[no-untyped-def]
    grad_final, wanted, u, A, cu_seqlens = args[10], args[11], args[12], args[14], args[22]
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, _final(u, A, cu_seqlens, grad_final is not None), *_gradients(wanted, *args[12:])


def _forward_triton(*args: Any) -> tuple[Tensor, ...]:
    from fastmem.kernels import selective_scan

    return selective_scan.forward(*args)


def _backward_triton(*args: Any) -> tuple[Tensor, ...]:
    from fastmem.kernels import selective_scan

    return selective_scan.backward(*args)


def _tangent_triton(*args: Any) -> tuple[Tensor, ...]:
    from fastmem.kernels import selective_scan

    return selective_scan.tangent(*args)


def _step_triton(*args: Any) -> Tensor:
    from fastmem.kernels import selective_scan

    return selective_scan.step_(*args)


for _name, _cpp, _triton, _fake in (
    ("selective_scan_forward", _forward_cpp, _forward_triton, _forward_fake),
    ("selective_scan_backward", _backward_cpp, _backward_triton, _backward_fake),
    ("selective_scan_tangent", _tangent_cpp, _tangent_triton, _tangent_fake),
    ("selective_scan_step_", _step_cpp, _step_triton, lambda state, u, *rest: u.new_empty(u.shape)),
):
    lib.impl(_name, _cpp, "CPU")
    lib.impl(_name, _triton, "CUDA")
    torch.library.register_fake(f"fastmem::{_name}", _fake, lib=lib)


# ------------------------------------------------------------------------------------------------------------ autograd


class SelectiveScan(Function):
    """The inputs of the raw op, less save_carries -> (y, final state, carries)."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        u, delta, A, B, C, D, z, delta_bias, initial_state, reset, cu_seqlens, delta_softplus, save_final
    ):
        return torch.ops.fastmem.selective_scan_forward(
            u, delta, A, B, C, D, z, delta_bias, initial_state, reset, cu_seqlens, delta_softplus, save_final, True
        )

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, delta_softplus, save_final = inputs
        ctx.delta_softplus = delta_softplus
        ctx.set_materialize_grads(False)
        ctx.save_final = save_final
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors, output[2])

    @staticmethod
    def backward(ctx, grad_y, grad_final, _):  # type: ignore[no-untyped-def,override]
        *tensors, carries = ctx.saved_tensors
        if not ctx.save_final:  # a compiled graph has a gradient of that empty result, which kernels would read
            grad_final = None
        if grad_y is None:
            grad_y = torch.zeros_like(tensors[0], memory_format=torch.contiguous_format)
        wanted = _wanted(ctx.needs_input_grad)
        grads = _SelectiveScanBackward.apply(grad_y, grad_final, carries, wanted, *tensors, ctx.delta_softplus)
        return *_where_wanted(grads, tensors, wanted), None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
        *inputs, save_final = args
        folded = _fold(info, in_dims[:-1], inputs, own=False)
        return _unfold(info, SelectiveScan.apply(*folded, save_final))


class _SelectiveScanBackward(Function):
    """(grad_y, grad_final, carries, wanted, the inputs of SelectiveScan) -> the nine gradients of the raw op."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        grad_y,
        grad_final,
        carries,
        wanted,
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        initial_state,
        reset,
        cu_seqlens,
        delta_softplus,
    ):
        return torch.ops.fastmem.selective_scan_backward(
            *(grad_y, grad_final, carries, wanted),
            *(u, delta, A, B, C, D, z, delta_bias, initial_state, reset, cu_seqlens, delta_softplus),
        )

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        grad_y, grad_final, _carries, ctx.wanted, *tensors, delta_softplus = inputs
        ctx.delta_softplus = delta_softplus
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_y, grad_final, *tensors)

    @staticmethod
    def backward(ctx, *directions):  # type: ignore[no-untyped-def,override]
        grad_y, grad_final, *tensors = ctx.saved_tensors
        given = [*_where_wanted(directions, tensors, ctx.wanted)]
        wanted = _wanted(ctx.needs_input_grad[4:])
        results = _SelectiveScanTangent.apply(*given, grad_y, grad_final, wanted, *tensors, ctx.delta_softplus)
        final = None if grad_final is None else results[1]
        return results[0], final, None, None, *_where_wanted(results[2:], tensors, wanted), None, None, None

    @staticmethod
    def vmap(info, in_dims, grad_y, grad_final, carries, wanted, *inputs):  # type: ignore[no-untyped-def]
        first = _fold(info, in_dims[:3], (grad_y, grad_final, carries), own=True)
        grads = _SelectiveScanBackward.apply(*first, wanted, *_fold(info, in_dims[4:], inputs, own=True))
        return _unfold(info, grads)


class _SelectiveScanTangent(Function):
    """(nine directions, grad_y, grad_final, wanted, the inputs of SelectiveScan) -> what the raw op gives."""

    @staticmethod
    def forward(*args):  # type: ignore[no-untyped-def,override]
        return torch.ops.fastmem.selective_scan_tangent(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, *_):  # type: ignore[no-untyped-def,override]
        raise RuntimeError(
            "selective_scan: the third derivative, which hvp takes too, is not available from the kernels; "
            "backend='reference' has it, and vhp gives a Hessian times a vector without it"
        )

    @staticmethod
    def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
        first = _fold(info, in_dims[:11], args[:11], own=True)
        tangents = _SelectiveScanTangent.apply(*first, args[11], *_fold(info, in_dims[12:], args[12:], own=True))
        return _unfold(info, tangents)


def _where_wanted(grads, inputs, wanted):  # type: ignore[no-untyped-def]
    return (grad if want and x is not None else None for grad, x, want in zip(grads, inputs, wanted, strict=False))


def _wanted(needed):  # type: ignore[no-untyped-def]
    return [bool(need) for need in needed[: len(INPUTS)]]


PARAMETERS = (2, 5, 7)  # A, D and delta_bias among the inputs: they may be one set for all tasks
RESET, CU_SEQLENS = 9, 10


def _fold(info: Any, in_dims: tuple[int | None, ...], tensors: Sequence[Any], own: bool) -> list[Any]:
    """vmap's axis folded into the rows, tasks first: (T, R, ...) -> (T * R, ...).

    The parameters become T sets, unless all tasks share them and no gradient of their `own` is asked for.
    """
    if info.batch_size == 0:
        raise ValueError("selective_scan: vmap over no tasks")

    def fold(x: Tensor, dim: int | None) -> Tensor:
        x = x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    is_call = len(tensors) == len(INPUTS) + 3
    shared = is_call and not own and all(in_dims[i] is None and _sets(tensors[i]) == 1 for i in PARAMETERS)
    folded: list[Any] = []
    for i, (x, dim) in enumerate(zip(tensors, in_dims, strict=True)):
        if is_call and i == CU_SEQLENS and dim is not None:
            raise ValueError("cu_seqlens: expected the same for all tasks of vmap, got one per task")
        alone = not isinstance(x, Tensor) or (is_call and (i == CU_SEQLENS or (shared and i in PARAMETERS)))
        folded.append(x if alone else fold(x, dim))
    return folded


def _sets(x: Tensor | None) -> int:
    return 1 if x is None else x.shape[0]


def _unfold(info: Any, results: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    T = info.batch_size
    whole = [x.dim() > 1 for x in results]  # the empty gradients of absent inputs are (0,)
    out = tuple(x.unflatten(0, (T, x.shape[0] // T)) if yes else x for x, yes in zip(results, whole, strict=True))
    return out, tuple(0 if yes else None for yes in whole)

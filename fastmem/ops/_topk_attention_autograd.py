"""Raw ops of topk_attention with top_k given, and the two autograd Functions around them.

The second derivative differentiates the reference on the rows that were chosen, so it is exact at any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastmem import _native
from fastmem.ops import _topk_attention_reference as definition
from fastmem.ops._library import lib

# ----------------------------------------------------------------------------------------------------------------- CPU


def rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous; everything else is read in place, expanded dimensions too."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def view(x: Tensor | None) -> tuple[int, tuple[int, ...], tuple[int, ...]] | None:
    """Address, shape and strides, as csrc/bindings.cpp reads them."""
    return None if x is None else (x.data_ptr(), x.shape, x.stride())


def target(x: Tensor | None) -> tuple[Any, int, int] | None:
    """A gradient's view, and its own batches and heads."""
    return None if x is None else (view(x), x.shape[0], x.shape[1])


def sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """(B, H, Q, S, E, F) of a call."""
    return (*q.shape[:3], k.shape[2], q.shape[3], v.shape[3])


def _forward_cpp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    top_k: int,
    factor: float,
    cosine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    assert _native.kernels is not None
    out, indices, weights = _forward_fake(q, k, v, scale, bias, mask, top_k, factor, cosine)
    q, k, v = rows(q), rows(k), rows(v)
    _native.kernels.topk_attention_forward(
        _native.DTYPE_CODES[str(q.dtype)[6:]],
        sizes(q, k, v),
        top_k,
        factor,
        cosine,
        torch.get_num_threads(),
        *map(view, (q, k, v, scale, bias, mask, out, indices, weights)),
    )
    return out, indices, weights


def _backward_cpp(
    grad_out: Tensor,
    grad_weights: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    factor: float,
    cosine: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert _native.kernels is not None
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if want and x is not None else None
        for x, want in zip((q, k, v, scale, bias), wanted, strict=True)
    ]
    per_query = None if grads[3] is None else weights.new_empty(weights.shape[:3])  # gradient of scale, before its sum
    q, k, v, grad_out = rows(q), rows(k), rows(v), rows(grad_out)
    grad_weights, indices, weights = rows(grad_weights), rows(indices), rows(weights)
    _native.kernels.topk_attention_backward(
        _native.DTYPE_CODES[str(q.dtype)[6:]],
        sizes(q, k, v),
        indices.shape[3],
        factor,
        cosine,
        torch.get_num_threads(),
        *map(view, (q, k, v, scale, grad_out, grad_weights, indices, weights, grads[0], per_query)),
        *map(target, (grads[1], grads[2], grads[4])),
    )
    if per_query is not None and scale is not None:
        grads[3] = per_query.sum(2).sum_to_size(scale.shape)
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore[return-value]


@torch.library.register_fake("fastmem::topk_attention_forward", lib=lib)
def _forward_fake(q, k, v, scale, bias, mask, top_k, factor, cosine):  # type: ignore[no-untyped-def]
    B, H, Q = q.shape[:3]
    out = q.new_empty(B, H, Q, v.shape[3])
    indices = q.new_empty(B, H, Q, top_k, dtype=torch.int64)
    return out, indices, q.new_empty(B, H, Q, top_k, dtype=definition.compute_dtype(q.dtype))


@torch.library.register_fake("fastmem::topk_attention_backward", lib=lib)
def _backward_fake(  # type: ignore[no-untyped-def]
    grad_out, grad_weights, q, k, v, scale, bias, indices, weights, factor, cosine, wanted
):
    return tuple(
        q.new_empty(0) if x is None or not want else x.new_empty(x.shape)
        for x, want in zip((q, k, v, scale, bias), wanted, strict=True)
    )


def _forward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fastmem.kernels import topk_attention

    return topk_attention.forward(*args)


def _backward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from fastmem.kernels import topk_attention

    return topk_attention.backward(*args)


lib.impl("topk_attention_forward", _forward_cpp, "CPU")
lib.impl("topk_attention_backward", _backward_cpp, "CPU")
lib.impl("topk_attention_forward", _forward_triton, "CUDA")
lib.impl("topk_attention_backward", _backward_triton, "CUDA")

# ------------------------------------------------------------------------------------------------------------ autograd


class TopkAttention(Function):
    """(q, k, v, scale, bias, mask, top_k, factor, cosine) -> (out, indices, weights), shapes as in the raw op."""

    @staticmethod
    def forward(q, k, v, scale, bias, mask, top_k, factor, cosine):  # type: ignore[no-untyped-def,override]
        return torch.ops.fastmem.topk_attention_forward(q, k, v, scale, bias, mask, top_k, factor, cosine)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        q, k, v, scale, bias, _mask, _top_k, factor, cosine = inputs
        _out, indices, weights = output
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(q, k, v, scale, bias, indices, weights)
        ctx.factor, ctx.cosine = factor, cosine

    @staticmethod
    def backward(ctx, grad_out, _grad_indices, grad_weights):  # type: ignore[no-untyped-def,override]
        q, k, v, scale, bias, indices, weights = ctx.saved_tensors
        wanted = [bool(need) for need in ctx.needs_input_grad[:5]]
        grads = _TopkAttentionBackward.apply(
            grad_out, grad_weights, q, k, v, scale, bias, indices, weights, ctx.factor, ctx.cosine, wanted
        )
        return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None, None)

    @staticmethod
    def vmap(info, in_dims, q, k, v, scale, bias, mask, top_k, factor, cosine):  # type: ignore[no-untyped-def]
        tasks = Tasks(info.batch_size, q, in_dims[0])
        folded = [tasks.shared(x, dim) for x, dim in zip((k, v, scale, bias, mask), in_dims[1:6], strict=True)]
        results = TopkAttention.apply(tasks.fold(q, in_dims[0]), *folded, top_k, factor, cosine)
        return tuple(tasks.unfold(x) for x in results), (0, 0, 0)


class _TopkAttentionBackward(Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        grad_out, grad_weights, q, k, v, scale, bias, indices, weights, factor, cosine, wanted
    ):
        return torch.ops.fastmem.topk_attention_backward(
            grad_out, grad_weights, q, k, v, scale, bias, indices, weights, factor, cosine, wanted
        )

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, indices, _weights, factor, cosine, wanted = inputs
        ctx.save_for_backward(*tensors, indices)
        ctx.factor, ctx.cosine, ctx.wanted = factor, cosine, wanted

    @staticmethod
    def backward(ctx, *cotangents):  # type: ignore[no-untyped-def,override]
        """Differentiates the first backward as a function of these inputs; the saved weights are one of its steps."""
        *tensors, indices = ctx.saved_tensors  # grad_out, grad_weights, q, k, v, scale, bias

        def attend(q, k, v, scale, bias):  # type: ignore[no-untyped-def]
            return definition.attend(q, k, v, scale, bias, indices, ctx.factor, ctx.cosine)

        return (*second_derivative(attend, 2, tensors, ctx.wanted, cotangents), None, None, None, None, None)

    @staticmethod
    def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
        *tensors, factor, cosine, wanted = args
        tasks = Tasks(info.batch_size, tensors[2], in_dims[2])
        folded = [
            tasks.fold(x, dim) if place not in (3, 4, 5, 6) else tasks.own(x, dim)
            for place, (x, dim) in enumerate(zip(tensors, in_dims, strict=False))
        ]
        grads = _TopkAttentionBackward.apply(*folded, factor, cosine, wanted)
        return tasks.unfold_grads(grads, tensors[2:7], in_dims[2:7], wanted)


def second_derivative(
    attend: Callable[..., Any],
    results: int,
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    cotangents: Sequence[Tensor],
) -> list[Tensor | None]:
    """Vector-Jacobian product of the backward of `attend`.

    Args:
        attend: the forward, in differentiable PyTorch, of all tensors after the first `results`.
        results: how many tensors `attend` returns; as many gradients stand first in `tensors`.
        tensors: the inputs of the backward; None where the call had none.
        wanted: per input of `attend`, whether the backward computed its gradient.
        cotangents: one per input of `attend`; looked at where `wanted`.

    Returns:
        A gradient for each of `tensors`, None where that is None.
    """
    present = [i for i, x in enumerate(tensors) if x is not None]
    chosen = [i for i, want in enumerate(wanted) if want]

    def backward(*given: Tensor) -> tuple[Tensor, ...]:
        values: list[Any] = [None] * len(tensors)
        for i, x in zip(present, given, strict=True):
            values[i] = x
        grads, inputs = values[:results], values[results:]

        def forward(*primals: Tensor) -> Any:
            full = list(inputs)
            for i, x in zip(chosen, primals, strict=True):
                full[i] = x
            return attend(*full)

        _, pull = torch.func.vjp(forward, *(inputs[i] for i in chosen))  # type: ignore[misc]
        return pull(tuple(grads) if results > 1 else grads[0])

    _, pull = torch.func.vjp(backward, *(x for x in tensors if x is not None))  # type: ignore[misc]
    found: list[Tensor | None] = [None] * len(tensors)
    for i, grad in zip(present, pull(tuple(cotangents[i] for i in chosen)), strict=True):
        found[i] = grad
    return found


class Tasks:
    """vmap's axis folded into the batch: T tasks of batch B become one call of batch T * B."""

    def __init__(self, count: int, q: Tensor, dim: int | None) -> None:
        self.count = count
        self.batch = (q if dim is None else q.movedim(dim, 0)[0]).shape[0]

    def _apart(self, x: Tensor, dim: int | None) -> Tensor:
        return x.unsqueeze(0).expand(self.count, *x.shape) if dim is None else x.movedim(dim, 0)

    def fold(self, x: Tensor, dim: int | None) -> Tensor:
        """(B, ...) with a task axis -> (T * B, ...)."""
        return self._apart(x, dim).flatten(0, 1)

    def own(self, x: Tensor | None, dim: int | None) -> Tensor | None:
        """(B or 1, ...) -> (T * B, ...), so that every task gets its own gradient; expanded rather than copied."""
        if x is None:
            return None
        x = self._apart(x, dim)
        return x.expand(-1, self.batch, *x.shape[2:]).flatten(0, 1)

    def shared(self, x: Tensor | None, dim: int | None) -> Tensor | None:
        """(B or 1, ...) -> (T * B or 1, ...), so that what all tasks share is read in place."""
        return x if x is None or (dim is None and x.shape[0] == 1) else self.own(x, dim)

    def unfold(self, x: Tensor) -> Tensor:
        """(T * B, ...) -> (T, B, ...)."""
        return x.unflatten(0, (self.count, self.batch))

    def unfold_grads(
        self,
        grads: Sequence[Tensor],
        inputs: Sequence[Tensor | None],
        dims: Sequence[int | None],
        wanted: Sequence[bool],
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        """Gradients of a folded call, and where their task axis is; summed over B for what a task's batch shares."""
        unfolded: list[Tensor] = []
        for grad, x, dim, want in zip(grads, inputs, dims, wanted, strict=True):
            if want and x is not None:
                grad = self.unfold(grad)
                if (x if dim is None else x.movedim(dim, 0)[0]).shape[0] < self.batch:
                    grad = grad.sum(1, keepdim=True)
            unfolded.append(grad)
        return tuple(unfolded), tuple(0 if want else None for want in wanted)

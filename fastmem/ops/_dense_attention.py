"""topk_attention with top_k=None, plain attention over every usable slot: raw ops and autograd.

`DenseAttention` is C++ on the CPU. `sdpa` is for everything else: torch's scaled_dot_product_attention forwards, and
the reference differentiated. The second derivative differentiates the reference in both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastmem import _native
from fastmem.ops import _topk_attention_reference as definition
from fastmem.ops._library import lib
from fastmem.ops._topk_attention_autograd import Tasks, rows, second_derivative, sizes, view


def forward_cpp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    factor: float,
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    """The raw op on the CPU, which a call that nothing intercepts may take past the dispatcher."""
    assert _native.kernels is not None
    out, lse = _forward_fake(q, k, v, scale, bias, mask, factor, cosine)
    q, k, v = rows(q), rows(k), rows(v)
    _native.kernels.dense_attention_forward(
        _native.DTYPE_CODES[str(q.dtype)[6:]],
        sizes(q, k, v),
        factor,
        cosine,
        torch.get_num_threads(),
        *map(view, (q, k, v, scale, bias, mask, out, lse)),
    )
    return out, lse


def _backward_cpp(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    factor: float,
    cosine: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert _native.kernels is not None
    # The kernel sums each of these over what all of them share; the rest is summed below.
    bank = [x for x in (k, v, bias) if x is not None]
    nb, nh = (next((x.shape[dim] for x in bank if x.shape[dim] != 1), 1) for dim in (0, 1))
    want_q, want_k, want_v, want_scale, want_bias = wanted
    grad_q = q.new_empty(q.shape) if want_q else None
    grad_k = k.new_empty(nb, nh, *k.shape[2:]) if want_k else None
    grad_v = v.new_empty(nb, nh, *v.shape[2:]) if want_v else None
    grad_bias = bias.new_empty(nb, nh, bias.shape[2]) if want_bias and bias is not None else None
    grad_scale = lse.new_empty(lse.shape) if want_scale and scale is not None else None  # per query
    q, k, v, grad_out, out = rows(q), rows(k), rows(v), rows(grad_out), rows(out)
    _native.kernels.dense_attention_backward(
        _native.DTYPE_CODES[str(q.dtype)[6:]],
        sizes(q, k, v),
        factor,
        cosine,
        torch.get_num_threads(),
        nb,
        nh,
        *map(view, (q, k, v, scale, bias, mask, grad_out, out, lse, grad_q, grad_scale, grad_k, grad_v, grad_bias)),
    )
    if grad_scale is not None:
        grad_scale = grad_scale.sum(2)
    return tuple(  # type: ignore[return-value]
        q.new_empty(0) if grad is None or x is None else grad.sum_to_size(x.shape)
        for grad, x in zip((grad_q, grad_k, grad_v, grad_scale, grad_bias), (q, k, v, scale, bias), strict=True)
    )


@torch.library.register_fake("fastmem::dense_attention_forward", lib=lib)
def _forward_fake(q, k, v, scale, bias, mask, factor, cosine):  # type: ignore[no-untyped-def]
    B, H, Q = q.shape[:3]
    return q.new_empty(B, H, Q, v.shape[3]), q.new_empty(B, H, Q, dtype=definition.compute_dtype(q.dtype))


@torch.library.register_fake("fastmem::dense_attention_backward", lib=lib)
def _backward_fake(  # type: ignore[no-untyped-def]
    grad_out, q, k, v, scale, bias, mask, out, lse, factor, cosine, wanted
):
    return tuple(
        q.new_empty(0) if x is None or not want else x.new_empty(x.shape)
        for x, want in zip((q, k, v, scale, bias), wanted, strict=True)
    )


lib.impl("dense_attention_forward", forward_cpp, "CPU")
lib.impl("dense_attention_backward", _backward_cpp, "CPU")


class DenseAttention(Function):
    """(q, k, v, scale, bias, mask, factor, cosine) -> (out, lse), shapes as in the raw op; lse has no gradient."""

    @staticmethod
    def forward(q, k, v, scale, bias, mask, factor, cosine):  # type: ignore[no-untyped-def,override]
        return torch.ops.fastmem.dense_attention_forward(q, k, v, scale, bias, mask, factor, cosine)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, factor, cosine = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.factor, ctx.cosine = factor, cosine

    @staticmethod
    def backward(ctx, grad_out, _grad_lse):  # type: ignore[no-untyped-def,override]
        wanted = [bool(need) for need in ctx.needs_input_grad[:5]]
        grads = _DenseAttentionBackward.apply(grad_out, *ctx.saved_tensors, ctx.factor, ctx.cosine, wanted)
        return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None)

    @staticmethod
    def vmap(info, in_dims, q, k, v, scale, bias, mask, factor, cosine):  # type: ignore[no-untyped-def]
        tasks = Tasks(info.batch_size, q, in_dims[0])
        folded = [tasks.shared(x, dim) for x, dim in zip((k, v, scale, bias, mask), in_dims[1:6], strict=True)]
        results = DenseAttention.apply(tasks.fold(q, in_dims[0]), *folded, factor, cosine)
        return tuple(tasks.unfold(x) for x in results), (0, 0)


class _DenseAttentionBackward(Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        grad_out, q, k, v, scale, bias, mask, out, lse, factor, cosine, wanted
    ):
        return torch.ops.fastmem.dense_attention_backward(
            grad_out, q, k, v, scale, bias, mask, out, lse, factor, cosine, wanted
        )

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, mask, _out, _lse, factor, cosine, wanted = inputs
        ctx.save_for_backward(*tensors, mask)
        ctx.factor, ctx.cosine, ctx.wanted = factor, cosine, wanted

    @staticmethod
    def backward(ctx, *cotangents):  # type: ignore[no-untyped-def,override]
        """Differentiates the first backward as a function of these inputs; out and lse are among its steps."""
        *tensors, mask = ctx.saved_tensors  # grad_out, q, k, v, scale, bias

        def attend(q, k, v, scale, bias):  # type: ignore[no-untyped-def]
            return definition.attend_all(q, k, v, scale, bias, mask, ctx.factor, ctx.cosine)

        return (*second_derivative(attend, 1, tensors, ctx.wanted, cotangents), *(None,) * 6)

    @staticmethod
    def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
        *tensors, factor, cosine, wanted = args
        tasks = Tasks(info.batch_size, tensors[1], in_dims[1])
        folded: list[Any] = [
            tasks.own(x, dim) if place in (2, 3, 4, 5, 6) else tasks.fold(x, dim)
            for place, (x, dim) in enumerate(zip(tensors, in_dims, strict=False))
        ]
        grads = _DenseAttentionBackward.apply(*folded, factor, cosine, wanted)
        return tasks.unfold_grads(grads, tensors[1:6], in_dims[1:6], wanted)


# ------------------------------------------------------------------------------------ torch's kernels, any other device


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    factor: float,
    cosine: bool,
) -> Tensor:
    """The reference's result by scaled_dot_product_attention."""
    dtype, compute = q.dtype, definition.compute_dtype(q.dtype)
    usable = definition.usable_slots(bias, mask)
    if usable is not None:
        k, v = (x.masked_fill(~usable.unsqueeze(-1), 0) for x in (k, v))
    if cosine:
        q, k = definition.unit(q.to(compute)), definition.unit(k.to(compute))
    q = q * factor if scale is None else q * (factor * scale[:, :, None, None])
    add, seen = None, None
    if usable is not None:
        seen = usable.any(-1)[:, :, None, None]  # where nothing is usable, everything is let through and zeroed below
        add = torch.zeros(usable.shape, dtype=dtype, device=q.device) if bias is None else bias.to(dtype)
        add = add.masked_fill(~usable, float("-inf"))[:, :, None, :].masked_fill(~seen, 0)
        add = add.expand(q.shape[0], q.shape[1], q.shape[2], -1)
    B, H = q.shape[:2]
    k, v = (x.to(dtype).expand(B, H, -1, -1) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q.to(dtype), k, v, attn_mask=add, scale=1.0)
    return out if seen is None else out.masked_fill(~seen, 0)


class SdpaAttention(Function):
    """(q, k, v, scale, bias, mask, factor, cosine) -> out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, scale, bias, mask, factor, cosine):  # type: ignore[no-untyped-def,override]
        return sdpa(q, k, v, scale, bias, mask, factor, cosine)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, factor, cosine = inputs
        ctx.save_for_backward(*tensors)
        ctx.factor, ctx.cosine = factor, cosine

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def,override]
        *tensors, mask = ctx.saved_tensors
        chosen = [i for i, x in enumerate(tensors) if x is not None and ctx.needs_input_grad[i]]

        def attend(*primals: Tensor) -> Tensor:
            full = list(tensors)
            for i, x in zip(chosen, primals, strict=True):
                full[i] = x
            q, k, v, scale, bias = full
            return definition.attend_all(q, k, v, scale, bias, mask, ctx.factor, ctx.cosine)

        _, pull = torch.func.vjp(attend, *(tensors[i] for i in chosen))  # type: ignore[misc]
        grads: list[Tensor | None] = [None] * 8
        for i, grad in zip(chosen, pull(grad_out), strict=True):
            grads[i] = grad
        return tuple(grads)

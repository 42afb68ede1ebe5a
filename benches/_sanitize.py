"""Every op on small CUDA tensors, with and without gradients, against the reference: to be run under a sanitizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastmem
from benches._harness import relative_error
from fastmem.ops import _typical


def flatten(value: Any) -> list[Tensor]:
    """All tensors inside nested tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in flatten(item)] if isinstance(value, tuple) else []


def with_leaves(value: Any, leaves: list[Tensor]) -> Any:
    """`value` with every float tensor made a leaf that wants a gradient; the leaves are appended to `leaves`."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1]
    if isinstance(value, tuple):
        items = [with_leaves(item, leaves) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def run(op: str, backend: str, device: str) -> list[Tensor]:
    """Float outputs of a typical call, those where nothing is differentiated, first and second gradients of squares."""
    args, kwargs = _typical.calls(device)[op]
    plain = flatten(getattr(fastmem, op)(*args, **kwargs, backend=backend))
    if op.endswith("_"):  # changes its first argument, and is not differentiable
        return [*plain, args[0]]
    leaves: list[Tensor] = []
    args, kwargs = with_leaves(args, leaves), {name: with_leaves(value, leaves) for name, value in kwargs.items()}
    out = [tensor for tensor in flatten(getattr(fastmem, op)(*args, **kwargs, backend=backend))]
    loss = sum(tensor.square().sum() for tensor in out if tensor.requires_grad)
    first = [g for g in torch.autograd.grad(loss, leaves, allow_unused=True, create_graph=True) if g is not None]
    second = torch.autograd.grad(sum(g.square().sum() for g in first if g.requires_grad), leaves, allow_unused=True)
    found = [*plain, *out, *first, *(g for g in second if g is not None)]
    return [t.detach() for t in found if t.is_floating_point()]


def main(backend: str = "triton", device: str = "cuda") -> None:
    for op in _typical.calls("cpu"):
        got, expected = run(op, backend, device), run(op, "reference", device)
        assert len(got) == len(expected), f"{op}: {len(got)} tensors, the reference has {len(expected)}"
        errors = [relative_error(g, e) for g, e in zip(got, expected, strict=True)]
        assert max(errors) <= 1e-4, f"{op}: relative errors {errors}"
        print(f"{op}: {len(got)} tensors within {max(errors):.1e} of the reference")


if __name__ == "__main__":
    main()

"""Every op inside torch.compile: gradients that torch.func takes in there, and graphs that record none."""

import pytest
import torch
from torch.utils import _pytree as pytree

import fastmem
from fastmem.ops import _typical

DIFFERENTIABLE = ("causal_conv1d", "causal_conv1d_step", "gated_write", "selective_scan", "topk_attention")


def loss_of(op):
    """A function of the op's float tensors alone, and these."""
    leaves, spec = pytree.tree_flatten(_typical.calls("cpu")[op])
    places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]

    def loss(*tensors):
        given = [*leaves]
        for i, x in zip(places, tensors, strict=True):
            given[i] = x
        args, kwargs = pytree.tree_unflatten(given, spec)
        out = pytree.tree_leaves(getattr(fastmem, op)(*args, **kwargs))
        return sum(x.square().sum() for x in out if isinstance(x, torch.Tensor) and x.is_floating_point())

    return loss, [leaves[i] for i in places]


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_torch_func_inside_a_compiled_function(op):
    """Dynamo takes the tensors that it differentiates for ones without gradient: a Function would be left out."""
    loss, tensors = loss_of(op)
    gradients = torch.func.grad(loss, argnums=tuple(range(len(tensors))))
    torch._dynamo.reset()
    got = torch.compile(gradients, fullgraph=True, backend="aot_eager")(*tensors)
    expected = gradients(*tensors)
    assert sum(x.abs().sum() > 0 for x in expected) >= 3
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_compiled_without_gradients(op):
    loss, tensors = loss_of(op)
    tensors = [x.requires_grad_(x.is_floating_point()) for x in tensors]
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), loss(*tensors))


def test_a_scan_is_exported_for_any_length():
    """States are kept at chunk boundaries for a gradient alone; how many must not be part of the program."""

    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return fastmem.selective_scan(u, delta, A, B, C)

    def inputs(L):
        return torch.randn(2, L, 5), torch.rand(2, L, 5), -torch.rand(5, 3), torch.randn(2, L, 3), torch.randn(2, L, 3)

    length = {1: torch.export.Dim("L", min=2)}
    with torch.no_grad():
        program = torch.export.export(Scan(), inputs(7), dynamic_shapes=(length, length, None, length, length))
    for L in (2, 63, 64, 200):
        given = inputs(L)
        torch.testing.assert_close(program.module()(*given), Scan()(*given))

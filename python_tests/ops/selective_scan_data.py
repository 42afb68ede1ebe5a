"""Calls of selective_scan for the tests beside this file."""

import torch

from fastmem.ops.selective_scan import selective_scan

OPTIONAL = ("D", "z", "delta_bias", "initial_state")


def make(
    B, L, D, N, *, G=None, dtype=torch.float32, optional=OPTIONAL, softplus=True, packed=None, reset=False, seed=0
):
    """Keyword arguments of a call. `packed`: lengths of packed sequences, which then replace B and L."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    if packed is not None:
        B, L = 1, sum(packed)

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    maps = (B, L, N) if G is None else (B, L, G, N)
    delta = randn(B, L, D)
    call = {
        "u": randn(B, L, D),
        "delta": delta if softplus else delta.abs(),
        "A": -3 * randn(D, N, dtype=kept).abs(),
        "B": randn(*maps),
        "C": randn(*maps),
    }
    more = {
        "D": lambda: randn(D, dtype=kept),
        "z": lambda: randn(B, L, D),
        "delta_bias": lambda: randn(D, dtype=kept) if softplus else randn(D, dtype=kept).abs(),
        "initial_state": lambda: randn(B if packed is None else len(packed), D, N, dtype=kept),
    }
    call |= {name: more[name]() for name in optional}
    call["delta_softplus"] = softplus
    if packed is not None:
        call["cu_seqlens"] = torch.tensor([0, *torch.tensor(packed).cumsum(0).tolist()])
    if reset:
        call["reset"] = torch.rand(B, L, generator=generator) < 0.15
    return call


def double(call):
    """The same call in float64."""
    return {k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in call.items()}


def leaves_of(call):
    """The float tensors of a call, as leaves that want a gradient, and the call with them in it."""
    leaves = {
        k: x.detach().clone().requires_grad_()
        for k, x in call.items()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    return leaves, {**call, **leaves}


def results(call, backend, *, second=False, seed=7):
    """name -> tensor: y and the final state, their gradients from random ones, and those gradients' gradients."""
    generator = torch.Generator().manual_seed(seed)

    def like(x):
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)

    leaves, call = leaves_of(call)
    y, final = selective_scan(**call, return_final_state=True, backend=backend)
    found = {"y": y, "final": final}
    towards = [like(x).requires_grad_() for x in (y, final)]
    options = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad((y, final), list(leaves.values()), towards, create_graph=second, **options)
    found |= {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    if second:
        inputs = {**leaves, "grad_y": towards[0], "grad_final": towards[1]}
        again = torch.autograd.grad(grads, list(inputs.values()), [like(x) for x in grads], **options)
        found |= {f"dd {name}": grad for name, grad in zip(inputs, again, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def error(got, expected):
    """Norm of the difference over the norm."""
    norm = expected.double().norm().item()
    return (got.double() - expected.double()).norm().item() / (norm if norm > 0 else 1.0)

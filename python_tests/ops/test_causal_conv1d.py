"""causal_conv1d on the CPU: both backends against a plain loop in float64, and every promise of the docstrings."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

import fastmem
from fastmem import _native
from fastmem.ops.causal_conv1d import causal_conv1d, causal_conv1d_step, causal_conv1d_step_

FORWARD = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
BACKWARD = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
NAMES = ("x", "weight", "bias", "initial_state")


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def loop(x, weight, bias, state, reset, edges, silu) -> tuple[Tensor, Tensor]:
    """The docstring, step by step: a queue of the last W - 1 inputs, emptied by a reset."""
    (B, L, D), W = x.shape, weight.shape[1]
    rows, finals = [], []
    for b in range(B):
        spans = [(b, 0, L)] if edges is None else [(i, edges[i], edges[i + 1]) for i in range(len(edges) - 1)]
        ys = []
        for s, first, stop in spans:
            seen = [x.new_zeros(D)] * (W - 1) if state is None else list(state[s])
            for t in range(first, stop):
                if reset is not None and reset[b, t]:
                    seen = [x.new_zeros(D)] * (W - 1)
                seen.append(x[b, t])
                ys.append(sum(weight[:, w] * seen[w] for w in range(W)))
                seen = seen[1:]
            finals.append(torch.stack(seen) if W > 1 else x.new_zeros(0, D))
        rows.append(torch.stack(ys) if ys else x.new_zeros(0, D))
    y = torch.stack(rows) + (0 if bias is None else bias)
    return F.silu(y) if silu else y, torch.stack(finals)


def make(B, L, D, W, n=None, dtype=torch.float32):
    """x, weight, bias, initial state."""
    shapes = ((B, L, D), (D, W), (D,), (B if n is None else n, W - 1, D))
    return [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]


def call(x, weight, bias, state, **kwargs):
    return causal_conv1d(x, weight, bias, initial_state=state, return_final_state=True, **kwargs)


# ------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    "B,L,D,W,edges",
    [
        (2, 9, 3, 4, None),
        (1, 1, 1, 1, None),
        (1, 2, 5, 8, None),
        (3, 12, 100, 2, None),
        (1, 9, 3, 4, (0, 0, 3, 4, 4, 9)),
        (1, 5, 3, 3, (0, 5)),
        (1, 6, 7, 1, (0, 2, 6)),
    ],
)
def test_matches_the_loop(B, L, D, W, edges, silu, backend):
    """Also that the definition is what the docstring says."""
    tensors = make(B, L, D, W, None if edges is None else len(edges) - 1, torch.float64)
    cu = None if edges is None else torch.tensor(edges)
    activation = "silu" if silu else None
    for reset in (None, torch.rand(B, L) < 0.3):
        for state in (None, tensors[3]):
            for bias in (None, tensors[2]):
                args = (*tensors[:2], bias, state)
                got = call(*args, reset=reset, cu_seqlens=cu, activation=activation, backend=backend)
                for g, e in zip(got, loop(*args, reset, edges, silu), strict=True):
                    torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


SIZES = [  # B, L, D, W, edges
    (1, 2000, 17, 4, None),
    (2, 257, 63, 3, None),
    (3, 100, 100, 2, None),
    (1, 63, 1030, 4, None),
    (2, 3, 3, 8, None),
    (1, 100, 20, 30, None),
    (1, 1000, 33, 4, (0, 1, 1, 255, 257, 600, 1000)),
    (70, 1, 9, 4, None),
]


@pytest.mark.parametrize("dtype", list(FORWARD))
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("B,L,D,W,edges", SIZES)
def test_cpp_matches_float64(B, L, D, W, edges, activation, dtype):
    tensors = make(B, L, D, W, None if edges is None else len(edges) - 1, dtype)
    kwargs = dict(activation=activation, cu_seqlens=None if edges is None else torch.tensor(edges))
    for reset in (None, torch.rand(B, L) < 0.02):
        leaves = [t.requires_grad_() for t in tensors]
        exact = [t.detach().double().requires_grad_() for t in tensors]
        got = call(*leaves, reset=reset, backend="cpp", **kwargs)
        true = call(*exact, reset=reset, backend="reference", **kwargs)
        assert [t.dtype for t in got] == [dtype] * 2 and got[0].is_contiguous()
        toward = [torch.randn_like(t) for t in got]
        grads = torch.autograd.grad(got, leaves, toward)
        truth = torch.autograd.grad(true, exact, [t.double() for t in toward])
        assert error(got[0], true[0]) <= FORWARD[dtype] and torch.equal(got[1].double(), true[1])
        for name, g, e in zip(NAMES, grads, truth, strict=True):
            assert g.dtype == dtype and error(g, e) <= BACKWARD[dtype], name


def test_weights_in_float32_of_half_inputs():
    x, weight, bias, state = make(2, 30, 9, 4)
    for dtype in (torch.bfloat16, torch.float16):
        leaves = [x.to(dtype).requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), state.to(dtype)]
        y = call(*leaves, activation="silu")[0]
        assert y.dtype == dtype
        exact = call(*(t.double() for t in leaves), activation="silu", backend="reference")[0]
        assert error(y, exact) <= FORWARD[dtype]
        grads = torch.autograd.grad(y.float().sum(), leaves[:3])
        assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize("W", [1, 4])
def test_empty_and_single(shape, W, backend):
    B, L, D = shape
    leaves = [t.requires_grad_() for t in make(B, L, D, W)]
    y, final = call(*leaves, backend=backend)
    assert y.shape == shape and final.shape == (B, W - 1, D)
    grads = torch.autograd.grad(y.sum() + final.sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert all(g.isfinite().all() for g in grads)
    if L == 0:
        assert torch.equal(final, leaves[3]) and (grads[3] == 1).all() and not grads[1].any()


def test_no_sequences_at_all():
    leaves = [t.requires_grad_() for t in make(1, 0, 3, 4, n=0)]
    y, final = call(*leaves, cu_seqlens=torch.tensor([0]))
    assert y.shape == (1, 0, 3) and final.shape == (0, 3, 3)
    assert not torch.autograd.grad(y.sum() + final.sum(), leaves)[1].any()


def layouts(x: Tensor) -> dict[str, Tensor]:
    B, L, D = x.shape
    spread = x.new_full((B, 2 * L, 3 * D), float("nan"))
    spread[:, ::2, ::3] = x
    return {
        "channels first": x.mT.contiguous().mT,
        "rows apart": torch.cat([x, torch.full_like(x, float("nan"))], 2)[..., :D],
        "time outermost": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every third": spread[:, ::2, ::3],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [1, 70, 600])
def test_layouts_give_the_same_bits(D, dtype):
    x, weight, bias, state = make(2, 40, D, 4, dtype=dtype)
    toward = torch.randn(2, 40, D, dtype=dtype)

    def run(x, toward, weight=weight, state=state):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, state)]
        y, final = call(*leaves, activation="silu", reset=reset)
        return y.detach(), final.detach(), *torch.autograd.grad(y, leaves, toward)

    reset = torch.rand(2, 40) < 0.1
    expected = run(x, toward)
    for name, same in layouts(x).items():
        assert torch.equal(same, x)
        results = run(same, layouts(toward)[name])
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), name
    other = run(x, toward, weight.t().contiguous().t(), state.mT.contiguous().mT)
    assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))
    shared = run(x[:1].expand(2, -1, -1), toward[:, :1, :1].expand_as(toward))
    copied = run(x[:1].repeat(2, 1, 1), toward[:, :1, :1].repeat(1, 40, D))
    assert all(torch.equal(a, b) for a, b in zip(shared, copied, strict=True))


@pytest.mark.parametrize("sizes", [(1, 1500, 600), (70, 3, 900), (3, 300, 64)])
def test_same_bits_twice_and_for_every_number_of_threads(sizes):
    leaves = [t.requires_grad_() for t in make(*sizes, 4)]
    reset = torch.rand(sizes[:2]) < 0.01

    def run():
        y, final = call(*leaves, activation="silu", reset=reset, backend="cpp")
        return y.detach(), final.detach(), *torch.autograd.grad(y.square().sum() + final.sum(), leaves)

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ------------------------------------------------------------------------------------------ numbers out of the ordinary


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_do_not_leak(bad, activation, backend):
    x, weight, bias, state = make(2, 12, 9, 4)
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[0, 6] = reset[1, 0] = True
    x[0, 5], state[1] = bad, bad
    leaves = [t.requires_grad_() for t in (x, weight, bias, state)]
    y, final = call(*leaves, activation=activation, reset=reset, backend=backend)
    assert not y[0, 5].isfinite().any() and y[0, :5].isfinite().all() and y[0, 6:].isfinite().all()
    assert y[1].isfinite().all() and final.isfinite().all()  # the second row's state is never seen
    grads = torch.autograd.grad(y[0, 6:].sum() + y[1].sum() + final.sum(), leaves)
    # With an activation, step 5 passes 0 times the derivative at a NaN on to what it saw.
    assert grads[0][0, 6 if activation else 0 :].isfinite().all() and grads[0][1].isfinite().all()
    assert grads[3][1].isfinite().all()
    # A gradient that is not finite reaches what its step saw, and nothing else.
    toward = torch.zeros_like(y)
    toward[0, 8] = bad
    onto_x = torch.autograd.grad(call(*leaves, reset=reset, backend=backend)[0], x, toward)[0]
    assert not onto_x[0, 6:9].isfinite().any()
    onto_x[0, 6:9] = 0
    assert not onto_x.any()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_bad_weight_reaches_only_the_gradients_of_inputs_that_met_it(backend):
    x, weight, bias, state = make(1, 6, 2, 4)
    weight[:, 0] = float("nan")  # multiplies what is three steps old
    x.requires_grad_()
    reset = torch.tensor([[False, False, True, False, False, False]])
    onto_x = torch.autograd.grad(call(x, weight, bias, state, reset=reset, backend=backend)[0].sum(), x)[0]
    assert onto_x[0, [0, 1, 3, 4, 5]].isfinite().all() and onto_x[0, 2].isnan().all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_packed_sequences_do_not_see_each_other(backend):
    x, weight, bias, state = make(1, 30, 5, 4, n=3)
    edges = [0, 11, 12, 30]
    cu = torch.tensor(edges)
    # torch's own silu, which the reference uses, rounds the last elements of a row in another way than the others.
    activation = "silu" if backend == "cpp" else None
    y, final = call(x, weight, bias, state, cu_seqlens=cu, activation=activation, backend=backend)
    for i in range(3):
        span = slice(edges[i], edges[i + 1])
        alone = call(x[:, span], weight, bias, state[i : i + 1], activation=activation, backend=backend)
        assert torch.equal(y[:, span], alone[0]) and torch.equal(final[i : i + 1], alone[1])
    with_silu = call(x, weight, bias, state, cu_seqlens=cu, activation="silu", backend="reference")[0]
    without = call(x, weight, bias, state, cu_seqlens=cu, backend="reference")[0]
    assert torch.equal(with_silu, torch.nn.functional.silu(without))
    x[0, 10] = float("nan")
    y = call(x, weight, bias, state, cu_seqlens=cu, backend=backend)[0]
    assert y[0, 11:].isfinite().all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("value", [0.0, 1e30, -1e30, 3e38, -200.0, 90.0])
def test_zero_and_huge(value, backend):
    x = torch.full((1, 4, 20), value)
    weight = torch.zeros(20, 3)
    weight[:, 2] = 1.0
    x.requires_grad_()
    y = causal_conv1d(x, weight, activation="silu", backend=backend)
    torch.testing.assert_close(y, F.silu(x), atol=1e-30, rtol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(F.silu(x).sum(), x)[0], atol=1e-30, rtol=1e-6
    )


# ------------------------------------------------------------------------------------------------------ state and steps


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", list(FORWARD))
@pytest.mark.parametrize(
    "B,D,W,bias", [(1, 1, 1, True), (2, 600, 4, True), (3, 9, 2, False), (2, 7, 9, True), (0, 3, 3, True)]
)
def test_steps_equal_the_sequence(B, D, W, bias, dtype, backend):
    x, weight, b, state = make(B, 6, D, W, dtype=dtype)
    b = b if bias else None
    whole, final = call(x, weight, b, state, activation="silu", backend=backend)
    in_place, layout = state.clone(), state.mT.contiguous().mT
    for t in range(6):
        y, new = causal_conv1d_step(state, x[:, t], weight, b, activation="silu", backend=backend)
        torch.testing.assert_close(y, whole[:, t])
        for mine in (in_place, layout):
            y_too = causal_conv1d_step_(mine, x[:, t], weight, b, activation="silu", backend=backend)
            assert torch.equal(y_too, y) and torch.equal(mine, new)
        state = new
    assert torch.equal(state, final)


@pytest.mark.parametrize("parts", [(5, 1, 0, 14), (1,) * 20, (20,)])
def test_a_sequence_in_parts(parts):
    x, weight, bias, state = make(2, 20, 9, 6)
    reset = torch.rand(2, 20) < 0.1
    y, final = call(x, weight, bias, state, activation="silu", reset=reset)
    pieces = []
    for part, r in zip(x.split(parts, 1), reset.split(parts, 1), strict=True):
        piece, state = call(part, weight, bias, state, activation="silu", reset=r)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), y)
    assert torch.equal(state, final)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradients_of_steps(backend):
    x, weight, bias, state = (t.requires_grad_() for t in make(2, 5, 3, 4, dtype=torch.float64))
    leaves = (x, weight, bias, state)
    y, final = call(*leaves, activation="silu", backend=backend)
    expected = torch.autograd.grad(y.pow(2).sum() + final.pow(3).sum(), leaves)
    step, in_place = state, state.clone()
    ys, ys_in_place = [], []
    for t in range(5):
        y, step = causal_conv1d_step(step, x[:, t], weight, bias, activation="silu", backend=backend)
        ys.append(y)
        ys_in_place.append(causal_conv1d_step_(in_place, x[:, t], weight, bias, activation="silu", backend=backend))
    for outputs, end in ((ys, step), (ys_in_place, in_place)):
        got = torch.autograd.grad(sum(y.pow(2).sum() for y in outputs) + end.pow(3).sum(), leaves)
        torch.testing.assert_close(got, expected)


def test_a_state_changed_in_place_is_not_used_by_autograd_unnoticed():
    x, weight, bias, state = make(2, 1, 3, 4)
    weight.requires_grad_()
    loss = (state.requires_grad_(False) * weight.t()[:3]).sum()
    with torch.no_grad():
        causal_conv1d_step_(state, x[:, 0], weight, bias)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        causal_conv1d_step_(state.clone(), x[:, 0], weight, bias)


# --------------------------------------------------------------------------------------------------------- derivatives


def small(packed: bool, W: int = 3) -> tuple[list[Tensor], dict]:
    B, L, n = (1, 6, 4) if packed else (2, 5, 2)
    tensors = [t.requires_grad_() for t in make(B, L, 3, W, n, torch.float64)]
    reset = torch.zeros(B, L, dtype=torch.bool)
    reset[0, 2] = True
    return tensors, {"reset": reset, "cu_seqlens": torch.tensor([0, 1, 1, 4, 6]) if packed else None}


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("W", [1, 3])
def test_first_and_second_derivative(W, packed, activation, backend):
    leaves, kwargs = small(packed, W)
    run = lambda *leaves: call(*leaves, activation=activation, backend=backend, **kwargs)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
    few = lambda x, weight: call(x, weight, None, None, activation=activation, backend=backend, **kwargs)[0]  # noqa: E731
    assert torch.autograd.gradgradcheck(few, leaves[:2])


def test_third_derivative():
    x, weight, bias, state = small(False)[0]
    results = []
    for backend in ("cpp", "reference"):
        value = call(x, weight, bias, state, activation="silu", backend=backend)[0].sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, (x, weight, bias, state), create_graph=True)
            value = sum(g.pow(2).sum() for g in grads)
        results.append(grads)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_second_derivative_in_lower_precision(dtype):
    def second(x, weight, backend):
        y = causal_conv1d(x, weight, activation="silu", backend=backend)
        (g,) = torch.autograd.grad(y.pow(2).sum(), weight, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), (x, weight))

    x, weight, _, _ = make(2, 50, 20, 4, dtype=dtype)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    got, true = second(x, weight, "cpp"), second(x.double(), weight.double(), "reference")
    assert all(error(g, e) <= 2 * BACKWARD[dtype] for g, e in zip(got, true, strict=True))


def test_only_wanted_gradients_are_given():
    leaves, kwargs = small(False)
    for i, leaf in enumerate(leaves):
        alone = [t.detach() for t in leaves]
        alone[i] = leaf
        y, final = call(*alone, activation="silu", **kwargs)
        got = torch.autograd.grad(y.sum() + final.sum(), leaf)[0]
        y, final = call(*leaves, activation="silu", **kwargs)
        torch.testing.assert_close(got, torch.autograd.grad(y.sum() + final.sum(), leaf)[0])


# dims of weight, x, bias, initial state, reset
@pytest.mark.parametrize(
    "dims", [(None, 0, None, 0, None), (0, 1, 0, None, None), (0, None, None, 0, 0), (1, 0, 1, 1, 0)]
)
@pytest.mark.parametrize("packed", [False, True])
def test_vmap_of_a_meta_gradient(packed, dims):
    """Each task adapts the weight by a gradient step; the outer gradient goes through that step."""
    leaves, kwargs = small(packed)
    x, weight, bias, state = (t.detach() for t in leaves)

    def outer(backend):
        def loss(weight, x, bias, state, reset):
            y, final = call(
                x, weight, bias, state, reset=reset, cu_seqlens=kwargs["cu_seqlens"], activation="silu", backend=backend
            )
            return y.square().sum() + final.pow(3).sum()

        def adapted(weight, *rest):
            return loss(weight - 0.1 * grad(loss)(weight, *rest), *rest)

        return vmap(grad(adapted, argnums=(0, 1, 2, 3)), dims)

    tasks = []
    for t, d in zip((weight, x, bias, state, kwargs["reset"]), dims, strict=True):
        different = [t, t.flip(0)] if t.dtype == torch.bool else [t + torch.randn_like(t) for _ in range(2)]
        tasks.append(t if d is None else torch.stack([*different, t], d))
    torch.testing.assert_close(outer("cpp")(*tasks), outer("reference")(*tasks))


def test_vmap_within_vmap():
    x, weight = torch.randn(2, 3, 1, 8, 4), torch.randn(3, 4, 3)
    got = vmap(vmap(causal_conv1d), (0, None))(x, weight)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(got[i, j], causal_conv1d(x[i, j], weight[j]))
    with pytest.raises(ValueError, match="cu_seqlens: expected"):
        vmap(lambda x, cu: causal_conv1d(x, weight[0], cu_seqlens=cu))(x[0], torch.tensor([[0, 8]] * 3))


def test_forward_mode_raises_rather_than_being_wrong():
    x, weight, _, _ = make(1, 4, 3, 2)
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda x: causal_conv1d(x, weight), (x,), (x,))


# ---------------------------------------------------------------------------------------------------- torch's machinery


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    leaves, kwargs = small(packed)
    x, weight, bias, state = (t.detach() for t in leaves)
    inputs = (x, weight[None], bias[None], state, kwargs["reset"], kwargs["cu_seqlens"], True)
    torch.library.opcheck(torch.ops.fastmem.causal_conv1d.default, inputs)
    torch.library.opcheck(torch.ops.fastmem.causal_conv1d.default, (x, weight[None], *[None] * 4, False))
    toward = (torch.randn_like(x), torch.randn_like(state))
    torch.library.opcheck(torch.ops.fastmem.causal_conv1d_backward.default, (*toward, *inputs))
    if not packed:
        step = (state, x[:, 0], weight, bias, True)
        torch.library.opcheck(torch.ops.fastmem.causal_conv1d_step.default, step)
        torch.library.opcheck(torch.ops.fastmem.causal_conv1d_step_.default, step)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_a_graph_break(packed):
    leaves, kwargs = small(packed)

    def run(x, weight, bias, state):
        y, final = call(x, weight, bias, state, activation="silu", **kwargs)
        step, new = causal_conv1d_step(state[:1], x[:1, 0], weight, bias)
        return y, final, step, new

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            got, expected = compiled(*leaves), run(*leaves)
        torch.testing.assert_close(got, expected)
    got, expected = compiled(*leaves), run(*leaves)
    toward = [torch.randn_like(t) for t in got]
    torch.testing.assert_close(torch.autograd.grad(got, leaves, toward), torch.autograd.grad(expected, leaves, toward))


def test_compiled_steps_in_place():
    x, weight, bias, state = make(2, 3, 5, 4)

    def run(x, state):
        return [causal_conv1d_step_(state, x[:, t], weight, bias) for t in range(3)]

    torch._dynamo.reset()
    mine, theirs = state.clone(), state.clone()
    with torch.no_grad():
        got = torch.compile(run, fullgraph=True, backend="aot_eager")(x, mine)
        expected = run(x, theirs)
    torch.testing.assert_close((got, mine), (expected, theirs))


def test_explain():
    x, weight, bias, state = make(2, 5, 3, 4)
    explanation = fastmem.explain("causal_conv1d", x, weight, bias, activation="silu", initial_state=state)
    assert explanation.chosen == ("reference" if _native.missing else "cpp")
    assert set(explanation.refused) == {"triton", "reference"}
    assert "not on a GPU" in explanation.refused["triton"] or "not installed" in explanation.refused["triton"]
    for op in ("causal_conv1d_step", "causal_conv1d_step_"):
        assert fastmem.explain(op, state, x[:, 0], weight).chosen == explanation.chosen
    with pytest.raises(ValueError, match=r"weight: expected \(D, W\)"):
        fastmem.explain("causal_conv1d", x, weight.t())
    with pytest.raises(ValueError, match="causal_conv1d: backend 'triton' cannot serve this call"):
        causal_conv1d(x, weight, backend="triton")


# --------------------------------------------------------------------------------------------------------------- errors

X, WEIGHT, BIAS, STATE = (torch.zeros(s) for s in ((2, 5, 3), (3, 4), (3,), (2, 3, 3)))


@pytest.mark.parametrize(
    "change,kind,message",
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": X.int()}, TypeError, r"x: expected float32, .*got torch.int32"),
        ({"x": X.to_sparse()}, TypeError, "x: expected a dense tensor, got torch.sparse_coo"),
        ({"weight": WEIGHT.to_sparse()}, TypeError, "weight: expected a dense tensor"),
        ({"initial_state": STATE.to_sparse()}, TypeError, "initial_state: expected a dense tensor"),
        ({"x": X[0]}, ValueError, r"x: expected \(B, L, D\), got \(5, 3\)"),
        ({"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
        ({"weight": WEIGHT.int()}, TypeError, "weight: expected a float dtype, got torch.int32"),
        ({"weight": WEIGHT.t()}, ValueError, r"weight: expected \(D, W\) with D = 3 and W at least 1, got \(4, 3\)"),
        ({"x": X.mT}, ValueError, r"weight: .*D = 5.*got \(3, 4\); x looks like \(B, D, L\), expected \(B, L, D\)$"),
        ({"weight": WEIGHT[:, None]}, ValueError, r"weight: .*got \(3, 1, 4\)"),
        ({"weight": WEIGHT[:, :0]}, ValueError, r"weight: .*got \(3, 0\)"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight: expected the device of x, cpu, got meta"),
        ({"bias": 1.0}, TypeError, "bias: expected a tensor, got float"),
        ({"bias": BIAS.long()}, TypeError, "bias: expected a float dtype"),
        ({"bias": BIAS[:2]}, ValueError, r"bias: expected \(D,\) with D = 3, got \(2,\)"),
        ({"activation": "relu"}, ValueError, "activation: expected None, 'silu' or 'swish', got 'relu'"),
        ({"initial_state": 0}, TypeError, "initial_state: expected a tensor, got int"),
        ({"initial_state": STATE.double()}, TypeError, "initial_state: expected the dtype of x, torch.float32"),
        ({"initial_state": STATE[:1]}, ValueError, r"initial_state: expected .*\(2, 3, 3\), got \(1, 3, 3\)"),
        ({"initial_state": STATE.mT[:, :, :2]}, ValueError, r"initial_state: expected .*got \(2, 3, 2\)"),
        ({"initial_state": STATE.to("meta")}, ValueError, "initial_state: expected the device of x"),
        ({"reset": torch.zeros(2, 5)}, TypeError, "reset: expected torch.bool"),
        ({"reset": torch.zeros(5, 2, dtype=torch.bool)}, ValueError, "reset: expected"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens: expected .*B = 1"),
        ({"x": X[:1], "cu_seqlens": torch.tensor([0, 4])}, ValueError, "cu_seqlens: expected L = 5"),
        ({"x": X[:1], "cu_seqlens": torch.tensor([1, 5])}, ValueError, "cu_seqlens: expected 0 at its start"),
        ({"x": X[:1], "cu_seqlens": torch.tensor([0, 4, 3, 5])}, ValueError, "cu_seqlens: expected no decrease"),
        ({"x": X[:1], "cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens: expected torch.int32"),
        (
            {"x": X[:1], "cu_seqlens": torch.tensor([0, 2, 5]), "initial_state": STATE[:1]},
            ValueError,
            r"initial_state: expected \(n, W - 1, D\) = \(2, 3, 3\), got \(1, 3, 3\)",
        ),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
    ],
)
def test_wrong_calls_name_the_argument(change, kind, message):
    with pytest.raises(kind, match=message) as raised:
        causal_conv1d(**{"x": X, "weight": WEIGHT} | change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("op", [causal_conv1d_step, causal_conv1d_step_])
@pytest.mark.parametrize(
    "change,kind,message",
    [
        ({"x": X}, ValueError, r"x: expected \(B, D\), got \(2, 5, 3\)"),
        ({"x": X[:, 0].int()}, TypeError, "x: expected float32"),
        ({"x": X[:, 0].to_sparse()}, TypeError, "x: expected a dense tensor"),
        ({"state": STATE.to_sparse()}, TypeError, "state: expected a dense tensor"),
        ({"state": STATE[:, :2]}, ValueError, r"state: expected \(B, W - 1, D\) = \(2, 3, 3\), got \(2, 2, 3\)"),
        ({"state": STATE.double()}, TypeError, "state: expected the dtype of x"),
        ({"state": None}, TypeError, "state: expected a tensor, got NoneType"),
        ({"activation": "tanh"}, ValueError, "activation: expected"),
    ],
)
def test_wrong_steps_name_the_argument(op, change, kind, message):
    with pytest.raises(kind, match=message):
        op(**{"state": STATE, "x": X[:, 0], "weight": WEIGHT} | change)


def test_the_kernel_does_not_trust_cu_seqlens():
    x, weight = torch.zeros(1, 5, 3), torch.zeros(1, 3, 4)
    for edges in ([0, 9], [-4, 5], [0, 9, 5], [0]):
        with pytest.raises(ValueError, match="cu_seqlens: expected"):
            torch.ops.fastmem.causal_conv1d(x, weight, None, None, None, torch.tensor(edges), False)


def test_swish_is_silu():
    x, weight, _, _ = make(1, 5, 3, 2)
    assert torch.equal(causal_conv1d(x, weight, activation="swish"), causal_conv1d(x, weight, activation="silu"))


# ----------------------------------------------------------------------------------------- everything, in every mixture


@st.composite
def calls(draw):
    """Arguments of any valid call on the CPU."""
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from(list(FORWARD)))
    L, D, W = draw(st.integers(0, 40)), draw(st.integers(0, 40)), draw(st.integers(1, 9))
    n = draw(st.none() | st.integers(1, 5))
    B = draw(st.integers(0, 4)) if n is None else 1

    def randn(*shape):
        dims = draw(st.permutations(range(len(shape))))
        x = torch.randn([shape[d] for d in dims], generator=generator, dtype=torch.float64)
        return x.permute([dims.index(d) for d in range(len(shape))]).to(dtype)

    cu_seqlens = None
    if n is not None:
        inner = sorted(draw(st.lists(st.integers(0, L), min_size=n - 1, max_size=n - 1)))
        cu_seqlens = torch.tensor([0, *inner, L], dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    share = draw(st.sampled_from([0.0, 0.1, 1.0]))
    arguments = {
        "x": randn(B, L, D),
        "weight": randn(D, W),
        "bias": randn(D) if draw(st.booleans()) else None,
        "initial_state": randn(B if n is None else n, W - 1, D) if draw(st.booleans()) else None,
        "activation": draw(st.sampled_from([None, "silu", "swish"])),
        "reset": torch.rand(B, L, generator=generator) < share if draw(st.booleans()) else None,
        "cu_seqlens": cu_seqlens,
    }
    return arguments


@settings(max_examples=100, deadline=None, derandomize=True)
@given(calls())
def test_any_call_equals_the_definition(arguments):
    results = []
    for backend in ("cpp", "reference"):
        mine = copy.copy(arguments)
        for name in NAMES:
            x = mine[name]
            if x is not None:
                mine[name] = (x.double() if backend == "reference" else x).detach().requires_grad_()
        y, final = causal_conv1d(**mine, return_final_state=True, backend=backend)
        leaves = [mine[name] for name in NAMES if mine[name] is not None]
        toward = [torch.cos(torch.arange(t.numel())).reshape(t.shape).to(t.dtype) for t in (y, final)]
        grads = torch.autograd.grad((y, final), leaves, toward, materialize_grads=True)
        results.append((y, final, *grads))
    dtype = arguments["x"].dtype
    for i, (got, expected) in enumerate(zip(*results, strict=True)):
        limit = FORWARD[dtype] if i < 2 else BACKWARD[dtype]
        assert got.shape == expected.shape and got.dtype == dtype
        # Where terms cancel to almost nothing, rounding is measured against what was added.
        floor = 1e-6 if dtype in (torch.float32, torch.float64) else 1e-2
        assert (got.double() - expected).norm() <= limit * expected.norm() + floor * limit * expected.numel() ** 0.5


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    best = _native.isa
    if _native.missing or _native.ISAS.index(isa) > _native.ISAS.index(best):
        pytest.skip(f"this CPU runs {best} at best")
    program = """
import torch
from fastmem.ops.causal_conv1d import causal_conv1d
torch.manual_seed(0)
for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)):
    x, weight = torch.randn(2, 20, 37).to(dtype).requires_grad_(), torch.randn(37, 4).to(dtype).requires_grad_()
    got = causal_conv1d(x, weight, activation="silu", backend="cpp")
    true = causal_conv1d(x.double(), weight.double(), activation="silu", backend="reference")
    pairs = [(got, true), *zip(*(torch.autograd.grad(y.double().square().sum(), (x, weight)) for y in (got, true)))]
    for a, b in pairs:
        assert (a - b).norm() <= 2 * limit * b.norm()
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"FASTMEM_CPU_ISA": isa})

"""topk_attention on the CPU: both backends against the definition in float64, and every promise of the docstring."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import fastmem
from fastmem import _native
from fastmem.ops import _topk_attention_reference as definition
from fastmem.ops._topk_attention_autograd import rows, view
from fastmem.ops.topk_attention import topk_attention

FORWARD = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
BACKWARD = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def bank(
    B: int, H: int, Q: int, S: int, E: int, F: int, *, shared: str = "", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v; `shared` names dimensions (of "BH") that k and v have once."""
    b, h = 1 if "B" in shared else B, 1 if "H" in shared else H
    shapes = ((B, H, Q, E), (b, h, S, E), (b, h, S, F))
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


def in_double(x: Tensor | None) -> Tensor | None:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def truth(*tensors: Tensor, **settings):
    """The definition in float64."""
    settings = {name: in_double(x) for name, x in settings.items()}
    return topk_attention(*map(in_double, tensors), **settings, backend="reference")


SIZES = [  # B, H, Q, S, E, F, top_k, shared
    (1, 1, 1, 1, 1, 1, 1, ""),
    (2, 3, 1, 100, 63, 17, 5, ""),
    (2, 3, 1, 100, 63, 17, 5, "BH"),
    (2, 2, 3, 257, 3, 3, 1, "B"),
    (1, 2, 20, 2000, 32, 20, 33, ""),
    (1, 1, 2, 5000, 100, 64, 40, ""),
    (2, 1, 63, 63, 64, 64, 63, ""),
    (1, 3, 100, 100, 16, 1, 7, "H"),
    (1, 1, 257, 3, 2, 100, 2, ""),
]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("B,H,Q,S,E,F,top_k,shared", SIZES)
@pytest.mark.parametrize("dense", [False, True])
def test_cpp_matches_float64(B, H, Q, S, E, F, top_k, similarity, shared, dense):
    q, k, v = bank(B, H, Q, S, E, F, shared=shared)
    bias, mask, scale = torch.randn(B, S), torch.rand(B, H, S) > 0.3, torch.rand(H) + 0.5
    bias[:, S // 2] = float("-inf")
    for extra in ({}, {"bias": bias, "mask": mask, "scale": scale}):
        leaves = [x.requires_grad_() for x in (q, k, v, *(extra[n] for n in ("bias", "scale") if extra))]
        settings = dict(extra, similarity=similarity, top_k=None if dense else top_k)
        out, expected = topk_attention(q, k, v, **settings, backend="cpp"), truth(q, k, v, **settings)
        assert error(out, expected) <= FORWARD[torch.float32]
        toward = torch.randn_like(out)
        got = torch.autograd.grad(out, leaves, toward)
        for name, g, e in zip(
            ("q", "k", "v", "bias", "scale"), got, torch.autograd.grad(expected, leaves, toward.double()), strict=False
        ):
            # Where few slots are chosen and the softmax is nearly flat or nearly hard, the true gradient is tiny.
            floor = 1e-6 * toward.norm().item()
            assert (g - e).norm().item() <= BACKWARD[torch.float32] * e.norm().item() + floor, name


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("top_k", [7, None])
@pytest.mark.parametrize("Q", [1, 40])
def test_other_dtypes(dtype, top_k, Q, backend):
    q, k, v = (x.requires_grad_() for x in bank(2, 2, Q, 129, 24, 20, dtype=dtype))
    out = topk_attention(q, k, v, top_k=top_k, backend=backend)
    expected = truth(q, k, v, top_k=top_k)
    assert out.dtype == dtype
    assert error(out, expected) <= FORWARD[dtype]
    toward = torch.randn_like(out)
    got, wanted = (torch.autograd.grad(x, (q, k, v), toward.to(x.dtype)) for x in (out, expected))
    assert all(error(g, e) <= BACKWARD[dtype] for g, e in zip(got, wanted, strict=True))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_types_when_many_queries_choose_one_slot(dtype, backend):
    q, k, v = (x.requires_grad_() for x in bank(1, 1, 2000, 3, 8, 3, dtype=dtype))
    out, expected = topk_attention(q, k, v, top_k=1, backend=backend), truth(q, k, v, top_k=1)
    got, wanted = (torch.autograd.grad(x, v, torch.ones_like(x))[0] for x in (out, expected))
    assert error(got, wanted) <= BACKWARD[dtype]


def whole_numbers(*shape: int) -> Tensor:
    """Small whole numbers: every score is exact, so ties are real and every correct choice is the same choice."""
    return torch.randint(-2, 3, shape).float()


@pytest.mark.parametrize("Q", [1, 3, 5, 70])
@pytest.mark.parametrize("S,top_k", [(1, 1), (5, 9), (100, 1), (1000, 16), (5000, 33), (3000, 300), (50, 50)])
def test_chosen_slots_are_exact_and_ties_go_to_the_lowest(S, top_k, Q):
    q, k, v = whole_numbers(2, 1, Q, 5), whole_numbers(2, 1, S, 5), torch.randn(2, 1, S, 4)
    bias, mask = whole_numbers(2, S), torch.rand(2, S) > 0.2
    settings = dict(top_k=top_k, similarity="dot", scale=1.0, bias=bias, mask=mask, return_indices=True)
    _, indices, weights = topk_attention(q, k, v, **settings, backend="cpp")
    scores = (q @ k.mT + bias[:, None, None]).masked_fill(~mask[:, None, None], float("-inf"))
    ordered, slots = scores.sort(dim=-1, descending=True, stable=True)
    slots = torch.nn.functional.pad(slots[..., :top_k].masked_fill(ordered[..., :top_k] == float("-inf"), -1),
                                    (0, max(0, top_k - S)), value=-1)  # fmt: skip
    assert torch.equal(indices, slots)
    assert torch.equal(weights > 0, indices >= 0)
    assert torch.equal(topk_attention(q, k, v, **settings, backend="reference")[1], slots)


@pytest.mark.parametrize("order", ["rising", "falling", "equal", "rising then equal"])
@pytest.mark.parametrize("Q", [1, 20])
def test_selection_under_every_order_of_scores(order, Q):
    S, top_k = 4000, 20
    score = {
        "rising": torch.arange(S),
        "falling": -torch.arange(S),
        "equal": torch.zeros(S),
        "rising then equal": torch.arange(S).clamp_max(300),
    }[order].float()
    q, k, v = torch.ones(1, 1, Q, 1), score[None, None, :, None], torch.randn(1, 1, S, 3)
    _, indices, _ = topk_attention(q, k, v, top_k=top_k, similarity="dot", scale=1.0, return_indices=True)
    expected = score.sort(descending=True, stable=True).indices[:top_k]
    assert torch.equal(indices, expected.expand(1, 1, Q, top_k))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("top_k", [3, None])
@pytest.mark.parametrize("Q", [1, 6])
def test_what_is_not_usable_is_not_read(Q, top_k, backend):
    q, k, v = bank(2, 2, Q, 10, 4, 3)
    mask, bias = torch.rand(2, 10) > 0.5, torch.zeros(2, 10)
    mask[:, 0] = True
    bias[:, 1], bias[:, 2], mask[:, 2] = float("-inf"), float("nan"), False
    unusable = (~mask | (bias == float("-inf")))[:, None, :, None]
    clean = topk_attention(q, k, v, top_k=top_k, mask=~unusable[:, 0, :, 0], backend=backend)
    leaves = [q.requires_grad_(), k.masked_fill(unusable, float("nan")), v.masked_fill(unusable, float("inf")), bias]
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = topk_attention(*leaves[:3], top_k=top_k, bias=leaves[3], mask=mask, backend=backend)
    assert torch.equal(out, clean)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    for g in (grads[1], grads[2], grads[3][:, None, :, None]):
        assert not g.masked_select(unusable).any()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("top_k", [3, None])
def test_no_usable_slot_gives_zeros(top_k, backend):
    q, k, v = (x.requires_grad_() for x in bank(2, 1, 6, 10, 4, 3))
    bias = torch.zeros(2, 10)
    bias[0] = float("-inf")
    bias.requires_grad_()
    out = topk_attention(q, k, v, top_k=top_k, bias=bias, backend=backend)
    assert not out[0].any() and out[1].all()
    for g in torch.autograd.grad(out.sum(), (q, k, v, bias)):
        assert not g[0].any() and g.isfinite().all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("top_k", [4, None])
@pytest.mark.parametrize("Q", [1, 6])
def test_nan_and_infinity_stay_where_they_belong(Q, top_k, backend):
    q, k, v = bank(3, 1, Q, 50, 8, 4)
    k[0, 0, 7, 2] = float("nan")  # every score of that slot is NaN: it ranks first, and all it touches is NaN
    v[1, 0, :, 1] = float("inf")
    settings = dict(top_k=top_k, similarity="dot", backend=backend)
    out = topk_attention(q, k, v, **settings)
    assert out[0].isnan().all()
    assert (out[1, ..., 1] == float("inf")).all() and out[1, ..., 0].isfinite().all()
    assert out[2].isfinite().all()
    huge = topk_attention(q[2:] * 1e18, k[2:] * 1e18, v[2:], **settings)
    best = (q[2:] @ k[2:].mT).argmax(-1)
    assert torch.equal(huge, v[2, 0][best])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("top_k", [4, None])
def test_zero_vectors_have_cosine_and_gradient_zero(top_k, backend):
    q, k, v = bank(1, 1, 6, 12, 8, 4)
    q[0, 0, 0], k[0, 0, :5], k[0, 0, 5] = 0, 0, 1e-12
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = topk_attention(*leaves, top_k=top_k, bias=torch.arange(12.0)[None].neg() / 10, backend=backend)
    expected = topk_attention(q, k.detach().clone().index_fill_(2, torch.tensor([5]), 0), v, top_k=top_k,
                              bias=torch.arange(12.0)[None].neg() / 10, backend="reference")  # fmt: skip
    assert error(out, expected) <= 1e-6
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][0, 0, 0].any() and not grads[1][0, 0, :6].any()
    zeros = [torch.zeros(1, 1, 4, 3, requires_grad=True) for _ in range(3)]
    for g in torch.autograd.grad(topk_attention(*zeros, top_k=top_k, backend=backend).sum(), zeros):
        assert g.isfinite().all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("top_k", [3, None])
@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (2, 0, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0), (1, 1, 1, 0), (0, 0, 0, 0)])
def test_empty(shape, top_k, backend):
    B, H, Q, S = shape
    leaves = [x.requires_grad_() for x in (*bank(B, H, Q, S, 4, 6), torch.randn(B, S))]
    out = topk_attention(*leaves[:3], bias=leaves[3], top_k=top_k, backend=backend)
    assert out.shape == (B, H, Q, 6)
    assert not out.any()
    for leaf, g in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert g.shape == leaf.shape and not g.any()
    if top_k:
        _, indices, weights = topk_attention(*leaves[:3], top_k=top_k, return_indices=True, backend=backend)
        assert indices.shape == weights.shape == (B, H, Q, top_k)
        assert S > 0 or ((indices == -1).all() and not weights.any())


@pytest.mark.parametrize("top_k", [5, None])
def test_layouts_give_the_same_bits(top_k):
    q, k, v = bank(2, 3, 40, 70, 8, 6)
    expected = topk_attention(q, k, v, top_k=top_k)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    strided = [x.repeat_interleave(2, -1)[..., ::2] for x in (q, k, v)]
    for layout in (apart, strided):
        assert not any(x.is_contiguous() for x in layout)
        assert torch.equal(topk_attention(*layout, top_k=top_k), expected)
    assert all(rows(x) is x for x in apart)


@pytest.mark.parametrize("top_k", [5, None])
def test_shared_bank_is_read_in_place_and_its_gradient_summed(top_k):
    q, k, v = bank(3, 2, 7, 30, 8, 6, shared="BH")
    wide = [x.expand(3, 2, -1, -1) for x in (k, v)]
    assert all(rows(x) is x and view(x)[2][:2] == (0, 0) for x in wide)
    leaves = [x.requires_grad_() for x in (k, v)]
    copies = [x.detach().clone().requires_grad_() for x in wide]
    out, apart = topk_attention(q, k, v, top_k=top_k), topk_attention(q, *copies, top_k=top_k)
    expanded = topk_attention(q, *wide, top_k=top_k)
    assert error(out, apart) < 1e-6 and error(expanded, apart) < 1e-6
    toward = torch.randn_like(out)
    got, alone = torch.autograd.grad(out, leaves, toward), torch.autograd.grad(apart, copies, toward)
    through = torch.autograd.grad(
        topk_attention(q, *(x.expand(3, 2, -1, -1) for x in leaves), top_k=top_k), leaves, toward
    )
    for g, t, a in zip(got, through, alone, strict=True):
        assert error(g, a.sum((0, 1), keepdim=True)) < 1e-5
        assert error(t, g) < 1e-5


@pytest.mark.parametrize("top_k", [6, None])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 9000), (2, 2, 50, 300), (1, 1, 100, 2100)])
def test_same_bits_twice_and_for_every_number_of_threads(sizes, top_k):
    B, H, Q, S = sizes
    q, k, v = (x.requires_grad_() for x in bank(B, H, Q, S, 32, 16, shared="B"))
    bias, scale = torch.randn(B, S, requires_grad=True), torch.ones(H, requires_grad=True)
    leaves = (q, k, v, bias, scale)

    def run() -> tuple[Tensor, ...]:
        out = topk_attention(q, k, v, top_k=top_k, bias=bias, scale=scale, backend="cpp")
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

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


DOUBLE = dict(dtype=torch.float64)


def small(shared: str = "B") -> list[Tensor]:
    """q, k, v, scale, bias in float64 for finite differences; no two scores are near enough to change places."""
    B, H, Q, S, E, F = 2, 2, 3, 6, 2, 2
    torch.manual_seed(3)
    q, k, v = bank(B, H, Q, S, E, F, shared=shared, dtype=torch.float64)
    return [q, k, v, torch.rand(H, **DOUBLE) + 0.5, torch.randn(B, S, **DOUBLE)]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("top_k", [3, None])
def test_first_and_second_derivative(top_k, similarity, backend):
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 3] = False

    def run(q, k, v, scale, bias):
        found = topk_attention(
            q, k, v, top_k=top_k, similarity=similarity, scale=scale, bias=bias, mask=mask,
            return_indices=top_k is not None, backend=backend,
        )  # fmt: skip
        return (found[0], found[2]) if top_k else found

    leaves = [x.requires_grad_() for x in small()]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_second_derivative_where_few_inputs_want_one():
    q, k, v, _, _ = small()
    for top_k in (3, None):
        k.requires_grad_()
        run = lambda k: topk_attention(q, k, v, top_k=top_k, backend="cpp")  # noqa: B023, E731
        assert torch.autograd.gradgradcheck(run, (k,))


@pytest.mark.parametrize("top_k", [3, None])
@pytest.mark.parametrize("shared", ["", "B"])
@pytest.mark.parametrize("dims", [(None, 0, 0, None, None), (0, None, None, 0, None), (1, 0, 0, 0, 0)])
def test_vmap_of_a_meta_gradient(dims, shared, top_k):
    """Each task adapts k by a gradient step; the outer gradient goes through that step."""

    def outer(backend):
        def loss(k, q, v, scale, bias):
            return topk_attention(q, k, v, top_k=top_k, scale=scale, bias=bias, backend=backend).square().sum()

        def adapted(k, *rest):
            return loss(k - 0.1 * grad(loss)(k, *rest), *rest)

        return vmap(grad(adapted, argnums=(0, 1, 2, 3, 4)), dims)

    q, k, v, scale, bias = small(shared)
    tasks = [x if d is None else torch.stack([x + torch.randn_like(x) for _ in range(3)], d)
             for x, d in zip((k, q, v, scale, bias), dims, strict=True)]  # fmt: skip
    torch.testing.assert_close(outer("cpp")(*tasks), outer("reference")(*tasks))


@pytest.mark.parametrize("top_k", [3, None])
def test_forward_mode_raises_instead_of_losing_the_tangent(top_k):
    q, k, v, _, _ = small()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda q: topk_attention(q, k, v, top_k=top_k, backend="cpp"), (q,), (torch.ones_like(q),))
    with pytest.raises((RuntimeError, NotImplementedError)), torch.autograd.forward_ad.dual_level():
        topk_attention(torch.autograd.forward_ad.make_dual(q, q), k, v, top_k=top_k, backend="cpp")


@pytest.mark.parametrize("top_k", [3, None])
def test_vmap_without_gradients(top_k):
    q, k, v, _, _ = small()
    many = torch.stack([q, 2 * q, q - 1])
    got = vmap(lambda q: topk_attention(q, k, v, top_k=top_k))(many)
    torch.testing.assert_close(got, torch.stack([topk_attention(q, k, v, top_k=top_k) for q in many]))


def raw_inputs(**kind) -> tuple[Tensor, ...]:
    q, k, v = bank(2, 2, 4, 9, 3, 2, shared="B", **kind)
    compute = definition.compute_dtype(q.dtype)
    return q, k, v, torch.rand(1, 2, dtype=compute), torch.randn(2, 1, 9, dtype=compute), torch.rand(2, 1, 9) > 0.3


def test_opcheck():
    ops = torch.ops.fastmem
    q, k, v, scale, bias, mask = raw_inputs()
    torch.library.opcheck(ops.topk_attention_forward.default, (q, k, v, scale, bias, mask, 3, 1.0, True))
    torch.library.opcheck(ops.dense_attention_forward.default, (q, k, v, None, bias, mask, 1.0, False))
    out, indices, weights = ops.topk_attention_forward(q, k, v, scale, bias, mask, 3, 1.0, True)
    to_out, to_weights = torch.randn_like(out), torch.randn_like(weights)
    for wanted in ([True] * 5, [True, False, True, False, False]):
        args = (to_out, to_weights, q, k, v, scale, bias, indices, weights, 1.0, True, wanted)
        torch.library.opcheck(ops.topk_attention_backward.default, args)
        out, lse = ops.dense_attention_forward(q, k, v, scale, bias, mask, 1.0, True)
        args = (to_out, q, k, v, scale, bias, mask, out, lse, 1.0, True, wanted)
        torch.library.opcheck(ops.dense_attention_backward.default, args)


@pytest.mark.parametrize("top_k", [3, None])
def test_compiles_to_one_graph(top_k):
    def loss(q, k, v, scale, bias):
        found = topk_attention(q, k, v, top_k=top_k, scale=scale, bias=bias, return_indices=top_k is not None)
        return found[0].sum() + found[2].square().sum() if top_k else found.sum()

    leaves = [x.requires_grad_() for x in small()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    torch.testing.assert_close(got, expected)


def test_sdpa_backend_of_plain_attention():
    q, k, v, scale, bias = (x.requires_grad_() for x in small())
    mask = torch.rand(2, 2, 6) > 0.3
    mask[0, 0] = False
    settings = dict(scale=scale, bias=bias, mask=mask)
    out, expected = (topk_attention(q, k, v, **settings, backend=b) for b in ("sdpa", "reference"))
    torch.testing.assert_close(out, expected)
    leaves = (q, k, v, scale, bias)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), leaves) for x in (out, expected)))
    assert torch.autograd.gradgradcheck(lambda *a: topk_attention(*a, backend="sdpa"), (q, k, v))
    with pytest.raises(ValueError, match="backend: expected one of auto"):
        topk_attention(q, k, v, top_k=2, backend="sdpa")


WRONG = [
    (dict(q=torch.zeros(2, 3)), ValueError, r"q: expected \(B, H, Q, E\), got \(2, 3\)"),
    (dict(q=[1.0]), TypeError, "q: expected a tensor, got list"),
    (dict(q=torch.zeros(1, 2, 3, 4, dtype=torch.int64)), TypeError, "q: expected float32.*got torch.int64"),
    (dict(k=torch.zeros(3, 2, 5, 4)), ValueError, r"k: expected .*B = 1 or 1, H = 2 or 1.*got \(3, 2, 5, 4\)"),
    (dict(k=torch.zeros(1, 2, 5, 3)), ValueError, r"k: expected .*E = 4, got \(1, 2, 5, 3\)"),
    (dict(k=torch.zeros(1, 2, 5, 4).double()), TypeError, "k: expected the dtype of q, torch.float32, got"),
    (dict(v=torch.zeros(1, 2, 6, 4)), ValueError, r"v: expected .*S = 5.*got \(1, 2, 6, 4\)"),
    (dict(v=torch.zeros(1, 2, 5, 4, device="meta")), ValueError, "v: expected the device of q, cpu, got meta"),
    (dict(top_k=0), ValueError, "top_k: expected at least 1, got 0"),
    (dict(top_k=2**40), ValueError, r"top_k: expected less than 2\^31, got 1099511627776"),
    (dict(top_k=2.0), TypeError, "top_k: expected an int or None, got float"),
    (dict(similarity="l2"), ValueError, "similarity: expected one of cosine, dot, got 'l2'"),
    (dict(bias=torch.zeros(5)), ValueError, r"bias: expected \(B, S\) or \(B, H, S\).*got \(5,\)"),
    (dict(bias=torch.zeros(1, 5).int()), TypeError, "bias: expected a float dtype, got torch.int32"),
    (dict(mask=torch.zeros(1, 5)), TypeError, "mask: expected torch.bool.*got torch.float32"),
    (dict(mask=torch.ones(1, 3, 5, dtype=torch.bool)), ValueError, r"mask: expected .*H = 2 or 1.*got \(1, 3, 5\)"),
    (dict(scale=torch.ones(3)), ValueError, r"scale: expected a number, \(\) or \(H,\) with H = 2, got \(3,\)"),
    (dict(bias=[1.0]), TypeError, "bias: expected a tensor or None, got list"),
    (dict(mask=[True]), TypeError, "mask: expected a tensor or None, got list"),
    (dict(scale=10**400), ValueError, "scale: expected a number that fits a float"),
    (dict(backend=[1]), ValueError, r"backend: expected one of auto.*got \[1\]"),
    (dict(scale="big"), TypeError, "scale: expected a number, a tensor or None, got str"),
    (dict(top_k=None, return_indices=True), ValueError, "return_indices: expected top_k"),
    (dict(backend="cuda"), ValueError, "backend: expected one of auto, triton, cpp, reference, got 'cuda'"),
    (dict(backend="triton"), ValueError, "backend 'triton' cannot serve this call: "),
]


@pytest.mark.parametrize("change,kind,message", WRONG)
def test_errors_say_what_was_wrong(change, kind, message):
    call = dict(q=torch.zeros(1, 2, 3, 4), k=torch.zeros(1, 2, 5, 4), v=torch.zeros(1, 2, 5, 4), top_k=2) | change
    with pytest.raises(kind, match=message) as raised:
        topk_attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)
    assert "\n" not in str(raised.value)


def test_explain():
    q, k, v = bank(1, 1, 2, 5, 4, 4)
    said = fastmem.explain("topk_attention", q, k, v, top_k=2)
    assert said.chosen == "cpp" and set(said.refused) == {"triton", "reference"}
    assert "not on a GPU" in said.refused["triton"] or "not installed" in said.refused["triton"]
    assert fastmem.explain("topk_attention", q, k, v).chosen == "cpp"
    with pytest.raises(ValueError, match="k: expected"):
        fastmem.explain("topk_attention", q, v[..., :1], v)


def test_default_scale_and_scalar_tensor():
    q, k, v = bank(1, 2, 3, 9, 16, 4)
    for similarity, scale in (("cosine", 4.0), ("dot", 0.25)):
        for top_k in (3, None):
            results = [topk_attention(q, k, v, top_k=top_k, similarity=similarity, scale=s)
                       for s in (None, scale, torch.tensor(scale), torch.full((2,), scale))]  # fmt: skip
            for other in results[1:]:
                torch.testing.assert_close(other, results[0])


CHECK_ISA = """
import torch
from fastmem import _native
from fastmem.ops.topk_attention import topk_attention
assert _native.isa == {isa!r}
torch.manual_seed(0)
for Q in (1, 30):  # whole numbers, so ties
    q, k = (torch.randint(-2, 3, (1, 1, n, 5)).float() for n in (Q, 3000))
    settings = dict(top_k=40, similarity="dot", scale=1.0, return_indices=True)
    chosen = topk_attention(q, k, k, **settings, backend="cpp")[1]
    assert torch.equal(chosen, (q @ k.mT).sort(descending=True, stable=True).indices[..., :40])
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for top_k in (9, None):
        for Q, similarity in ((1, "cosine"), (3, "dot"), (37, "cosine")):
            shapes = (Q, 33), (203, 33), (203, 21)
            q, k, v = (torch.randn(2, 2, *shape, dtype=dtype, requires_grad=True) for shape in shapes)
            settings = dict(top_k=top_k, similarity=similarity)
            settings |= dict(bias=torch.randn(2, 203), mask=torch.rand(2, 203) > 0.2)
            out = topk_attention(q, k, v, **settings, backend="cpp")
            true = topk_attention(q.double(), k.double(), v.double(), **settings, backend="reference")
            toward = torch.randn_like(out)
            got, want = (torch.autograd.grad(x, (q, k, v), toward.to(x.dtype)) for x in (out, true))
            limit = 1e-2 if dtype.itemsize == 2 else 1e-5
            for i, (g, w) in enumerate(zip((out, *got), (true, *want))):
                error = ((g.double() - w.double()).norm() / w.norm()).item()
                assert error <= (limit if i == 0 else 2 * limit), (dtype, top_k, Q, similarity, i, error)
"""


@pytest.mark.parametrize("isa", _native.ISAS)
def test_every_instruction_set(isa):
    if _native.ISAS.index(isa) > _native.ISAS.index(_native.isa):
        pytest.skip(f"this CPU's best is {_native.isa}")
    env = dict(os.environ, FASTMEM_CPU_ISA=isa)
    done = subprocess.run([sys.executable, "-c", CHECK_ISA.format(isa=isa)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""The checks of mamba-ssm's tests/ops/test_selective_scan.py, with all of its axes, at sizes for a CPU."""

import warnings

import pytest
import torch
from plain import error, names_of_arguments, selective_scan
from tiny_chat import one_thread  # noqa: F401
from torch.nn import functional as F

from fastmem.compat.mamba_ssm import mamba_inner_fn, selective_scan_fn
from fastmem.compat.mamba_ssm.ops import selective_scan_interface
from fastmem.ops import _dispatch

FORWARD = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BACKWARD = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def inputs(var_B, var_C, groups, has_D, has_z, has_bias, L, itype, wtype, batch=2, dim=4, N=8):
    def shape(varies):
        pairs = L * 2 if wtype.is_complex else L
        if not varies:
            return dim, N
        return (batch, N, pairs) if groups == 1 else (batch, groups, N, pairs)

    made = {
        "u": torch.randn(batch, dim, L, dtype=itype),
        "delta": 0.5 * torch.rand(batch, dim, L, dtype=itype),
        "A": -0.5 * torch.rand(dim, N, dtype=wtype),
        "B": torch.randn(shape(var_B), dtype=itype if var_B else wtype),
        "C": torch.randn(shape(var_C), dtype=itype if var_C else wtype),
        "D": torch.randn(dim) if has_D else None,
        "z": torch.randn(batch, dim, L, dtype=itype) if has_z else None,
        "delta_bias": 0.5 * torch.rand(dim) if has_bias else None,
    }
    return {k: None if v is None else v.requires_grad_() for k, v in made.items()}


def assert_same_as_plain(arguments, softplus, itype, state_gradient=False):
    y, state = selective_scan_fn(**arguments, delta_softplus=softplus, return_last_state=True)
    truth = {k: None if v is None else v.detach().requires_grad_() for k, v in arguments.items()}
    expected, last = selective_scan(**truth, delta_softplus=softplus)
    assert y.dtype == itype and y.shape == arguments["u"].shape
    assert state.dtype == (torch.complex64 if arguments["A"].is_complex() else torch.float32)
    assert error(y, expected) < FORWARD[itype] and error(state, last) < FORWARD[itype]

    g, h = torch.randn_like(y), torch.randn_like(state)
    ours, theirs = (y * g).sum(), (expected * g).sum()
    if state_gradient:  # mamba-ssm leaves it out
        ours, theirs = ours + (state * h).real.sum(), theirs + (last * h).real.sum()
    ours.backward()
    theirs.backward()
    for name, x in arguments.items():
        if x is not None:
            assert x.grad.dtype == x.dtype and error(x.grad, truth[name].grad.to(x.grad.dtype)) < BACKWARD[itype], name


@pytest.mark.parametrize("itype", FORWARD)
@pytest.mark.parametrize("L", [1, 8, 37, 128])
@pytest.mark.parametrize("groups", [1, 2])
def test_selective_scan(groups, L, itype):
    assert_same_as_plain(inputs(True, True, groups, True, True, True, L, itype, torch.float32), True, itype)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_z", [False, True])
@pytest.mark.parametrize("has_D", [False, True])
def test_every_choice_of_optional_arguments(has_D, has_z, has_bias, softplus):
    arguments = inputs(True, True, 1, has_D, has_z, has_bias, 20, torch.float32, torch.float32)
    assert_same_as_plain(arguments, softplus, torch.float32, state_gradient=True)


@pytest.mark.parametrize("wtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize(
    ("var_B", "var_C", "groups"),
    [(False, False, 1), (False, True, 1), (True, False, 1), (True, False, 2), (True, True, 1), (True, True, 2)],
)
def test_constant_and_complex_maps(var_B, var_C, groups, wtype):
    arguments = inputs(var_B, var_C, groups, True, True, True, 16, torch.float32, wtype)
    assert_same_as_plain(arguments, True, torch.float32, state_gradient=True)


def test_complex_scan_warns_once():
    _dispatch._warned.clear()
    arguments = inputs(True, True, 1, True, True, True, 4, torch.float32, torch.complex64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        selective_scan_fn(**arguments)
        selective_scan_fn(**arguments)
    assert ["complex" in str(w.message) for w in caught] == [True]


def test_return_convention_and_layout():
    arguments = inputs(True, True, 1, True, True, True, 6, torch.float32, torch.float32)
    alone = selective_scan_fn(**arguments)
    y, state = selective_scan_fn(**arguments, return_last_state=True)
    assert torch.equal(alone, y) and y.shape == (2, 4, 6) and state.shape == (2, 4, 8)
    by_position = selective_scan_fn(*arguments.values(), True, True)
    torch.testing.assert_close(by_position, selective_scan_fn(**arguments, delta_softplus=True, return_last_state=True))
    reference = selective_scan_interface.selective_scan_ref(**arguments, return_last_state=True)
    torch.testing.assert_close((y, state), reference)


@pytest.mark.parametrize("itype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("var_C", [False, True])
@pytest.mark.parametrize("var_B", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_mamba_inner_fn(var_B, var_C, wtype, itype, biases):
    batch, dim, N, rank, L, out = 2, 12, 8, 5, 16, 6
    size = N * (2 if wtype.is_complex else 1)

    def normal(*shape, scale=1.0, dtype=itype):
        return (scale * torch.randn(*shape, dtype=dtype)).requires_grad_()

    arguments = {
        "xz": normal(batch, 2 * dim, L),
        "conv1d_weight": normal(dim, 1, 3),
        "conv1d_bias": normal(dim) if biases else None,
        "x_proj_weight": normal(rank + (var_B + var_C) * size, dim, scale=dim**-0.5),
        "delta_proj_weight": normal(dim, rank, scale=rank**-0.5),
        "out_proj_weight": normal(out, dim, scale=dim**-0.5),
        "out_proj_bias": normal(out) if biases else None,
        "A": (-0.5 * torch.rand(dim, N, dtype=wtype)).requires_grad_(),
        "B": None if var_B else normal(dim, N, dtype=wtype),
        "C": None if var_C else normal(dim, N, dtype=wtype),
        "D": normal(dim, dtype=torch.float32),
        "delta_bias": normal(dim, dtype=torch.float32),
        "B_proj_bias": normal(size) if biases and var_B else None,
        "C_proj_bias": normal(size) if biases and var_C else None,
    }
    ours = mamba_inner_fn(**arguments)
    truth = {k: None if v is None else wide_leaf(v) for k, v in arguments.items()}
    expected = plain_inner(**truth)
    assert ours.shape == (batch, L, out) and ours.dtype == itype
    assert error(ours, expected) < (1e-5 if itype == torch.float32 else 2e-2)
    torch.testing.assert_close(ours, selective_scan_interface.mamba_inner_ref(**arguments), rtol=2e-2, atol=2e-2)
    if itype != torch.float32:
        return
    g = torch.randn_like(ours)
    ours.backward(g)
    expected.backward(g.double())
    for name, x in arguments.items():
        if x is not None:
            assert error(x.grad, truth[name].grad) < 1e-4, name


def wide_leaf(x):
    return (x.detach().to(torch.complex128) if x.is_complex() else x.detach().double()).requires_grad_()


def plain_inner(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias,
    A, B, C, D, delta_bias, B_proj_bias=None, C_proj_bias=None, norms=(None, None, None), eps=1e-6,
):  # fmt: skip
    dim, rank = delta_proj_weight.shape
    L, size = xz.shape[2], A.shape[1] * (2 if A.is_complex() else 1)
    x, z = xz[:, :dim], xz[:, dim:]
    x = F.silu(F.conv1d(x, conv1d_weight, conv1d_bias, padding=conv1d_weight.shape[2] - 1, groups=dim)[..., :L])
    projected = x_proj_weight @ x
    delta = norm(delta_proj_weight @ projected[:, :rank], norms[2], eps)

    def as_map(part, bias, weight):
        part = norm(part if bias is None else part + bias[:, None], weight, eps)
        return part if not A.is_complex() else torch.complex(part[:, 0::2], part[:, 1::2])

    B = as_map(projected[:, rank : rank + size], B_proj_bias, norms[0]) if B is None else B
    C = as_map(projected[:, -size:], C_proj_bias, norms[1]) if C is None else C
    y, _ = selective_scan(x, delta, A, B, C, D, z, delta_bias, True)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def norm(x, weight, eps):
    """Over channels, (B, C, L)."""
    if weight is None:
        return x
    return x * (x.square().mean(1, keepdim=True) + eps).rsqrt() * weight[:, None]


def test_mamba_inner_fn_with_the_norms_of_falcon_mamba():
    batch, dim, N, rank, L, out = 2, 12, 8, 5, 9, 6
    shapes = [(batch, 2 * dim, L), (dim, 1, 4), (dim,), (rank + 2 * N, dim), (dim, rank), (out, dim), (out,)]
    weights = [torch.randn(s).requires_grad_() for s in shapes]
    A = -torch.rand(dim, N)
    D, bias = torch.randn(2, dim)
    norms = [torch.rand(n) + 0.5 for n in (N, N, dim)]
    names = ("b_rms_weight", "c_rms_weight", "dt_rms_weight")
    ours = mamba_inner_fn(
        *weights, A, None, None, D, delta_bias=bias, delta_softplus=True, checkpoint_lvl=0,
        **dict(zip(names, norms, strict=True)), b_c_dt_rms_eps=1e-3,
    )  # fmt: skip
    exact = [w.detach().double().requires_grad_() for w in weights]
    expected = plain_inner(*exact, A.double(), None, None, D.double(), bias.double(), norms=norms, eps=1e-3)
    assert error(ours, expected) < 1e-5
    ours.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(weights, exact, strict=True):
        assert error(a.grad, b.grad) < 1e-4


def test_second_derivative_through_mamba_inner_fn():
    dim, N, rank = 3, 2, 2
    shapes = [(1, 2 * dim, 4), (dim, 1, 2), (dim,), (rank + 2 * N, dim), (dim, rank), (2, dim), (2,)]
    weights = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
    A = -torch.rand(dim, N, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda *w: mamba_inner_fn(*w, A), weights, fast_mode=True)


def test_signatures_are_those_of_mamba_ssm():
    assert names_of_arguments(selective_scan_fn) == "u delta A B C D z delta_bias delta_softplus return_last_state"
    assert names_of_arguments(mamba_inner_fn) == (
        "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias "
        "A B C D delta_bias B_proj_bias C_proj_bias delta_softplus checkpoint_lvl b_rms_weight "
        "c_rms_weight dt_rms_weight b_c_dt_rms_eps"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 4)}, r"u: expected \(B, D, L\), got \(2, 4\)"),
        ({"delta": torch.zeros(2, 4, 5)}, r"delta: expected \(2, 4, 6\) like u, got \(2, 4, 5\)"),
        ({"B": torch.zeros(2, 6, 8)}, r"B: expected \(4, 8\), \(2, 8, 6\) or \(2, G, 8, 6\), got \(2, 6, 8\)"),
        ({"C": torch.zeros(2, 3, 8, 6)}, "groups|G that divides"),
    ],
)
def test_wrong_shapes_are_named_in_the_layout_of_the_caller(change, message):
    arguments = inputs(True, True, 1, True, True, True, 6, torch.float32, torch.float32)
    with pytest.raises(ValueError, match=message):
        selective_scan_fn(**{**arguments, **change})

"""The checks of mamba-ssm's tests/ops/triton/test_selective_state_update.py, all of its axes, at sizes for a CPU."""

import pytest
import torch
from plain import error, names_of_arguments, state_update
from tiny_chat import one_thread  # noqa: F401

from fastmem.compat.mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from fastmem.compat.mamba_ssm.ops.triton.selective_state_update import (
    selective_state_update,
    selective_state_update_ref,
)

DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TOTAL = 12  # rows of a state that is picked from


def inputs(itype, has_z, N, dim, heads=None, groups=1, tie=False, batch=2):
    width = (dim,) if heads is None else (heads, dim // heads)
    lead = (N,) if heads is None else (groups, N)
    if tie:  # one number for all channels of a head
        dt = torch.randn(batch, heads, dtype=itype)[..., None].expand(batch, *width)
        bias, D = ((torch.rand(heads) - 4.0)[:, None].expand(width), torch.randn(heads)[:, None].expand(width))
        A = (-torch.rand(heads) - 1.0)[:, None, None].expand(*width, N)
    else:
        dt, bias = torch.randn(batch, *width, dtype=itype), torch.rand(width) - 4.0
        A, D = -torch.rand(*width, N) - 1.0, torch.randn(width)
    return {
        "x": torch.randn(batch, *width, dtype=itype),
        "dt": dt,
        "A": A,
        "B": torch.randn(batch, *lead),
        "C": torch.randn(batch, *lead),
        "D": D,
        "z": torch.randn(batch, *width, dtype=itype) if has_z else None,
        "dt_bias": bias,
    }


@pytest.mark.parametrize("itype", DTYPES)
@pytest.mark.parametrize("has_z", [False, True])
@pytest.mark.parametrize("N", [16, 32, 64])
@pytest.mark.parametrize("dim", [48, 67])
def test_selective_state_update(dim, N, has_z, itype):
    arguments = inputs(itype, has_z, N, dim)
    state = torch.randn(2, dim, N, dtype=itype)
    expected, new = state_update(state, **arguments, dt_softplus=True)
    copy, address = state.clone(), state.data_ptr()
    y = selective_state_update(state, **arguments, dt_softplus=True)
    assert y.dtype == itype and y.shape == (2, dim) and state.data_ptr() == address and state.dtype == itype
    assert error(y, expected) < DTYPES[itype] and error(state, new) < DTYPES[itype]
    torch.testing.assert_close(selective_state_update_ref(copy, **arguments, dt_softplus=True), y)
    torch.testing.assert_close(copy, state)


@pytest.mark.parametrize("itype", DTYPES)
@pytest.mark.parametrize("has_z", [False, True])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("N", [16, 32])
@pytest.mark.parametrize("picked", [False, True])
def test_heads(groups, N, has_z, tie, itype, picked):
    arguments = inputs(itype, has_z, N, 64, heads=8, groups=groups, tie=tie)
    check(itype, arguments, (8, 8, N), picked)


@pytest.mark.parametrize("itype", DTYPES)
@pytest.mark.parametrize("has_z", [False, True])
@pytest.mark.parametrize("N", [16, 32])
@pytest.mark.parametrize("dim", [48, 67])
def test_batch_indices(dim, N, has_z, itype):
    check(itype, inputs(itype, has_z, N, dim, batch=5), (dim, N), picked=True)


def check(itype, arguments, shape, picked):
    batch = len(arguments["x"])
    state = torch.randn(TOTAL if picked else batch, *shape, dtype=itype)
    rows = torch.randperm(TOTAL)[:batch].to(torch.int32) if picked else torch.arange(batch)
    before = state.clone()
    expected, new = state_update(state[rows.long()], **arguments, dt_softplus=True)
    more = {"state_batch_indices": rows} if picked else {}
    y = selective_state_update(state, **arguments, dt_softplus=True, **more)
    assert error(y, expected) < DTYPES[itype] and error(state[rows.long()], new) < DTYPES[itype]
    others = [r for r in range(len(state)) if r not in rows.tolist()]
    assert torch.equal(state[others], before[others])


def test_rows_of_padding_are_zero_and_change_nothing():
    arguments = inputs(torch.float32, True, 4, 6, batch=4)
    state = torch.randn(5, 6, 4)
    before = state.clone()
    rows = torch.tensor([3, -1, 0, -1], dtype=torch.int32)
    expected, new = state_update(
        state[[3, 0]], **{k: v if k in "AD" or k == "dt_bias" else v[[0, 2]] for k, v in arguments.items()}
    )
    y = selective_state_update(state, **arguments, state_batch_indices=rows)
    assert error(y[[0, 2]], expected) < 1e-5 and (y[[1, 3]] == 0).all()
    assert error(state[[3, 0]], new) < 1e-5 and torch.equal(state[[1, 2, 4]], before[[1, 2, 4]])


def test_strided_state_and_no_optional_arguments():
    arguments = {k: v for k, v in inputs(torch.float32, False, 4, 6).items() if k in ("x", "dt", "A", "B", "C")}
    whole = torch.randn(2, 3, 6, 4)  # one head of a larger state, as transformers' Zamba passes it
    state, before = whole[:, 1], whole.clone()
    expected, new = state_update(state, **arguments)
    y = selective_state_update(state, **arguments)
    assert error(y, expected) < 1e-5 and error(whole[:, 1], new) < 1e-5
    assert torch.equal(whole[:, [0, 2]], before[:, [0, 2]])


def test_gradients_flow_where_they_are_recorded():
    arguments = inputs(torch.float32, True, 4, 6)
    leaves = {k: v.requires_grad_() for k, v in arguments.items()}
    start = torch.randn(2, 6, 4, requires_grad=True)
    state = start * 1.0
    loss = sum(selective_state_update(state, **leaves, dt_softplus=True).sum() for _ in range(2)) + state.sum()
    exact = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    begin = start.detach().double().requires_grad_()
    y, mid = state_update(begin, **exact, dt_softplus=True)
    again, end = state_update(mid, **exact, dt_softplus=True)
    ours = torch.autograd.grad(loss, [start, *leaves.values()])
    theirs = torch.autograd.grad(y.sum() + again.sum() + end.sum(), [begin, *exact.values()])
    for a, b in zip(ours, theirs, strict=True):
        assert error(a, b) < 1e-4


def test_complex_states_step_on_from_a_scan():
    x, dt, B, C = torch.randn(2, 6, 5), torch.rand(2, 6, 5), torch.randn(2, 4, 10), torch.randn(2, 4, 10)
    A = -torch.rand(6, 4) + 1j * torch.randn(6, 4)
    y, last = selective_scan_fn(x, dt, A, B, C, return_last_state=True)
    _, state = selective_scan_fn(x[..., :3], dt[..., :3], A, B[..., :6], C[..., :6], return_last_state=True)
    pairs = [torch.view_as_complex(m.unflatten(2, (5, 2)).contiguous()) for m in (B, C)]
    for t in (3, 4):
        step = selective_state_update(state, x[..., t], dt[..., t], A, *(m[..., t] for m in pairs))
        assert error(step, y[..., t]) < 1e-5
    assert error(state, last) < 1e-5
    with pytest.raises(TypeError, match=r"state: expected torch.complex64, as A is torch.complex64, got torch.float32"):
        selective_state_update(state.real.contiguous(), x[..., 0], dt[..., 0], A, B[..., 0], C[..., 0])


def test_no_rows():
    arguments = {
        k: v[:0] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs(torch.float32, True, 4, 6).items()
    }
    assert selective_state_update(torch.zeros(0, 6, 4), **arguments).shape == (0, 6)


def test_signature_is_that_of_mamba_ssm():
    assert names_of_arguments(selective_state_update) == "state x dt A B C D z dt_bias dt_softplus state_batch_indices"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": torch.zeros(6, 4)}, r"state: expected \(B, D, N\) or \(B, H, D, N\), got \(6, 4\)"),
        ({"x": torch.zeros(3, 6)}, r"x: expected \(2, 6\) to match state \(2, 6, 4\), got \(3, 6\)"),
        ({"A": torch.zeros(6, 5)}, r"A: expected \(6, 4\)"),
        ({"state_batch_indices": torch.zeros(2)}, r"state_batch_indices: expected \(2,\) int"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"state": torch.zeros(2, 6, 4), **inputs(torch.float32, True, 4, 6), **change}
    with pytest.raises(ValueError, match=message):
        selective_state_update(**arguments)

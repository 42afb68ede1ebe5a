"""The checks of causal-conv1d's tests/test_causal_conv1d.py, with all of its axes, at sizes for a CPU."""

import itertools

import pytest
import torch
from plain import conv, error, names_of_arguments, wide
from tiny_chat import one_thread  # noqa: F401

from fastmem.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from fastmem.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref

DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CHOICES = list(itertools.product([False, True], [False, True], DTYPES))  # silu, bias, dtype


def make_x(batch, dim, L, itype, channel_last):
    """A slice of something larger, in either layout."""
    if channel_last:
        return torch.randn(batch, L, dim + 24, dtype=itype)[:, :, 16 : 16 + dim].transpose(1, 2)
    return torch.randn(batch, dim + 24, L, dtype=itype)[:, 16 : 16 + dim]


def close(ours, truth, itype):
    return error(ours, truth.detach()) < DTYPES[itype]


@pytest.mark.parametrize(("silu", "has_bias", "itype"), CHOICES)
@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("has_initial", [False, True])
@pytest.mark.parametrize("W", [2, 3, 4])
def test_causal_conv1d(W, has_initial, channel_last, silu, has_bias, itype):
    dim = 13
    for L in (1, 2, 8, 37):
        x = make_x(2, dim, L, itype, channel_last).requires_grad_()
        weight, bias = torch.randn(dim, W).requires_grad_(), torch.randn(dim).requires_grad_() if has_bias else None
        initial = torch.randn(2, W - 1, dim, dtype=itype).transpose(1, 2).requires_grad_() if has_initial else None
        activation = "silu" if silu else None
        y, final = causal_conv1d_fn(
            x, weight, bias, initial_states=initial, return_final_states=True, activation=activation
        )
        leaves = [v for v in (x, weight, bias, initial) if v is not None]
        exact = {id(v): v.detach().double().requires_grad_() for v in leaves}
        expected, last = conv(*(exact.get(id(v)) for v in (x, weight, bias)), None, exact.get(id(initial)), activation)
        assert y.dtype == final.dtype == itype and final.shape == (2, dim, W - 1)
        assert close(y, expected, itype) and torch.equal(wide(final), last)
        assert torch.equal(causal_conv1d_fn(x, weight, bias, None, initial, activation=activation), y)

        g, h = torch.randn_like(y), torch.randn_like(final)
        ours = torch.autograd.grad([y, final], leaves, [g, h])
        theirs = torch.autograd.grad([expected, last], list(exact.values()), [g.double(), h.double()])
        for a, b in zip(ours, theirs, strict=True):
            assert error(a, b) < 10 * DTYPES[itype]


@pytest.mark.parametrize(("silu", "has_bias", "itype"), CHOICES)
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("has_initial", [False, True])
def test_sequences_next_to_each_other(W, silu, has_bias, itype, padded, has_initial):
    dim, L = 7, 19
    lengths = [[1, 2, 9, 7], [L], [4, 3, 3, 9]]
    seq_idx = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths]).int()
    if padded:
        seq_idx[0, 15:] = -1
        seq_idx[2, 18:] = -1
    x = make_x(3, dim, L, itype, True).requires_grad_()
    weight, bias = torch.randn(dim, W).requires_grad_(), torch.randn(dim).requires_grad_() if has_bias else None
    initial = torch.randn(3, dim, W - 1, dtype=itype).requires_grad_() if has_initial else None
    activation = "swish" if silu else None
    y = causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx, initial_states=initial, activation=activation)
    leaves = [v for v in (x, weight, bias, initial) if v is not None]
    exact = {id(v): v.detach().double().requires_grad_() for v in leaves}
    expected, _ = conv(*(exact.get(id(v)) for v in (x, weight, bias)), seq_idx, exact.get(id(initial)), activation)
    assert close(y, expected, itype)
    assert not padded or (y[0, :, 15:] == 0).all()
    g = torch.randn_like(y)
    theirs = torch.autograd.grad(expected, list(exact.values()), g.double())
    for a, b in zip(torch.autograd.grad(y, leaves, g), theirs, strict=True):
        assert error(a, b) < 10 * DTYPES[itype]
    reference = causal_conv1d_ref(x, weight, bias, initial, activation=activation, seq_idx=seq_idx)
    torch.testing.assert_close(y, reference, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("L", [1, 2, 9])
def test_final_states_go_where_they_are_asked_to(L):
    x, weight, out = torch.randn(2, 5, L), torch.randn(5, 4), torch.full((2, 5, 3), torch.nan)
    _, final = causal_conv1d_fn(x, weight, return_final_states=True, final_states_out=out)
    assert final is out and torch.equal(out, conv(x, weight)[1].float())


@pytest.mark.parametrize(("silu", "has_bias", "itype"), CHOICES)
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("steps", [None, 1, 4, 5])
@pytest.mark.parametrize("W", [2, 3, 4])
def test_update(W, steps, ring, silu, has_bias, itype):
    run_update(W, steps, ring, silu, has_bias, itype, rows=None)


@pytest.mark.parametrize("itype", DTYPES)
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 5])
@pytest.mark.parametrize("rows", [[4, 0, 7], [4, -1, 7]])
def test_update_of_picked_rows(steps, ring, itype, rows):
    run_update(4, steps, ring, True, True, itype, rows)


def run_update(W, steps, ring, silu, has_bias, itype, rows):
    batch, dim, S = 3, 11, steps or 1
    x = torch.randn(batch, S, dim, dtype=itype).transpose(1, 2)
    x = x[..., 0] if steps is None else x
    weight, bias, activation = torch.randn(dim, W), torch.randn(dim) if has_bias else None, "silu" if silu else None
    for K in (W - 1, W, W + 3):
        state = torch.randn(batch if rows is None else 9, K, dim, dtype=itype).transpose(1, 2)
        offsets = torch.tensor([0, 2, 14], dtype=torch.int32) if ring else None
        before, places = state.clone(), list(range(batch)) if rows is None else rows
        y = causal_conv1d_update(
            x, state, weight, bias, activation, offsets, None if rows is None else torch.tensor(rows, dtype=torch.int32)
        )
        assert y.shape == x.shape and y.dtype == itype
        for b, r in enumerate(places):
            inputs = x[b].view(dim, -1)
            if r < 0:
                assert (y[b] == 0).all()
                continue
            if ring:
                start = int(offsets[b])
                held = before[r][:, [(start + o) % K for o in range(1 - W, 0)]]
            else:
                held = before[r][:, K - (W - 1) :]
            expected, _ = conv(inputs[None], weight, bias, None, held[None], activation)
            assert close(y[b].view(dim, -1), expected[0], itype)
            new = before[r].clone()
            if ring:
                for s in range(S):
                    new[:, (start + s) % K] = inputs[:, s]
            else:
                new = torch.cat([new, inputs], 1)[:, -K:]
            assert torch.equal(state[r], new)
        untouched = [r for r in range(len(state)) if r not in places]
        assert torch.equal(state[untouched], before[untouched])
        if rows is None:
            reference = causal_conv1d_update_ref(x, before, weight, bias, activation, offsets)
            torch.testing.assert_close(y, reference, rtol=1e-2, atol=1e-2)
            assert torch.equal(before, state)


def test_updates_go_on_where_the_sequence_ended():
    x, weight, bias = torch.randn(2, 6, 20), torch.randn(6, 4), torch.randn(6)
    whole = causal_conv1d_fn(x, weight, bias, activation="silu")
    _, state = causal_conv1d_fn(x[..., :11], weight, bias, activation="silu", return_final_states=True)
    for t in range(11, 20):
        torch.testing.assert_close(causal_conv1d_update(x[..., t], state, weight, bias, "silu"), whole[..., t])


@pytest.mark.parametrize("K", [3, 4, 6])
def test_gradients_flow_through_updates(K):
    """The convolution keeps its inputs for the backward pass, and the state that they stand in is written to."""
    start, inputs, weight = (torch.randn(*s).requires_grad_() for s in ((2, 5, K), (3, 2, 5), (5, 4)))
    slopes = []
    for update in (causal_conv1d_update, causal_conv1d_update_ref):
        state = start * 1.0
        loss = sum(update(x, state, weight, activation="silu").square().sum() for x in inputs) + state.sum()
        slopes.append(torch.autograd.grad(loss, (start, inputs, weight)))
    torch.testing.assert_close(*slopes)


def test_signatures_are_those_of_causal_conv1d():
    assert names_of_arguments(causal_conv1d_fn) == (
        "x weight bias seq_idx initial_states return_final_states final_states_out activation"
    )
    assert names_of_arguments(causal_conv1d_update) == (
        "x conv_state weight bias activation cache_seqlens conv_state_indices"
    )


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda: causal_conv1d_fn(torch.zeros(2, 3), torch.zeros(3, 4)), ValueError, r"x: expected \(B, D, L\), got"),
        (
            lambda: causal_conv1d_fn(torch.zeros(2, 3, 5), torch.zeros(3, 4), seq_idx=torch.zeros(2, 4)),
            ValueError,
            r"seq_idx: expected \(2, 5\), got \(2, 4\)",
        ),
        (
            lambda: causal_conv1d_fn(torch.zeros(2, 3, 5), torch.zeros(3, 4), activation="gelu"),
            NotImplementedError,
            "activation: expected None, 'silu' or 'swish', got 'gelu'",
        ),
        (
            lambda: causal_conv1d_update(torch.zeros(2, 3), torch.zeros(2, 3, 2), torch.zeros(3, 4)),
            ValueError,
            r"conv_state: expected \(B, 3, K\) with K at least 3",
        ),
        (
            lambda: causal_conv1d_update(torch.zeros(2, 3), torch.zeros(1, 3, 3), torch.zeros(3, 4)),
            ValueError,
            "conv_state: expected 2 rows like x",
        ),
        (
            lambda: causal_conv1d_update(
                torch.zeros(2, 3), torch.zeros(2, 3, 3), torch.zeros(3, 4), cache_seqlens=torch.zeros(3)
            ),
            ValueError,
            r"cache_seqlens: expected \(2,\)",
        ),
    ],
)
def test_wrong_arguments_are_named(call, exception, message):
    with pytest.raises(exception, match=message):
        call()

"""selective_scan over its whole signature, right and wrong: the reference's result or one line, and never a crash."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selective_scan_data import OPTIONAL, double, error, leaves_of, make

from fastmem.ops.selective_scan import selective_scan

sizes = st.tuples(st.integers(0, 3), st.integers(0, 140), st.integers(1, 40), st.integers(1, 20))


@settings(max_examples=60, deadline=None)
@given(
    sizes,
    st.sampled_from([None, 1, 2, 3, 5]),
    st.sets(st.sampled_from(OPTIONAL)),
    st.booleans(),
    st.one_of(st.none(), st.lists(st.integers(0, 70), max_size=5)),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 1000),
)
def test_any_right_call(size, G, optional, softplus, packed, reset, dtype, seed):
    B, L, D, N = size
    D = D * (G or 1)
    kind = {"G": G, "optional": sorted(optional), "softplus": softplus, "packed": packed, "reset": reset, "seed": seed}
    leaves, call = leaves_of(make(B, L, D, N, dtype=dtype, **kind))
    y, final = selective_scan(**call, return_final_state=True)
    exact, exact_call = leaves_of(double(call))
    y_exact, final_exact = selective_scan(**exact_call, return_final_state=True, backend="reference")
    limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    assert error(y, y_exact) <= limit and error(final, final_exact) <= limit
    options = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(y.sum() + final.sum(), list(leaves.values()), **options)
    expected = torch.autograd.grad(y_exact.sum() + final_exact.sum(), list(exact.values()), **options)
    for name, a, b in zip(leaves, grads, expected, strict=True):
        # A sum may cancel: then the error is measured against the terms.
        scale = max(b.norm().item(), 1e-2 * b.numel() ** 0.5)
        assert (a.double() - b).norm().item() <= scale * max(10 * limit, 1e-10), name


def anything():
    shapes = st.lists(st.integers(0, 4), max_size=4)
    dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
    tensors = st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), shapes, dtypes)
    return st.one_of(
        tensors, st.none(), st.integers(-2, 5), st.floats(), st.text(max_size=2), st.lists(st.integers(0, 3))
    )


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "u",
                "delta",
                "A",
                "B",
                "C",
                "D",
                "z",
                "delta_bias",
                "delta_softplus",
                "initial_state",
                "reset",
                "cu_seqlens",
            ]
        ),
        anything(),
        max_size=3,
    ),
    st.integers(0, 2),
    st.integers(0, 3),
)
def test_any_call_at_all(changes, B, L):
    call = make(B, L, 4, 2) | changes
    try:
        y, final = selective_scan(**call, return_final_state=True)
    except (TypeError, ValueError) as error:
        assert "\n" not in str(error) and str(error)
    else:
        assert y.shape == call["u"].shape and y.dtype == call["u"].dtype and final.shape[1:] == (4, 2)

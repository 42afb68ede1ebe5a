import warnings

import pytest
import torch

import fastmem
from fastmem.ops import _dispatch, _typical
from fastmem.ops._dispatch import Explanation, choose


def test_auto_takes_the_fastest_that_can_serve():
    served = {"reference": None, "cpp": None, "triton": "tensors are on cpu, not on a GPU"}
    explanation = choose("op", "auto", served)
    assert explanation.chosen == "cpp"
    assert explanation.refused == {"reference": "cpp is faster", "triton": "tensors are on cpu, not on a GPU"}
    assert choose("op", "auto", {**served, "triton": None}).chosen == "triton"
    assert choose("op", "auto", {**served, "cpp": "no"}).chosen == "reference"


def test_an_op_need_not_have_every_backend():
    explanation = choose("op", "auto", {"reference": None})
    assert explanation == Explanation("op", "reference", {})


def test_forced():
    explanation = choose("op", "reference", {"reference": None, "cpp": None})
    assert explanation.chosen == "reference"
    assert explanation.refused == {"cpp": "backend='reference' was asked for"}
    with pytest.raises(ValueError, match="op: backend 'cpp' cannot serve this call: wrong moon"):
        choose("op", "cpp", {"reference": None, "cpp": "wrong moon"})
    with pytest.raises(ValueError, match="backend: expected one of auto, reference, cpp, got 'cuda'"):
        choose("op", "cuda", {"reference": None, "cpp": None})


def test_explanation_prints_one_line_per_backend():
    text = str(Explanation("op", "cpp", {"triton": "no GPU", "reference": "cpp is faster"}))
    assert text.splitlines() == ["op: cpp", "  not triton: no GPU", "  not reference: cpp is faster"]


def test_explain_knows_every_public_op():
    calls = _typical.calls("cpu")
    assert set(calls) == set(fastmem._OPS)
    for op, (args, kwargs) in calls.items():
        explanation = fastmem.explain(op, *args, **kwargs)
        assert {explanation.chosen, *explanation.refused} == {"reference", "cpp", "triton"}
        assert explanation.op == op
        forced = fastmem.explain(op, *args, **kwargs, backend="reference")
        assert forced.chosen == "reference"
    assert set(_dispatch.ops()) >= set(calls)


def test_explain_of_an_unknown_op():
    with pytest.raises(ValueError, match=r"op: expected one of .*topk_attention.*, got 'topk'"):
        fastmem.explain("topk")


def test_reasons_name_the_device():
    meta = torch.empty(1, device="meta")
    assert _dispatch.no_cpp(torch.empty(1), None, meta) in (
        "tensors are on meta, not on the CPU",
        _dispatch._native.missing,
    )
    assert _dispatch.no_triton(meta) in ("tensors are on meta, not on a GPU", "triton is not installed")


def test_warn_slow_warns_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            _dispatch.warn_slow("test_op", "a reason of this test")
    assert [str(w.message) for w in caught] == [
        "fastmem.test_op runs its slow PyTorch reference: a reason of this test"
    ]
    assert caught[0].category is RuntimeWarning

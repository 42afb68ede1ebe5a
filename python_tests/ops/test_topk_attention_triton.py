"""The Triton kernels without a GPU: results in triton's interpreter, and compilation for the GPUs we support."""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")

INTERPRETED = """
import contextlib
import torch
import triton_interpreter
from fastmem.kernels import topk_attention as kernels
from fastmem.ops import _topk_attention_reference as definition

assert kernels.COSINE_EPS == definition.COSINE_EPS
kernels.EXAMINED_SLOTS = 64  # several splits already at these sizes
inside = []


@contextlib.contextmanager
def on(x):
    inside.append(x)
    yield
    inside.pop()


class Launched:  # on the device of the tensors: Triton would take the current one, which torch does not set here
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        assert inside
        return self.kernel[grid]


kernels.on = on
for name in ("_select", "_attend", "_per_query", "_per_slot"):
    setattr(kernels, name, Launched(getattr(kernels, name)))
torch.manual_seed(0)
B, H, Q, S, E, F, top_k, shared, cosine, plain = CASE

def error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-2)).item()

shape = (1, 1) if shared else (B, H)
q, k, v = torch.randn(B, H, Q, E), torch.randn(*shape, S, E), torch.randn(*shape, S, F)
bias, mask, scale = torch.randn(*shape, S), torch.rand(*shape, S) > 0.3, torch.rand(1, H) + 0.5
bias[:, :, 3:4] = float("-inf")
if shared:  # ties
    q, k, bias, scale = q.sign(), k.sign(), torch.zeros_like(bias), torch.ones_like(scale)
if plain:
    bias = mask = scale = None
leaves = [x.double().requires_grad_() for x in (q, k, v, scale, bias) if x is not None]
dq, dk, dv, dscale, dbias = [*leaves, None, None][:5]
chosen = definition.select(q, k, scale, bias, mask, top_k, 0.5, cosine)
expected, weights = definition.attend(dq, dk, dv, dscale, dbias, chosen, 0.5, cosine)
out, indices, got_weights = kernels.forward(q, k, v, scale, bias, mask, top_k, 0.5, cosine)
assert torch.equal(indices, chosen)
assert error(out, expected) < 1e-5 and error(got_weights, weights) < 1e-5
to_out, to_weights = torch.randn_like(out), torch.randn_like(got_weights)
towards = [(x, g.double()) for x, g in ((expected, to_out), (weights, to_weights)) if x.requires_grad]
outputs, gradients = zip(*towards)
true = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True, materialize_grads=True)
wanted = [True] * 5
got = kernels.backward(to_out, to_weights, q, k, v, scale, bias, indices, got_weights, 0.5, cosine, wanted)
for g, t in zip(got, true):
    assert error(g, t) < 1e-4, (error(g, t), g.shape)
again = kernels.backward(to_out, to_weights, q, k, v, scale, bias, indices, got_weights, 0.5, cosine, wanted)
assert all(torch.equal(a, b) for a, b in zip(got, again))
wanted = [True] + [False] * 4
only = kernels.backward(to_out, to_weights, q, k, v, scale, bias, indices, got_weights, 0.5, cosine, wanted)
assert torch.equal(only[0], got[0]) and all(x.numel() == 0 for x in only[1:])
"""

CASES = [  # B, H, Q, S, E, F, top_k, shared, cosine, without bias, mask and scale
    (2, 2, 3, 100, 20, 17, 5, False, True, False),
    (1, 2, 1, 70, 40, 66, 20, False, False, True),
    (2, 1, 1, 130, 3, 4, 9, True, False, False),
    (1, 1, 18, 7, 8, 8, 40, False, True, True),
    (1, 1, 2, 0, 4, 4, 2, False, True, False),
    (0, 1, 2, 3, 4, 4, 2, False, True, False),
]


@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_match(case):
    program = f"CASE = {case}\n{INTERPRETED}"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=os.path.dirname(__file__), env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


TYPES = {"p_found": "i64", "p_indices": "i64", "p_entry": "i64", "p_start": "i64", "p_mask": "i1"}
DATA = ("p_q", "p_k", "p_v", "p_out", "p_grad_out", "p_grad_q", "p_rows", "p_own", "p_grad")  # in the call's dtype


def spilled(kernel, dtype, config, capability, tmp_path, **constants):
    """Bytes of registers that ptxas spills in a kernel whose data are `dtype`."""
    from triton_compiled import compiled

    def pointers(name):
        return TYPES.get(name, dtype if name in DATA else "fp32")

    return compiled(kernel, config, capability, tmp_path, pointers, {"factor": "fp32"}, **constants).spilled


def check_select(top_k, dtype, capability, tmp_path, cosines=(True, False)):
    from fastmem.kernels import topk_attention as kernels

    for per_bank in (1, 100):
        config = kernels.select_config(per_bank, top_k)
        for cosine in cosines:
            flags = dict(cosine=cosine, share_b=False, share_h=False, eps=kernels.COSINE_EPS, E=64)
            assert spilled(kernels._select, dtype, config, capability, tmp_path, **flags) == 0, (config, flags)


# float16 compiles to the same code as bfloat16, but for the conversions.
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype,top_k", [("fp32", 32), ("bf16", 128)])
def test_select_compiles_without_spills(top_k, dtype, capability, tmp_path):
    check_select(top_k, dtype, capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("top_k", [1, 64, 128])
def test_every_select_compiles_without_spills(top_k, dtype, capability, tmp_path):
    check_select(top_k, dtype, capability, tmp_path)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_other_kernels_compile_without_spills(dtype, capability, tmp_path):
    from fastmem.kernels import topk_attention as kernels

    for top_k in (32, 64, 128):
        config = kernels.row_config(top_k)
        attend = {"b_k": config["b_k"], "b_f": config["b_e"], "num_warps": config["num_warps"]}
        flags = dict(share_b=False, share_h=False, F=64)
        assert spilled(kernels._attend, dtype, attend, capability, tmp_path, **flags) == 0
        flags = dict(E=64, F=64, eps=kernels.COSINE_EPS, cosine=True)
        assert spilled(kernels._per_query, dtype, config, capability, tmp_path, **flags) == 0
    assert spilled(kernels._per_slot, dtype, kernels.SLOT_CONFIG, capability, tmp_path, width=64) == 0


def test_triton_refuses_what_it_cannot_serve():
    from fastmem.kernels import topk_attention as kernels

    assert kernels.refuses(kernels.MAX_TOP_K, torch.float32, 1000) is None
    assert "129" in kernels.refuses(129, torch.float32, 1000)
    assert "float64" in kernels.refuses(8, torch.float64, 1000)


def test_the_op_does_not_import_triton_until_a_kernel_runs():
    program = (
        "import sys, torch; had = 'triton' in sys.modules; import fastmem; fastmem.topk_attention; "
        "x = torch.zeros(1, 1, 2, 2); fastmem.topk_attention(x, x, x, top_k=1); "
        "assert ('triton' in sys.modules) == had and 'fastmem.kernels.topk_attention' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("Q,S", [(1, 20_000), (70, 700)])
def test_on_a_gpu(dtype, Q, S):
    from fastmem.ops.topk_attention import topk_attention

    shapes = ((2, 3, Q, 40), (2, 1, S, 40), (2, 1, S, 24))
    leaves = [torch.randn(s, dtype=dtype, device="cuda", requires_grad=True) for s in shapes]
    bias = torch.randn(2, S, device="cuda")
    out = topk_attention(*leaves, top_k=20, bias=bias)
    true = topk_attention(*(x.double() for x in leaves), top_k=20, bias=bias.double(), backend="reference")
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert (out - true).norm() <= limit * true.norm() * 10  # two scores may change places
    grads = [torch.autograd.grad(x.sum(), leaves) for x in (out, true)]
    for got, expected in zip(*grads, strict=True):
        assert (got - expected).norm() <= 0.02 * expected.norm()

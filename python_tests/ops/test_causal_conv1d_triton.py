"""The Triton kernels without a GPU: results in triton's interpreter, and compilation for the GPUs we support."""

import os
import re
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")

INTERPRETED = """
import torch
import triton_interpreter
from fastmem.kernels import causal_conv1d as kernels
from fastmem.ops._causal_conv1d_reference import compute_dtype, reference

torch.manual_seed(0)
B, groups, L, D, W, edges, silu, plain, name, layout = CASE
dtype, limit = getattr(torch, name), {"float32": 1e-5, "bfloat16": 1e-2, "float64": 1e-12}[name]


def error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-2)).item()


def randn(*shape, dtype=dtype):
    return torch.randn(shape).to(dtype)


def empty(x):
    return torch.full(x.shape, float("nan"), dtype=x.dtype)


n = 1 if edges is None else len(edges) - 1
cu_seqlens = None if edges is None else torch.tensor(edges, dtype=torch.int32)
x, grad_y = (randn(B, D, L).mT if layout == "channels first" else randn(B, L, D) for _ in range(2))
weight, bias = (randn(groups, *s, dtype=compute_dtype(dtype)) for s in ((D, W), (D,)))
state, grad_final, reset = randn(B * n, W - 1, D), randn(B * n, W - 1, D), torch.rand(B, L) < 0.2
if plain:
    bias = state = reset = None
y, final = empty(x), empty(grad_final)
kernels.forward(x, weight, bias, state, reset, cu_seqlens, silu, y, final)
grads = [empty(t) if t is not None else torch.empty(0) for t in (x, weight, bias, state)]
kernels.backward(grad_y, grad_final, x, weight, bias, state, reset, cu_seqlens, silu, *grads)

leaves = [t.double().requires_grad_() for t in (x, weight, bias, state) if t is not None]
dx, dweight, dbias, dstate = [*leaves, None, None][:4]
expected = []
for b in range(max(B, 1)):  # row by row, each with the weights of its group
    g = b // max(B // groups, 1)
    rows = slice(b * n, b * n + n)
    expected.append(reference(
        dx[b : b + 1], dweight[g], None if plain else dbias[g], None if plain else dstate[rows],
        None if plain else reset[b : b + 1], cu_seqlens, silu,
    ))
true_y, true_final = (torch.cat(t) for t in zip(*expected))
assert error(y, true_y) <= limit and error(final, true_final) <= limit
true = torch.autograd.grad(
    (true_y, true_final), leaves, (grad_y.double(), grad_final.double()), materialize_grads=True
)
for got, expected in zip(grads, true):
    assert error(got, expected) <= 2 * limit, (error(got, expected), got.shape)
again = [empty(t) if t.numel() else t.clone() for t in grads]
kernels.backward(grad_y, grad_final, x, weight, bias, state, reset, cu_seqlens, silu, *again)
assert all(torch.equal(a, b) for a, b in zip(grads, again))

if L > 0 and n == 1:  # a step, also in place
    state = randn(B, W - 1, D)
    new, in_place = empty(state), state.clone()
    out, out_in_place = empty(x[:, 0]), empty(x[:, 0])
    args = (weight[0], None if plain else bias[0], silu)
    kernels.step(state, x[:, 0], *args, out, new)
    kernels.step(in_place, x[:, 0], *args, out_in_place, in_place)
    true_y, true_state = reference(x[:, :1], *args[:2], state, None, None, silu)
    assert error(out, true_y[:, 0]) <= limit and torch.equal(new, true_state)
    assert torch.equal(out, out_in_place) and torch.equal(new, in_place)
"""

CASES = [  # B, groups of weights, L, D, W, where sequences begin and end, silu, only x and weight, dtype, layout
    (4, 2, 19, 3, 4, None, True, False, "float32", "channels last"),
    (1, 1, 40, 70, 3, None, False, True, "float32", "channels first"),
    (2, 1, 20, 5, 4, (0, 0, 7, 8, 8, 20), True, False, "bfloat16", "channels last"),
    (1, 1, 6, 3, 8, (0, 4, 6), False, False, "float64", "channels first"),
    (2, 1, 1, 1, 1, None, True, False, "float32", "channels last"),
    (2, 2, 0, 3, 4, None, True, False, "float32", "channels last"),
    (0, 1, 5, 3, 4, None, True, False, "float32", "channels last"),
    (1, 1, 0, 3, 2, (0,), True, False, "float32", "channels last"),
]


def test_interpreted_kernels_match():
    program = "\n".join(f"CASE = {case}\n{INTERPRETED}" for case in CASES)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=os.path.dirname(__file__), env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


TYPES = {"p_reset": "u8", "p_sequence": "i32", "p_edges": "i32"}
COMPUTED = ("p_weight", "p_bias", "p_sums", "p_grad")  # in the dtype that is computed in
NONE = {"p_state": None, "p_reset": None, "p_sequence": None, "p_edges": None}


def spilled(kernel, dtype: str, config: dict, capability: int, tmp_path, **constants) -> int:
    """Bytes of registers that ptxas spills in a kernel; `constants` may hold None for a pointer that is absent."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config = dict(config)
    options = {"num_warps": config.pop("num_warps")}
    constants = {name: x for name, x in (constants | config).items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            computed = "fp64" if dtype == "fp64" else "fp32"
            signature[name] = "*" + TYPES.get(name, computed if name in COMPUTED else dtype)
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    arch = {80: "sm_80", 90: "sm_90a"}[capability]
    ptxas = [triton.knobs.nvidia.ptxas.path, "-v", "-arch", arch, str(ptx), "-o", str(tmp_path / "kernel.cubin")]
    report = subprocess.run(ptxas, capture_output=True, text=True, check=True).stderr
    found = re.findall(r"(\d+) bytes spill", report)
    assert found, report
    return max(map(int, found))


def check(W: int, dtype: str, capability: int, tmp_path, plain: bool) -> None:
    from fastmem.kernels import causal_conv1d as kernels

    absent = NONE if plain else {}
    strides = {"x_d": 1, "g_d": 1}
    each = [
        (kernels._forward, kernels.FORWARD_CONFIG),
        (kernels._onto_taps, kernels.sums_config(W)),
        (kernels._backward, kernels.FORWARD_CONFIG),
        (kernels._final_state, kernels.ROW_CONFIG),
        (kernels._step, kernels.ROW_CONFIG),
    ]
    if not plain:
        each.append((kernels._state_backward, kernels.ROW_CONFIG))
    for kernel, config in each:
        constants = {"W": W, "silu": True} | strides | ({} if kernel is kernels._step else absent)
        assert spilled(kernel, dtype, config, capability, tmp_path, **constants) == 0, kernel.__name__


@pytest.mark.parametrize("capability,dtype,W,plain", [(80, "bf16", 4, True), (90, "bf16", 4, False)])
def test_kernels_compile_without_spills(capability, dtype, W, plain, tmp_path):
    check(W, dtype, capability, tmp_path, plain)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize("W", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("plain", [True, False])
def test_every_kernel_compiles_without_spills(capability, dtype, W, plain, tmp_path):
    check(W, dtype, capability, tmp_path, plain)


def test_triton_refuses_what_it_cannot_serve():
    from fastmem.kernels import causal_conv1d as kernels

    assert kernels.refuses(kernels.MAX_W) is None
    assert "9" in kernels.refuses(9)


def test_the_op_does_not_import_triton_until_a_kernel_runs():
    program = (
        "import sys, torch; had = 'triton' in sys.modules; import fastmem; "
        "fastmem.causal_conv1d(torch.zeros(1, 2, 2), torch.zeros(2, 2)); "
        "assert ('triton' in sys.modules) == had and 'fastmem.kernels.causal_conv1d' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype,limit", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("packed", [False, True])
def test_on_a_gpu(dtype, limit, activation, packed):
    from fastmem.ops.causal_conv1d import causal_conv1d, causal_conv1d_step

    L, D, W = 777, 100, 4
    edges = torch.tensor([0, 0, 100, 101, 500, L], dtype=torch.int32, device="cuda") if packed else None
    B, n = (1, 5) if packed else (3, 3)
    shapes = ((B, L, D), (D, W), (D,), (n, W - 1, D))
    x, weight, bias, state = (torch.randn(s, dtype=dtype, device="cuda", requires_grad=True) for s in shapes)
    settings = dict(activation=activation, reset=torch.rand(B, L, device="cuda") < 0.01, cu_seqlens=edges)
    results = []
    for backend, convert in (("triton", lambda t: t), ("reference", torch.Tensor.double)):
        leaves = [convert(t) for t in (x, weight, bias, state)]
        y, final = causal_conv1d(
            *leaves[:3], initial_state=leaves[3], return_final_state=True, backend=backend, **settings
        )
        loss = y.double().square().sum() + final.double().square().sum()
        results.append((y, final, *torch.autograd.grad(loss, (x, weight, bias, state))))
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() <= 2 * limit * expected.norm()
    new = [causal_conv1d_step(state[:B], x[:, 0], weight, bias, backend=b) for b in ("triton", "reference")]
    for got, expected in zip(*new, strict=True):
        assert (got - expected).norm() <= 2 * limit * expected.norm()

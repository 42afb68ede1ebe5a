"""The Triton kernels without a GPU: results in triton's interpreter, and compilation for the GPUs we support."""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")


def run_interpreted(names):
    folder = os.path.dirname(__file__)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "selective_scan_interpreted.py", *names.split()]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == names.split()


# Each program takes seconds to start, so several cases share one.
@pytest.mark.parametrize(
    "names",
    [
        "everything bare whole packed length_3_of_4 length_4_of_4 length_5_of_4 length_13_of_8 ahead ahead_split",
        "sets teams one_program groups wide large_N bfloat16 float16 steps",
        "no_rows no_channels length_0 length_1 nan infinite",
    ],
)
def test_interpreted_kernels_match(names):
    run_interpreted(names)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["length_63 length_64 length_65", "length_130", "length_130_whole", "packed_130"])
def test_interpreted_kernels_match_with_chunks_as_they_are(name):
    run_interpreted(name)


STREAMS = ("u", "delta", "B", "C", "z")  # in the dtype of the call, with their directions and gradients
OTHERS = {"p_reset": "i1", "p_cu": "i64", "p_dropped": "i8"}


def compile_kernel(name, N, dtype, capability, tmp_path, width=1024, aligned=False, bare=False, **flags):
    """Kernel `name` with its config; `flags` are its constexpr flags. Bare: without what may be absent."""
    from fastmem.kernels import selective_scan as kernels
    from triton_compiled import compiled

    kernel = getattr(kernels, name)
    dual = flags.get("dual", False)
    config = {
        "_local": lambda: kernels.scan_config(N, width, dual),
        "_carry": lambda: kernels.CARRY_CONFIG,
        "_forward": lambda: kernels.scan_config(N, width, dual),
        "_backward": lambda: kernels.backward_config(N, dual),
        "_step": lambda: kernels.step_config(N),
    }[name]()
    data = {f"p_{x}" for x in (*STREAMS, "y", "grad_y")}
    data |= {f"p_{kind}_{x}" for kind in ("to", "grad") for x in STREAMS if kind == "to" or x not in "BC"}
    flags |= {"N": N} | ({} if name == "_carry" else {"softplus": not bare})
    if name in ("_forward", "_backward"):
        flags["chunk"] = kernels.CHUNK
    absent = [
        "p_D",
        "p_z",
        "p_bias",
        "p_first",
        *(["p_state"] if name != "_step" else []),
        "p_grad_D",
        "p_grad_z",
        "p_grad_bias",
        "p_grad_state",
    ]
    absent = [*absent, "p_reset", "p_cu", "p_starts"] if bare else []
    absent += [x for x in kernel.arg_names if x.startswith("p_to_") and not dual]
    flags |= {x: None for x in absent if x in kernel.arg_names}
    pointers = lambda x: OTHERS.get(x, dtype if x in data else "fp32")  # noqa: E731
    return compiled(kernel, config, capability, tmp_path, pointers, aligned=aligned, **flags)


KERNELS = [  # each with the flags that it has
    ("_local", {"adjoint": False, "dual": False}),
    ("_local", {"adjoint": True, "dual": False}),
    ("_local", {"adjoint": False, "dual": True}),
    ("_local", {"adjoint": True, "dual": True}),
    ("_carry", {"adjoint": False, "dual": False}),
    ("_carry", {"adjoint": True, "dual": True}),
    ("_forward", {"dual": False}),
    ("_forward", {"dual": True}),
    ("_backward", {"dual": False}),
    ("_backward", {"dual": True}),
    ("_step", {}),
]


@pytest.mark.parametrize(
    "which,dtype,capability",
    [(3, "fp32", 80), (5, "fp32", 90), (6, "fp32", 80), (8, "bf16", 90), (9, "fp32", 80), (10, "bf16", 90)],
)
def test_compiles_without_spills(which, dtype, capability, tmp_path):
    name, flags = KERNELS[which]
    assert compile_kernel(name, 16, dtype, capability, tmp_path, **flags).spilled == 0


def test_forward_sums_over_the_states_inside_a_thread(tmp_path):
    """What its layout is for: no shuffles. B and C alone are spread, once for the steps of a block."""
    ptx = compile_kernel("_forward", 16, "bf16", 90, tmp_path, aligned=True, dual=False).ptx
    loops = 2  # blocks of steps, and what is left singly
    assert "shfl" not in ptx and ptx.count("bar.sync") <= loops * 2 * 2


@pytest.mark.parametrize("name,flags,most", [("_forward", {}, 130), ("_local", {"adjoint": False}, 105)])
def test_a_step_takes_few_instructions(name, flags, most, tmp_path):
    """Of a warp, for 32 channels of 16 states: 80 are the arithmetic of the scan, of `_local` 64."""
    from triton_compiled import first_loop

    result = compile_kernel(name, 16, "bf16", 90, tmp_path, aligned=True, bare=True, dual=False, **flags)
    loop = first_loop(result.cubin)
    assert sum("MUFU.EX2" in x for x in loop) == 4 * 16 and len(loop) <= 4 * most


@pytest.mark.slow
@pytest.mark.parametrize("b_n", [1, 2, 4, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("name,flags", KERNELS)
def test_every_config_compiles_without_spills(name, flags, b_n, tmp_path):
    for N, dtype, capability, aligned, bare, width in [
        (b_n, "fp32", 80, False, False, 1024),
        (b_n, "bf16", 90, True, False, 1024),
        (max(1, b_n - 1), "fp32", 90, False, True, 4),
    ]:
        result = compile_kernel(name, N, dtype, capability, tmp_path, width, aligned, bare, **flags)
        assert result.spilled == 0, (N, dtype, capability, aligned, bare, width, result.spilled)


def test_triton_refuses_what_it_cannot_serve():
    from fastmem.kernels import selective_scan as kernels

    assert kernels.refuses(torch.float32, kernels.MAX_N) is None
    assert "257" in kernels.refuses(torch.float32, 257)
    assert "float64" in kernels.refuses(torch.float64, 16)


def test_time_is_split_at_chunks_where_it_fills_the_gpu():
    from fastmem.kernels import selective_scan as kernels

    most = kernels.WARPS
    assert kernels.split(2048, 32, most, 3) == (32, 64)
    assert kernels.split(100_000, 48, most, 3) == (24, 4224)
    for L in (0, 1, 64, 128):
        assert kernels.split(L, 1, most, 3) == (1, max(L, 1))
    assert kernels.split(4096, most // 2, most, 3)[0] == 1 and kernels.split(4096, most // 2, most, 2)[0] == 2
    for L in (129, 1000, 65_537):
        segments, steps = kernels.split(L, 7, most, 3)
        assert steps % kernels.CHUNK == 0 and (segments - 1) * steps < L <= segments * steps


def test_the_op_does_not_import_triton_until_a_kernel_runs():
    program = (
        "import sys, torch; had = 'triton' in sys.modules; import fastmem; fastmem.selective_scan; "
        "x = torch.zeros(1, 1, 2); fastmem.selective_scan(x, x, x[0].T, x[..., :1], x[..., :1]); "
        "assert ('triton' in sys.modules) == had and 'fastmem.kernels.selective_scan' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("R,L,D,N,packed", [(1, 1500, 70, 16, True), (3, 63, 33, 5, False), (300, 10, 64, 16, False)])
def test_on_a_gpu(dtype, R, L, D, N, packed):
    from fastmem.ops.selective_scan import selective_scan

    cuda = {"device": "cuda"}
    u, delta, z, out = (torch.randn(R, L, D, **cuda).to(dtype) for _ in range(4))
    B, C = (torch.randn(R, L, N, **cuda).to(dtype) for _ in range(2))
    A, skip, bias = -torch.rand(D, N, **cuda) * 4, torch.randn(D, **cuda), torch.randn(D, **cuda)
    cu_seqlens = torch.tensor([0, 1, 1, 700, L], **cuda) if packed else None
    state = torch.randn(R if cu_seqlens is None else len(cu_seqlens) - 1, D, N, **cuda)
    options = dict(reset=torch.rand(R, L, **cuda) < 0.02, cu_seqlens=cu_seqlens)

    def derivatives(backend, cast):
        leaves = [cast(x).requires_grad_() for x in (u, delta, A, B, C, skip, z, bias, state)]
        y, final = selective_scan(
            *leaves[:8],
            initial_state=leaves[8],
            delta_softplus=True,
            return_final_state=True,
            backend=backend,
            **options,
        )
        grads = torch.autograd.grad((y * cast(out)).sum() + final.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().mean() for g in grads), leaves)
        return [y, final], grads, second

    got, expected = derivatives("triton", torch.clone), derivatives("reference", torch.Tensor.double)
    again = derivatives("triton", torch.clone)
    limits = (1e-5, 1e-4, 1e-3) if dtype == torch.float32 else (1e-2, 2e-2, 5e-2)
    for limit, some, true, same in zip(limits, got, expected, again, strict=True):
        for x, t, s in zip(some, true, same, strict=True):
            assert (x - t).norm() <= limit * t.norm()
            assert torch.equal(x, s)

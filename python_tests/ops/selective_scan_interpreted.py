"""Run by test_selective_scan_triton.py under TRITON_INTERPRET=1: `CASE ...`, names of CASES, against the reference."""

import sys
from dataclasses import dataclass, replace

import torch
import triton_interpreter  # noqa: F401
from fastmem.kernels import selective_scan as kernels

from fastmem.ops import _selective_scan_reference as definition
from fastmem.ops._selective_scan_autograd import _final, _gradients

torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
ALL = [True] * 9
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


@dataclass(frozen=True)
class Case:
    R: int = 2
    L: int = 9
    D: int = 3
    N: int = 3
    G: int = 1
    P: int = 1
    absent: tuple[str, ...] = ()  # of NAMES, "reset", "grad_final", and directions "to_..."
    cu_seqlens: tuple[int, ...] | None = None
    softplus: bool = True
    dtype: torch.dtype = torch.float32
    chunk: int = 4  # small, so that a few steps are several chunks
    warps: int = 2048  # of these, time is split among those that sequences and channels leave
    programs: int = 2048  # that a backward runs, and of which it splits time, unless `warps` forbids that
    second: bool = True
    twice: bool = False  # whether the bits are compared with those of a second run


EVERYTHING = Case()
BARE = Case(absent=("D", "z", "delta_bias", "initial_state", "reset", "grad_final"), softplus=False)
FIRST_ORDER = Case(R=1, D=1, N=2, chunk=64, second=False)
CASES = {
    # Time is split in these, but for the last.
    "everything": replace(EVERYTHING, R=1, twice=True),
    "bare": replace(BARE, R=1, L=9, N=4),
    "packed": replace(EVERYTHING, L=7, P=2, D=2, N=2, cu_seqlens=(0, 1, 1, 7)),
    "whole": replace(
        EVERYTHING, R=1, L=9, N=2, warps=0, absent=("to_u", "to_A", "to_C", "to_z", "to_initial_state", "D")
    ),
    # Too short for it.
    "sets": replace(EVERYTHING, R=4, L=2, P=2, D=5, N=17),
    "teams": replace(EVERYTHING, R=6, L=5, P=2, D=9, N=2, G=3, programs=12, twice=True, second=False),
    "one_program": replace(EVERYTHING, R=4, L=2, P=2, D=3, N=2, programs=1),
    "groups": replace(EVERYTHING, R=1, L=2, D=9, G=3),
    "wide": replace(EVERYTHING, R=1, L=2, D=70, N=8, absent=("z", "to_delta", "to_B", "to_D", "to_delta_bias")),
    "large_N": replace(EVERYTHING, R=1, L=2, N=256),
    "bfloat16": replace(EVERYTHING, L=3, dtype=torch.bfloat16),
    "float16": replace(EVERYTHING, L=3, D=33, dtype=torch.float16, second=False),
    "no_rows": replace(EVERYTHING, R=0),
    "no_channels": replace(EVERYTHING, D=0),
    "length_0": replace(EVERYTHING, L=0),
    "length_1": replace(EVERYTHING, L=1, N=1, D=1),
    # Around the length of a chunk, a small one and the real one.
    "length_3_of_4": replace(FIRST_ORDER, L=3, chunk=4),
    "length_4_of_4": replace(FIRST_ORDER, L=4, chunk=4),
    "length_5_of_4": replace(FIRST_ORDER, L=5, chunk=4),
    "length_13_of_8": replace(FIRST_ORDER, L=13, chunk=8, warps=0),
    "ahead": replace(EVERYTHING, R=1, L=13, N=16, D=2, chunk=8, cu_seqlens=(0, 0, 1, 13), warps=0),
    "ahead_split": replace(EVERYTHING, R=1, N=13, D=2),
    "length_63": replace(FIRST_ORDER, L=63),
    "length_64": replace(FIRST_ORDER, L=64),
    "length_65": replace(FIRST_ORDER, L=65, second=True),
    "length_130": replace(FIRST_ORDER, L=130, second=True, twice=True),
    "length_130_whole": replace(FIRST_ORDER, L=130, warps=0, second=True),
    "packed_130": replace(FIRST_ORDER, L=130, cu_seqlens=(0, 1, 1, 66, 130), absent=("z",)),
}


def strided(*shape):
    """Rows inside a wider tensor, steps before rows."""
    lead, width = shape[:-1], shape[-1]
    return torch.randn(lead[1], lead[0], *lead[2:], width + 3).transpose(0, 1)[..., 1 : 1 + width]


def make(case):
    """(the twelve raw inputs, directions, grad_y, grad_final)."""
    R, L, D, N, P = case.R, case.L, case.D, case.N, case.P
    S = R * (1 if case.cu_seqlens is None else len(case.cu_seqlens) - 1)
    shapes = dict(u=(R, L, D), delta=(R, L, D), A=(P, D, N), B=(R, L, case.G, N), C=(R, L, case.G, N), D=(P, D))
    shapes |= dict(z=(R, L, D), delta_bias=(P, D), initial_state=(S, D, N))
    inputs = {
        name: strided(*shape) if name in "u delta B C z" else torch.randn(shape) for name, shape in shapes.items()
    }
    inputs = {name: x.to(case.dtype) if name in "u delta B C z" else x for name, x in inputs.items()}
    inputs["A"] = -inputs["A"].abs() - 0.1
    if not case.softplus:
        inputs["delta"] = (inputs["delta"].abs() * 0.2).to(case.dtype)
    elif L > 0:
        inputs["delta"][:, L // 2 :: 5] += 21  # the straight part of softplus
        inputs["delta"][:, ::3] -= 7
    inputs = [None if name in case.absent else inputs[name] for name in NAMES]
    reset = None if "reset" in case.absent else torch.rand(R, L) < 0.1
    cu_seqlens = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens)
    directions = [
        None if x is None or f"to_{name}" in case.absent else torch.randn(x.shape).to(x.dtype)
        for name, x in zip(NAMES, inputs, strict=True)
    ]
    grad_y = torch.randn(R, L, D).to(case.dtype)
    grad_final = None if "grad_final" in case.absent else torch.randn(S, D, N)
    return (*inputs, reset, cu_seqlens, case.softplus), directions, grad_y, grad_final


def truth(inputs):
    """(y, final) by the definition, a row at a time."""
    u, delta, A, B, C, D, z, bias, state, reset, cu_seqlens, softplus = inputs
    R, P = u.shape[0], A.shape[0]
    packed = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    ys, finals = [u[:0]], [A[:0]]
    for r in range(R):
        u_, delta_, B_, C_, z_, reset_ = (None if x is None else x[r : r + 1] for x in (u, delta, B, C, z, reset))
        A_, D_, bias_ = (None if x is None else x[r // (R // P)] for x in (A, D, bias))
        state_ = None if state is None else state[r * packed : (r + 1) * packed]
        y, final = definition.scan(u_, delta_, A_, B_, C_, D_, z_, bias_, softplus, state_, reset_, cu_seqlens)
        ys.append(y)
        finals.append(final)
    return torch.cat(ys), torch.cat(finals)


def error(got, expected):
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-2)).item()


def gradients(results, leaves, **options):
    """Gradients of the sum of <x, g> over the pairs (x, g) of results."""
    x, g = zip(*results, strict=True)
    return torch.autograd.grad(x, leaves, g, allow_unused=True, materialize_grads=True, **options)


def check(what, got, expected, limit):
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert got.numel() == 0 or error(got, expected) <= limit, f"{what}: {error(got, expected)}"


def like(got, fakes):
    for x, fake in zip(got, fakes, strict=True):
        assert (x.shape, x.dtype, x.is_contiguous()) == (fake.shape, fake.dtype, fake.is_contiguous())


def run(case):
    torch.manual_seed(0)
    kernels.WARPS, kernels.CHUNK = case.warps, case.chunk
    kernels.BACKWARD_WARPS = min(case.warps, case.programs)
    inputs, directions, grad_y, grad_final = make(case)
    exact = [x.double().requires_grad_() if x is not None else None for x in inputs[:9]]
    exact_y, exact_final = truth((*exact, *inputs[9:]))
    towards = grad_y.double().requires_grad_(), None if grad_final is None else grad_final.double().requires_grad_()
    leaves = [x for x in exact if x is not None]
    results = [(x, g) for x, g in zip((exact_y, exact_final), towards, strict=True) if g is not None]
    exact_grads = gradients(results, leaves, create_graph=True)
    single = case.dtype == torch.float32
    limit, grad_limit = (1e-5, 1e-4) if single else (1e-2, 2e-2)

    y, final, carries = kernels.forward(*inputs, True, True)
    like((y, final), (y.new_empty(grad_y.shape), _final(y, inputs[2], inputs[10], True)))
    assert carries.shape == (case.R, case.L // case.chunk, case.N, case.D)
    check("y", y, exact_y, limit)
    check("final", final, exact_final, limit)
    grads = kernels.backward(grad_y, grad_final, carries, ALL, *inputs)
    like(grads, _gradients(ALL, *inputs))
    present = [i for i, x in enumerate(inputs[:9]) if x is not None]
    for i, expected in zip(present, exact_grads, strict=True):
        check(f"gradient of {NAMES[i]}", grads[i], expected, grad_limit)
    if case.twice:
        again = kernels.forward(*inputs, True, False)
        assert torch.equal(again[0], y) and torch.equal(again[1], final) and again[2].numel() == 0
        again = kernels.forward(*inputs, False, False)
        assert torch.equal(again[0], y) and again[1].numel() == again[2].numel() == 0
        again = kernels.backward(grad_y, grad_final, carries, ALL, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
        only_A = [i == NAMES.index("A") for i in range(9)]
        again = kernels.backward(grad_y, grad_final, carries, only_A, *inputs)
        assert torch.equal(again[2], grads[2]) and sum(g.numel() > 0 for g in again) == 1
    if not case.second:
        return

    tangents = kernels.tangent(*directions, grad_y, grad_final, ALL, *inputs)
    like(tangents, (y, final.new_empty(0) if grad_final is None else final, *grads))
    # By symmetry of the Hessian: the gradient of <gradients, directions>.
    along = [
        (g, directions[i].double()) for i, g in zip(present, exact_grads, strict=True) if directions[i] is not None
    ]
    wanted = [x for x in (*towards, *leaves) if x is not None]
    found = list(gradients(along, wanted))
    check("tangent of y", tangents[0], found.pop(0), grad_limit)
    if grad_final is not None:
        check("tangent of final", tangents[1], found.pop(0), grad_limit)
    for i, expected in zip(present, found, strict=True):
        check(f"tangent of the gradient of {NAMES[i]}", tangents[2 + i], expected, grad_limit)


def run_step(R, D, N, G, full, dtype):
    """selective_scan_step_ as one step of the definition."""
    shapes = dict(u=(R, D), delta=(R, D), A=(D, N), B=(R, G, N), C=(R, G, N), D=(D,), z=(R, D), delta_bias=(D,))
    x = {name: torch.randn(shape) for name, shape in shapes.items()}
    x["A"] = -x["A"].abs()
    x = {name: value.to(dtype) if name in "u delta B C z" else value for name, value in x.items()}
    if not full:
        x |= dict(D=None, z=None, delta_bias=None)
    state = torch.randn(R, D, N)
    exact = {name: None if value is None else value.double() for name, value in x.items()}
    for name in ("u", "delta", "B", "C", "z"):
        exact[name] = None if exact[name] is None else exact[name][:, None]
    order = [exact[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    exact_y, exact_state = definition.scan(*order, full, state.double(), None, None)
    y = kernels.step_(state, *x.values(), full)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert y.dtype == dtype
    check("y of a step", y, exact_y[:, 0], limit)
    check("state of a step", state, exact_state, limit)


def run_steps():
    run_step(2, 9, 5, 3, True, torch.float32)
    run_step(3, 70, 16, 1, False, torch.float32)
    run_step(1, 6, 256, 2, True, torch.bfloat16)
    run_step(0, 6, 4, 1, True, torch.float32)


def run_nan():
    """What a reset drops is truly dropped."""
    case = replace(EVERYTHING, R=1, L=6)
    kernels.CHUNK = case.chunk
    inputs, _, grad_y, grad_final = make(case)
    inputs = list(inputs)
    inputs[8] = torch.full_like(inputs[8], torch.nan)
    inputs[9] = torch.tensor([[True, False, False, True, False, False]])
    _, _, carries = kernels.forward(*inputs, True, True)
    grads = kernels.backward(grad_y, grad_final, carries, ALL, *inputs)
    assert all(g.isfinite().all() for g in grads) and (grads[8] == 0).all()
    inputs[0][:, 1] = torch.inf
    for kernels.WARPS, kernels.BACKWARD_WARPS in ((0, 0), (2048, 2048)):  # in one piece, and split
        y, final, _ = kernels.forward(*inputs, True, False)
        assert y[:, 0].isfinite().all() and not y[:, 1:3].isfinite().any()
        assert y[:, 3:].isfinite().all() and final.isfinite().all()


def run_infinite():
    """What is not finite reaches what it does by the definition: through a last block that is not full, and a split."""
    case = replace(BARE, R=1, L=7)
    kernels.CHUNK = case.chunk
    inputs, _, grad_y, _ = make(case)
    grad_y = grad_y.abs() + 1

    def changed(u=None, decay=None, growing=False):
        u_, delta, A = (x.clone() for x in inputs[:3])
        if u is not None:
            u_[:, -1, 0] = u
        if decay is not None:
            A[0, 0, 0] = decay
        if growing:  # a segment's decay overflows, that of no step does
            A[:], delta[:], u_[:, :5] = 3, 20, 0
        return u_, delta, A, *inputs[3:]

    for bad in (changed(u=torch.inf), changed(u=torch.nan), changed(decay=-torch.inf), changed(growing=True)):
        exact = [x.double().requires_grad_() if x is not None else None for x in bad[:9]]
        leaves = [x for x in exact if x is not None]
        exact_y, _ = truth((*exact, *bad[9:]))
        expected = gradients([(exact_y, grad_y.double())], leaves)
        for kernels.WARPS, kernels.BACKWARD_WARPS in ((0, 0), (2048, 2048)):
            y, _, carries = kernels.forward(*bad, True, True)
            assert (y.isfinite() == exact_y.float().isfinite()).all(), y
            if bad[2][0, 0, 0] > 0:
                continue  # adjoints overflow in float32 at every step
            grads = [g for g in kernels.backward(grad_y, None, carries, ALL, *bad) if g.numel()]
            for got, want in zip(grads, expected, strict=True):
                assert (got.isfinite() == want.float().isfinite()).all(), (got, want)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        torch.manual_seed(0)
        if name in CASES:
            run(CASES[name])
        else:
            {"steps": run_steps, "nan": run_nan, "infinite": run_infinite}[name]()
        print(name, flush=True)

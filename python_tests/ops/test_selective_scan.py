"""selective_scan: results against the reference in float64, edges, and what a wrong call says."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from selective_scan_data import OPTIONAL, double, error, make, results

import fastmem
from fastmem.ops import _direct, _dispatch, _selective_scan_autograd
from fastmem.ops.selective_scan import selective_scan, selective_scan_step, selective_scan_step_

# B, L, D, N, and the rest of `make`
CALLS = {
    "plain": ((2, 63, 100, 16), {"optional": (), "softplus": False}),
    "all": ((2, 100, 63, 3), {}),
    "one of each": ((1, 1, 1, 1), {}),
    "one channel": ((3, 257, 1, 5), {}),
    "one state": ((2, 130, 70, 1), {}),
    "many states": ((1, 65, 17, 257), {}),
    "long": ((1, 700, 3, 4), {}),
    "groups": ((2, 66, 24, 5), {"G": 3}),
    "groups of one channel": ((2, 20, 5, 4), {"G": 5}),
    "groups wider than a block": ((1, 70, 260, 4), {"G": 2}),
    "resets": ((3, 200, 20, 8), {"reset": True}),
    "packed": ((1, 0, 20, 8), {"packed": (3, 0, 64, 1, 65, 128, 7)}),
    "packed and reset": ((1, 0, 70, 3), {"packed": (70, 130, 0), "reset": True, "G": 2}),
    "short, many": ((300, 3, 10, 16), {}),
    "no steps": ((2, 0, 5, 4), {}),
    "no rows": ((0, 5, 5, 4), {}),
    "no channels": ((2, 70, 0, 4), {}),
    "nothing packed": ((1, 0, 5, 4), {"packed": ()}),
}


def check(got, expected, limit, gradient_limit):
    for name, x in got.items():
        assert x.shape == expected[name].shape, name
        allowed = gradient_limit if name.startswith("d") else limit
        assert error(x, expected[name]) <= allowed, (name, error(x, expected[name]))


@pytest.mark.parametrize("name", CALLS)
def test_float32_matches_the_reference(name):
    size, kind = CALLS[name]
    call = make(*size, **kind)
    check(results(call, "cpp", second=True), results(double(call), "reference", second=True), 1e-5, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "all", "groups", "packed", "resets"])
def test_half_types_match_the_reference(name, dtype):
    size, kind = CALLS[name]
    call = make(*size, dtype=dtype, **kind)
    got = results(call, "cpp", second=True)
    assert got["y"].dtype == got["d u"].dtype == dtype and got["final"].dtype == torch.float32
    check(got, results(double(call), "reference", second=True), 1e-2, 2e-2)


@pytest.mark.parametrize("name", CALLS)
def test_float64_matches_the_reference(name):
    size, kind = CALLS[name]
    call = make(*size, dtype=torch.float64, **kind)
    check(results(call, "cpp", second=True), results(call, "reference", second=True), 1e-12, 1e-12)


def test_each_input_may_have_its_own_float_type():
    call = make(2, 70, 24, 5, G=2)
    types = {"u": torch.bfloat16, "delta": torch.float32, "B": torch.float16, "C": torch.bfloat16, "z": torch.float16}
    call |= {name: call[name].to(dtype) for name, dtype in types.items()}
    call |= {name: call[name].half() for name in ("A", "D", "delta_bias", "initial_state")}
    got = results(call, "cpp")
    assert all(got[f"d {name}"].dtype == call[name].dtype for name in ("u", "delta", "B", "A", "initial_state"))
    check(got, results(double(call), "reference"), 1e-2, 2e-2)


@pytest.mark.parametrize("optional", [(name,) for name in OPTIONAL] + [("D", "z"), ("delta_bias", "initial_state")])
@pytest.mark.parametrize("softplus", [False, True])
def test_every_argument_alone(optional, softplus):
    call = make(2, 70, 20, 4, optional=optional, softplus=softplus)
    check(results(call, "cpp", second=True), results(double(call), "reference", second=True), 1e-5, 1e-4)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    from fastmem import _native

    if isa == _native.isa:
        pytest.skip(f"{isa} is what every other test here runs on")
    if _native.ISAS.index(isa) > _native.ISAS.index(_native._load()[0]):
        pytest.skip(f"this CPU has no {isa}")
    program = (
        "from test_selective_scan import *\n"
        "for name in CALLS:\n    test_float32_matches_the_reference(name)\n"
        "test_huge_and_tiny_exponents()\ntest_steps_are_the_scan('all')\n"
    )
    environment = os.environ | {"FASTMEM_CPU_ISA": isa}
    subprocess.run([sys.executable, "-c", program], cwd=os.path.dirname(__file__), env=environment, check=True)


def test_non_contiguous_inputs_are_read_in_place_or_copied():
    call = make(3, 70, 20, 4, G=2)
    wide = {name: torch.stack([call[name], call[name] * 0 - 1], 1)[:, 0] for name in ("u", "delta", "z", "B", "C")}
    assert not wide["u"].is_contiguous()
    channels_first = {name: call[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("u", "delta", "z")}
    split = {name: torch.cat([call[name], call[name]], -1)[..., : call[name].shape[-1]] for name in ("B", "C", "u")}
    expanded = {"A": call["A"][:1].expand(20, 4), "D": call["D"][:1].expand(20)}
    for change in (wide, channels_first, split, expanded):
        changed = call | change
        expected = results({k: x.contiguous() if isinstance(x, torch.Tensor) else x for k, x in changed.items()}, "cpp")
        leaves = {k: x.requires_grad_() for k, x in changed.items() if k in change and not x.requires_grad}
        y = selective_scan(**changed)
        assert torch.equal(y.detach(), expected["y"])
        y.sum().backward() if all(x.is_leaf for x in leaves.values()) else None


@pytest.mark.parametrize("name", ["all", "groups", "packed", "short, many", "long"])
def test_same_bits_twice_and_on_one_thread(name):
    size, kind = CALLS[name]
    call = make(*size, **kind)
    threads = torch.get_num_threads()
    first, second = (results(call, "cpp", second=True) for _ in range(2))
    try:
        torch.set_num_threads(1)
        alone = results(call, "cpp", second=True)
        torch.set_num_threads(3)
        three = results(call, "cpp", second=True)
    finally:
        torch.set_num_threads(threads)
    for key, x in first.items():
        assert torch.equal(x, second[key]) and torch.equal(x, alone[key]) and torch.equal(x, three[key]), key


def test_a_sequence_in_two_calls_is_the_sequence():
    call = make(2, 150, 20, 4)
    whole, final = selective_scan(**call, return_final_state=True)
    parts, state = [], call["initial_state"]
    for cut in (slice(0, 77), slice(77, 150)):
        piece = call | {name: call[name][:, cut] for name in ("u", "delta", "B", "C", "z")} | {"initial_state": state}
        y, state = selective_scan(**piece, return_final_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, final)


def test_packed_is_the_sequences_alone():
    lengths = (70, 0, 5, 130)
    call = make(1, 0, 20, 4, packed=lengths)
    y, final = selective_scan(**call, return_final_state=True)
    begin = 0
    for i, length in enumerate(lengths):
        cut = slice(begin, begin + length)
        alone = {
            k: x[:, cut] if k in ("u", "delta", "B", "C", "z") else x for k, x in call.items() if k != "cu_seqlens"
        }
        alone["initial_state"] = call["initial_state"][i : i + 1]
        y_alone, final_alone = selective_scan(**alone, return_final_state=True)
        torch.testing.assert_close(y[:, cut], y_alone)
        torch.testing.assert_close(final[i : i + 1], final_alone)
        begin += length


def test_a_reset_starts_anew():
    call = make(1, 100, 20, 4)
    reset = torch.zeros(1, 100, dtype=torch.bool)
    reset[:, [0, 40]] = True
    y = selective_scan(**call, reset=reset)
    del call["initial_state"]
    tail = call | {name: call[name][:, 40:] for name in ("u", "delta", "B", "C", "z")}
    torch.testing.assert_close(y[:, 40:], selective_scan(**tail))
    head = call | {name: call[name][:, :40] for name in ("u", "delta", "B", "C", "z")}
    torch.testing.assert_close(y[:, :40], selective_scan(**head))


# ------------------------------------------------------------------------------------------------------------ the step


@pytest.mark.parametrize("name", ["plain", "all", "many states", "one state", "groups", "one of each", "no rows"])
def test_steps_are_the_scan(name):
    size, kind = CALLS[name]
    call = make(*size, **kind)
    y, final = selective_scan(**call, return_final_state=True)
    B, L, D, N = size
    state = call.pop("initial_state", torch.zeros(B, D, N))
    in_place = state.clone()
    for t in range(L):
        step = call | {k: call[k][:, t] for k in ("u", "delta", "B", "C", "z") if k in call}
        out, state = selective_scan_step(state, **step)
        assert error(out, y[:, t]) < 1e-5
        assert torch.equal(selective_scan_step_(in_place, **step), out) and torch.equal(in_place, state)
    assert error(state, final) < 1e-5


def test_the_step_leaves_its_state_and_is_differentiable():
    call = make(2, 1, 6, 3, dtype=torch.float64)
    state = call.pop("initial_state").requires_grad_()
    step = {k: x[:, 0] if k in ("u", "delta", "B", "C", "z") else x for k, x in call.items()}
    before = state.detach().clone()

    def f(state, u, A):
        return selective_scan_step(state, **(step | {"u": u, "A": A}))

    inputs = state, step["u"].requires_grad_(), step["A"].requires_grad_()
    assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)
    assert torch.equal(state.detach(), before)
    with pytest.raises(RuntimeError, match="selective_scan_step_: gradients do not flow"):
        selective_scan_step_(state, **step)


def test_autograd_sees_that_the_state_was_changed():
    call = make(2, 1, 6, 3)
    state = call.pop("initial_state")
    step = {k: x[:, 0] if k in ("u", "delta", "B", "C", "z") else x for k, x in call.items()}
    weight = torch.ones_like(state, requires_grad=True)
    y = (state * weight).sum()
    with torch.no_grad():
        selective_scan_step_(state, **step)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def steps_of(call):
    """The arguments of one step: state, and the rest by name."""
    state = call.pop("initial_state")
    return state, {k: x[:, 0] if k in ("u", "delta", "B", "C", "z") else x for k, x in call.items()}


STEP_SIZES = [(1, 96, 16, 1), (3, 70, 16, 1), (2, 66, 5, 3), (2, 5, 1, 5), (1, 130, 40, 2), (2, 1, 3, 1), (0, 8, 4, 1)]


@pytest.mark.parametrize("size", STEP_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_step_that_goes_straight_to_the_kernel_is_the_reference(size, dtype, monkeypatch):
    rows, D, N, G = size
    state, step = steps_of(make(rows, 1, D, N, G=G, dtype=dtype))
    y, new = selective_scan_step(state, **step, backend="reference")
    limit = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    for reads_tensors in (True, False):  # False: as with a PyTorch that has no exchange table
        monkeypatch.setattr(_direct, "KERNELS_READ_TENSORS", reads_tensors and _direct.KERNELS_READ_TENSORS)
        monkeypatch.setattr(_selective_scan_autograd, "KERNELS_READ_TENSORS", _direct.KERNELS_READ_TENSORS)
        changed = state.clone()
        got = selective_scan_step_(changed, **step)
        assert got.dtype == y.dtype and error(got, y) <= limit and error(changed, new) <= limit


ODD_TENSORS = {
    "a row of a wider tensor": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every second element": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "negative bit": lambda x: torch._neg_view(-x),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "subclass": lambda x: x.as_subclass(type("Odd", (torch.Tensor,), {})),
    "another float type": lambda x: x.half(),
}


@pytest.mark.parametrize("odd", ODD_TENSORS)
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_a_step_takes_any_tensor(name, odd):
    state, step = steps_of(make(2, 1, 12, 16))
    step[name] = ODD_TENSORS[odd](step[name])
    y, new = selective_scan_step(state, **step, backend="reference")
    changed = state.clone()
    got = selective_scan_step_(changed, **step)
    assert error(got, y) <= 1e-5 and error(changed, new) <= 1e-5


def test_a_step_takes_any_state():
    state, step = steps_of(make(2, 1, 12, 16))
    y, new = selective_scan_step(state, **step, backend="reference")
    for other in (torch._neg_view(-state), state.repeat_interleave(2, -1)[..., ::2], state.expand(2, 12, 16).clone()):
        assert error(selective_scan_step_(other, **step), y) <= 1e-5 and error(other, new) <= 1e-5


@pytest.mark.parametrize("name", ["state", "u", "delta", "A", "B", "C"])
@pytest.mark.parametrize("kind", ["None", "sparse", "meta", "number"])
def test_a_step_names_what_it_cannot_take(name, kind):
    state, step = steps_of(make(2, 1, 12, 16))
    step["state"] = state
    step[name] = {"None": None, "sparse": step[name].to_sparse(), "meta": step[name].to("meta"), "number": 3}[kind]
    before = state.clone()
    with pytest.raises((TypeError, ValueError, NotImplementedError, RuntimeError)):
        selective_scan_step_(**step)
    assert torch.equal(state, before)


@pytest.mark.parametrize("N", [1, 5, 8, 12, 16])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38])
@pytest.mark.parametrize("name", ["u", "delta"])
def test_a_step_takes_what_is_not_finite(name, value, N):
    state, step = steps_of(make(1, 1, 4, N, softplus=False))
    step["delta"] = step["delta"].abs() + 2
    step[name] = step[name].clone()
    step[name][0, 1] = value
    y, new = selective_scan_step(state, **step, backend="reference")
    changed = state.clone()
    got = selective_scan_step_(changed, **step)
    for a, b in ((got, y), (changed, new)):
        torch.testing.assert_close(a.nan_to_num(7.0, 8.0, 9.0), b.nan_to_num(7.0, 8.0, 9.0), rtol=1e-4, atol=1e-4)


def test_a_gate_far_below_zero_is_shut():
    state, step = steps_of(make(1, 1, 4, 16))
    step["z"] = torch.tensor([[-1e38, -1e36, -100.0, -1.0]])
    y, _ = selective_scan_step(state, **step, backend="reference")
    torch.testing.assert_close(selective_scan_step_(state, **step), y, rtol=1e-5, atol=1e-30)


def test_a_step_is_traced_compiled_and_takes_a_tensor_without_memory():
    state, step = steps_of(make(2, 1, 12, 16))
    expected, new = selective_scan_step(state, **step, backend="reference")
    zero = torch._efficientzerotensor(2, 12)
    y, _ = selective_scan_step(state, **(step | {"u": torch.zeros(2, 12)}))
    torch.testing.assert_close(selective_scan_step_(state.clone(), **(step | {"u": zero})), y)

    def run(state, u):
        return selective_scan_step_(state, **(step | {"u": u}))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and says what it takes for constant
        traced = torch.jit.trace(run, (state.clone(), step["u"]))
    for made in (torch.compile(run, fullgraph=True, backend="eager"), traced):
        changed = state.clone()
        torch.testing.assert_close(made(changed, step["u"]), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(changed, new, rtol=1e-4, atol=1e-5)


def test_the_step_in_place_writes_into_any_view():
    call = make(2, 1, 6, 3)
    state = call.pop("initial_state")
    step = {k: x[:, 0] if k in ("u", "delta", "B", "C", "z") else x for k, x in call.items()}
    strided = torch.zeros(2, 3, 6).transpose(1, 2)
    strided.copy_(state)
    y, new = selective_scan_step(state, **step)
    torch.testing.assert_close(selective_scan_step_(strided, **step), y)
    torch.testing.assert_close(strided, new)
    with pytest.raises(
        TypeError, match=r"state: expected torch.float32, which is changed in place, got torch.bfloat16"
    ):
        selective_scan_step_(state.bfloat16(), **step)


# ------------------------------------------------------------------------------------------------------------- numbers


def test_huge_and_tiny_exponents():
    """dt A from -1e30 to 300: 0 and infinity where the exponential has them, in float32."""
    rates = torch.tensor([-1e30, -200.0, -104.0, -88.5, -87.0, -1e-7, 0.0, 60.0, 87.0, 88.7, 89.5, 300.0, 1e30])
    u, delta = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    A, ones = rates[None], torch.ones(1, 1, len(rates))
    state = torch.full((1, 1, len(rates)), 0.5)
    _, final = selective_scan(u, delta, A, ones, ones, initial_state=state, return_final_state=True)
    expected = 0.5 * torch.exp(rates)
    normal = expected.isfinite() & (expected >= 1e-37)
    torch.testing.assert_close(final[0, 0][normal], expected[normal], rtol=2e-5, atol=0)
    assert (final[0, 0][expected < 1e-37] <= 1e-37).all() and (final[0, 0][expected.isinf()] == torch.inf).all()
    step = selective_scan_step(state, u[:, 0], delta[:, 0], A, ones[:, 0], ones[:, 0])[1]
    torch.testing.assert_close(step[0, 0][normal], expected[normal], rtol=2e-5, atol=0)
    assert (step[0, 0][expected.isinf()] == torch.inf).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z"])
def test_what_is_not_finite_goes_where_mathematics_says(name, value):
    call = make(2, 70, 20, 4, optional=("D", "z"))
    call[name] = call[name].clone()
    call[name][1, 30, 2] = value
    reset = torch.zeros(2, 70, dtype=torch.bool)
    reset[:, 50] = True
    for backend in ("cpp", "reference"):
        y = selective_scan(**call, reset=reset, backend=backend)
        assert y[0].isfinite().all() and y[1, :30].isfinite().all() and y[1, 50:].isfinite().all()
        touched = ~y[1, 30:50].isfinite()
        if backend == "cpp":
            kept = touched
    assert torch.equal(kept, touched)


def test_gradients_behind_a_reset_do_not_meet_what_was_before_it():
    call = make(1, 70, 20, 4, optional=())
    call["u"][:, 10] = torch.inf
    reset = torch.zeros(1, 70, dtype=torch.bool)
    reset[:, 20] = True
    u = call["u"].requires_grad_()
    y = selective_scan(**call, reset=reset)
    (grad,) = torch.autograd.grad(y[:, 20:].sum(), u)
    assert grad.isfinite().all() and (grad[:, :10] == 0).all() and (grad[:, 20:] != 0).any()


# --------------------------------------------------------------------------------------------------------- wrong calls


def wrong(change, pattern, kind=ValueError):
    call = make(2, 10, 6, 4, G=2)
    changed = change(call)
    with pytest.raises(kind, match=pattern) as caught:
        selective_scan(**(call | changed))
    assert "\n" not in str(caught.value)


WRONG = {
    "u of two dimensions": (lambda c: {"u": c["u"][0]}, r"u: expected \(B, L, D\), got \(10, 6\)"),
    "delta of another length": (
        lambda c: {"delta": c["delta"][:, :9]},
        r"delta: expected \(2, 10, 6\).*got \(2, 9, 6\)",
    ),
    "A transposed": (lambda c: {"A": c["A"].T}, r"A: expected \(D, N\) with D = 6.*got \(4, 6\)"),
    "time last": (
        lambda c: {"u": c["u"].mT, "delta": c["delta"].mT},
        r"A: .*D = 10.*got \(6, 4\); u looks like \(B, D, L\), expected \(B, L, D\)$",
    ),
    "A without states": (lambda c: {"A": c["A"][:, :0]}, r"A: .*N at least 1, got \(6, 0\)"),
    "B of another width": (lambda c: {"B": c["B"][..., :3]}, r"B: expected \(2, 10, 4\) or \(2, 10, G, 4\)"),
    "groups that do not divide": (lambda c: {"B": c["B"][:, :, [0, 1, 1, 1]]}, r"B: .*a G that divides D = 6"),
    "groups that differ": (lambda c: {"C": c["C"][:, :, 0]}, r"C: expected the groups of B"),
    "D of another length": (lambda c: {"D": c["D"][:5]}, r"D: expected \(6,\) to match u.*got \(5,\)"),
    "z of another shape": (lambda c: {"z": c["z"][:1]}, r"z: expected \(2, 10, 6\)"),
    "bias of another shape": (lambda c: {"delta_bias": c["delta_bias"][None]}, r"delta_bias: expected \(6,\)"),
    "state of another batch": (
        lambda c: {"initial_state": c["initial_state"][:1]},
        r"initial_state: expected \(2, 6, 4\)",
    ),
    "reset of another shape": (
        lambda c: {"reset": torch.zeros(2, 9, dtype=torch.bool)},
        r"reset: expected \(B, L\) = \(2, 10\), got \(2, 9\)",
    ),
    "packed in two rows": (lambda c: {"cu_seqlens": torch.tensor([0, 10])}, "cu_seqlens: .*B = 1, got B = 2"),
    "another device": (lambda c: {"C": c["C"].to("meta")}, "C: expected the device of u, cpu, got meta"),
    "no such backend": (lambda c: {"backend": "cuda"}, "backend: expected one of auto, triton, cpp, reference"),
    "a backend that cannot": (lambda c: {"backend": "triton"}, "'triton' cannot serve this call"),
}
WRONG_TYPES = {
    "u an array": (lambda c: {"u": c["u"].numpy()}, "u: expected a tensor, got ndarray"),
    "u integers": (
        lambda c: {"u": c["u"].long()},
        "u: expected float32, bfloat16, float16 or float64, got torch.int64",
    ),
    "A a list": (lambda c: {"A": [1.0]}, "A: expected a tensor, got list"),
    "B complex": (lambda c: {"B": c["B"] * 1j}, "B: expected a float dtype, got torch.complex64"),
    "B integers": (lambda c: {"B": c["B"].long()}, "B: expected a float dtype, got torch.int64"),
    "delta double": (lambda c: {"delta": c["delta"].double()}, "delta: .*float64 goes with float64 only"),
    "reset a float": (lambda c: {"reset": torch.zeros(2, 10)}, "reset: expected torch.bool"),
    "lengths as floats": (
        lambda c: {"cu_seqlens": torch.tensor([0.0, 10.0])},
        "cu_seqlens: expected torch.int32 or torch.int64",
    ),
    "softplus a string": (lambda c: {"delta_softplus": "yes"}, "delta_softplus: expected a bool, got str"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_named(name):
    wrong(*WRONG[name])


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_wrong_types_are_named(name):
    wrong(*WRONG_TYPES[name], TypeError)


@pytest.mark.parametrize("ends", [[0, 5], [1, 10], [0, 7, 4, 10], [], [0, 11]])
def test_wrong_lengths_are_named(ends):
    call = make(1, 10, 6, 4, optional=())
    with pytest.raises(ValueError, match=r"cu_seqlens: expected"):
        selective_scan(**call, cu_seqlens=torch.tensor(ends, dtype=torch.int64))
    if len(ends) > 1:  # what a compiled call cannot check, the kernel does
        raw = [call["u"], call["delta"], call["A"][None], call["B"][:, :, None], call["C"][:, :, None]]
        with pytest.raises(ValueError, match="cu_seqlens: expected values that rise"):
            torch.ops.fastmem.selective_scan_forward(*raw, *[None] * 5, torch.tensor(ends), True, True, False)


def test_complex_A_is_served_by_the_reference_with_one_warning(monkeypatch):
    monkeypatch.setattr(_dispatch, "_warned", set())
    call = make(2, 10, 6, 4)
    call |= {"A": torch.complex(call["A"], torch.randn(6, 4)), "initial_state": None}
    call |= {name: torch.complex(call[name], torch.randn(2, 10, 4)) for name in ("B", "C")}
    assert fastmem.explain("selective_scan", **call).chosen == "reference"
    with pytest.warns(RuntimeWarning, match="the kernels are real"):
        y = selective_scan(**call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(selective_scan(**call), y)
    assert y.dtype == torch.float32
    real = call | {"A": call["A"].real + 0j, "B": call["B"].real, "C": call["C"].real}
    plain = call | {"A": call["A"].real, "B": call["B"].real, "C": call["C"].real, "D": 2 * call["D"]}
    torch.testing.assert_close(selective_scan(**(real | {"D": 4 * call["D"]})), 2 * selective_scan(**plain))


def test_explain():
    call = make(2, 10, 6, 4)
    assert fastmem.explain("selective_scan", **call).chosen == "cpp"
    assert "not on a GPU" in fastmem.explain("selective_scan", **call).refused["triton"] or "not installed"
    assert fastmem.explain("selective_scan", **call, backend="reference").chosen == "reference"

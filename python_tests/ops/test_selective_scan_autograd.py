"""selective_scan under torch's transforms: first and second derivatives, vmap, compilation, checks of raw ops."""

import pytest
import torch
from selective_scan_data import error, leaves_of, make
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from fastmem.ops.selective_scan import selective_scan

F64 = {"dtype": torch.float64}


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    "size,kind",
    [
        ((2, 3, 3, 2), {}),
        ((1, 0, 2, 2), {"packed": (2, 0, 3), "reset": True}),
        ((1, 3, 4, 1), {"G": 2, "softplus": False}),
    ],
)
def test_gradcheck_and_gradgradcheck(size, kind, backend):
    leaves, call = leaves_of(make(*size, **F64, **kind))

    def f(*values):
        return selective_scan(
            **(call | dict(zip(leaves, values, strict=True))), return_final_state=True, backend=backend
        )

    inputs = tuple(leaves.values())
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=backend == "reference")


def test_gradients_across_chunks():
    """More steps than the kernel keeps at once."""
    leaves, call = leaves_of(make(1, 130, 2, 2, **F64, reset=True))

    def f(*values):
        return selective_scan(**(call | dict(zip(leaves, values, strict=True))), return_final_state=True)

    assert torch.autograd.gradcheck(f, tuple(leaves.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, tuple(leaves.values()), fast_mode=True)


def test_no_gradient_where_none_is_wanted():
    leaves, call = leaves_of(make(2, 10, 6, 4))
    for name in leaves:
        alone = call | {k: x.detach() for k, x in leaves.items() if k != name}
        y, final = selective_scan(**alone, return_final_state=True)
        got = torch.autograd.grad(y.sum() + final.sum(), leaves[name])[0]
        y, final = selective_scan(**alone, return_final_state=True, backend="reference")
        assert error(got, torch.autograd.grad(y.sum() + final.sum(), leaves[name])[0]) < 1e-4, name


@pytest.mark.parametrize("kind", [{}, {"packed": (4, 0, 6)}, {"optional": ()}])
@pytest.mark.parametrize("L", [10, 130])
def test_second_derivatives_of_one_input_alone(L, kind):
    """What the kernels leave out where it is not wanted, and a single chunk's y from its backward."""
    packed = kind.get("packed")
    kind = kind | {"packed": packed[:-1] + (L - sum(packed[:-1]),)} if packed else kind
    leaves, call = leaves_of(make(1 if packed else 2, L, 20, 5, **kind))

    def second(name, backend):
        alone = call | {k: x.detach() for k, x in leaves.items() if k != name}
        y = selective_scan(**alone, backend=backend)
        (slope,) = torch.autograd.grad(y.square().sum(), leaves[name], create_graph=True)
        return torch.autograd.grad(slope.square().sum(), leaves[name], retain_graph=True)[0]

    for name in leaves:
        assert error(second(name, "cpp"), second(name, "reference")) < 1e-4, name


@pytest.mark.parametrize("names", [("A",), ("initial_state",), ("A", "initial_state")])
@pytest.mark.parametrize("kind", [{"reset": True}, {"packed": (60, 0, 70)}, {"optional": ("initial_state",)}])
def test_derivatives_of_a_walk_with_time(names, kind):
    """Of A and the initial state, which have a pass of their own: the gradient, and what its tangent gives beside."""
    leaves, call = leaves_of(make(1 if "packed" in kind else 2, 130, 20, 5, **F64, **kind))
    call |= {k: x.detach() for k, x in leaves.items() if k not in names}
    wanted = [leaves[k] for k in names]

    def derivatives(backend):
        y, final = selective_scan(**call, return_final_state=True, backend=backend)
        first = torch.autograd.grad(y.square().sum() + final.pow(3).sum(), wanted, create_graph=True)
        return *first, *torch.autograd.grad(sum(x.pow(3).sum() for x in first), wanted)

    for got, expected in zip(derivatives("cpp"), derivatives("reference"), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_final_state_alone_has_gradients():
    leaves, call = leaves_of(make(2, 70, 6, 4))
    grads = []
    for backend in ("cpp", "reference"):
        _, final = selective_scan(**call, return_final_state=True, backend=backend)
        grads.append(torch.autograd.grad(final.square().sum(), [leaves[k] for k in ("u", "A", "B", "initial_state")]))
    assert all(error(a, b) < 1e-4 for a, b in zip(*grads, strict=True))


def test_the_third_derivative_raises():
    leaves, call = leaves_of(make(1, 3, 2, 2, **F64))
    y = selective_scan(**call)
    (first,) = torch.autograd.grad(y.square().sum(), leaves["A"], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaves["A"], create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(second.sum(), leaves["A"])


def test_forward_mode_raises_rather_than_being_wrong():
    call = make(1, 3, 2, 2, **F64)
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda u: selective_scan(**(call | {"u": u})), (call["u"],), (call["u"],))


# ---------------------------------------------------------------------------------------------------------------- vmap

TASKS = 3


def batched(names, size=(2, 70, 6, 3), **kind):
    """A call, and for the named arguments a stack of TASKS of them."""
    calls = [make(*size, **F64, seed=i, **kind) for i in range(TASKS)]
    return calls[0], {name: torch.stack([c[name] for c in calls]) for name in names}


@pytest.mark.parametrize(
    "names",
    [
        ("u",),
        ("A",),
        ("u", "delta", "B", "C", "z", "initial_state"),
        ("u", "A", "delta_bias"),
        ("D",),
        ("reset",),
        ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "reset"),
    ],
)
def test_vmap_is_a_loop_over_tasks(names):
    call, tasks = batched(names, reset=True)

    def run(*values):
        return selective_scan(**(call | dict(zip(names, values, strict=True))), return_final_state=True)

    got = vmap(run)(*tasks.values())
    for i in range(TASKS):
        for x, y in zip(got, run(*(t[i] for t in tasks.values())), strict=True):
            torch.testing.assert_close(x[i], y)


def test_vmap_over_no_tasks_is_an_error():
    call, tasks = batched(("u",))
    with pytest.raises(ValueError, match="no tasks"):
        vmap(lambda u: selective_scan(**(call | {"u": u})))(tasks["u"][:0])


def test_vmap_over_packed_sequences():
    call, tasks = batched(("u", "A", "initial_state"), packed=(5, 0, 67))
    run = lambda u, A, h: selective_scan(**(call | {"u": u, "A": A, "initial_state": h}), return_final_state=True)  # noqa: E731
    y, final = vmap(run)(*tasks.values())
    for i in range(TASKS):
        expected = run(*(t[i] for t in tasks.values()))
        torch.testing.assert_close((y[i], final[i]), expected)
    with pytest.raises(ValueError, match="cu_seqlens: expected the same for all tasks"):
        ends = torch.stack([call["cu_seqlens"]] * TASKS)
        vmap(lambda c: selective_scan(**(call | {"cu_seqlens": c})))(ends)


def test_vmap_of_vmap_and_other_axes():
    call, tasks = batched(("u", "A"))
    run = lambda u, A: selective_scan(**(call | {"u": u, "A": A}))  # noqa: E731
    grid = vmap(vmap(run, (None, 0)), (0, None))(tasks["u"], tasks["A"])
    for i in range(TASKS):
        for j in range(TASKS):
            torch.testing.assert_close(grid[i, j], run(tasks["u"][i], tasks["A"][j]))
    last = vmap(run, (3, 2), 1)(tasks["u"].movedim(0, 3), tasks["A"].movedim(0, 2))
    torch.testing.assert_close(last[:, 1], run(tasks["u"][1], tasks["A"][1]))


def maml(backend, steps):
    """Loss after `steps` gradient steps on A, delta_bias and B's scale, one task."""

    def loss(params, u, target, call):
        A, bias, scale = params
        changed = call | {"u": u, "A": A, "delta_bias": bias, "B": scale * call["B"]}
        return (selective_scan(**changed, backend=backend) - target).square().mean()

    def adapted(params, u, target, call):
        for _ in range(steps):
            slopes = grad(loss)(params, u, target, call)
            params = tuple(p - 0.1 * g for p, g in zip(params, slopes, strict=True))
        return loss(params, u, target, call)

    return adapted


@pytest.mark.parametrize("steps", [1, 2])
def test_second_order_maml_over_tasks(steps):
    call, tasks = batched(("u", "z"))
    params = call["A"], call["delta_bias"], torch.ones((), **F64)
    got, expected = (
        vmap(grad(maml(backend, steps)), (None, 0, 0, None))(params, tasks["u"], tasks["z"], call)
        for backend in ("cpp", "reference")
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_maml_in_a_module():
    """torch.func.functional_call over a module whose parameters go through the scan, against finite differences."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rates, self.proj = (
                torch.nn.Linear(1, 4, dtype=torch.float64),
                torch.nn.Linear(3, 4, dtype=torch.float64),
            )

        def forward(self, x):
            u = self.proj(x)
            A = -self.rates.weight.square()[:, :1].expand(4, 2)
            return selective_scan(u, u, A, x[..., :2], x[..., 1:], delta_softplus=True)

    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 8, 3, **F64)
    params = dict(model.named_parameters())

    def loss(params):
        return functional_call(model, params, (x,)).square().mean()

    def outer(params):
        slopes = grad(loss)(params)
        return loss({k: p - 0.3 * slopes[k] for k, p in params.items()})

    slopes = grad(outer)(params)
    direction = {k: torch.randn_like(p) for k, p in params.items()}
    eps = 1e-5
    ahead, behind = (outer({k: p + s * eps * direction[k] for k, p in params.items()}) for s in (1, -1))
    expected = sum((slopes[k] * direction[k]).sum() for k in params)
    torch.testing.assert_close((ahead - behind) / (2 * eps), expected, rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------------------------- compile, raw checks


def test_compiles_without_a_graph_break():
    call = make(2, 10, 6, 4)
    leaves, call = leaves_of(call)

    def f(u, A):
        y, final = selective_scan(**(call | {"u": u, "A": A}), return_final_state=True)
        return y.sum() + final.square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(leaves["u"], leaves["A"]), (leaves["u"], leaves["A"]))
    expected = torch.autograd.grad(f(leaves["u"], leaves["A"]), (leaves["u"], leaves["A"]))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


class _GradFinal(TorchDispatchMode):
    """The second argument of each selective_scan_backward that runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fastmem.selective_scan_backward.default:
            self.seen.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [True, False])
def test_a_state_that_is_not_returned_has_no_gradient(compiled):
    """A kernel would read a gradient of no elements as one of the state's shape."""
    leaves, call = leaves_of(make(2, 10, 6, 4))

    def f(u):
        return selective_scan(**(call | {"u": u})).sum()

    y = (torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f)(leaves["u"])
    with _GradFinal() as found:
        y.backward()
    assert found.seen == [None]


def raw(dtype=torch.float32, packed=None):
    call = make(2, 70, 6, 4, G=2, dtype=dtype, reset=True, packed=packed)
    expand = lambda name: call[name][None]  # noqa: E731
    return [
        *(call["u"], call["delta"], expand("A"), call["B"], call["C"], expand("D"), call["z"], expand("delta_bias")),
        *(call["initial_state"], call["reset"], call.get("cu_seqlens"), call["delta_softplus"]),
    ]


@pytest.mark.parametrize("packed", [None, (5, 0, 67)])
def test_opcheck(packed):
    ops, inputs = torch.ops.fastmem, raw(packed=packed)
    y, final, carries = ops.selective_scan_forward(*inputs, True, True)
    torch.library.opcheck(ops.selective_scan_forward.default, (*inputs, True, True))
    torch.library.opcheck(ops.selective_scan_forward.default, (*inputs, False, False))
    for wanted in ([True] * 9, [i == 2 for i in range(9)], [i == 6 for i in range(9)], [False] * 9):
        torch.library.opcheck(ops.selective_scan_backward.default, (y, final, carries, wanted, *inputs))
        torch.library.opcheck(ops.selective_scan_backward.default, (y, None, carries, wanted, *inputs))
        torch.library.opcheck(ops.selective_scan_tangent.default, (*inputs[:9], y, final, wanted, *inputs))
        only_u = inputs[0], *[None] * 8
        torch.library.opcheck(ops.selective_scan_tangent.default, (*only_u, y, None, wanted, *inputs))
    step = [final[:2].contiguous(), *(x[:2, 0] if i < 2 else x for i, x in enumerate(inputs[:2]))]
    if packed is None:
        step += [inputs[2][0], inputs[3][:, 0], inputs[4][:, 0], inputs[5][0], inputs[6][:, 0], inputs[7][0], True]
        torch.library.opcheck(ops.selective_scan_step_.default, tuple(step))


def test_carries_of_another_call_are_refused_and_strided_ones_read():
    backward, inputs = torch.ops.fastmem.selective_scan_backward, raw()
    y, final, carries = torch.ops.fastmem.selective_scan_forward(*inputs, True, True)
    with pytest.raises(ValueError, match="carries: expected"):
        backward(y, final, carries[:, :0], [True] * 9, *inputs)
    strided = carries.transpose(2, 3).contiguous().transpose(2, 3)
    for got, want in zip(
        backward(y, final, strided, [True] * 9, *inputs), backward(y, final, carries, [True] * 9, *inputs), strict=True
    ):
        assert torch.equal(got, want)


def test_memory_for_a_backward_is_the_carries():
    call = make(1, 640, 8, 4)
    _, _, carries = torch.ops.fastmem.selective_scan_forward(
        call["u"],
        call["delta"],
        call["A"][None],
        call["B"][:, :, None],
        call["C"][:, :, None],
        *[None] * 6,
        True,
        True,
        True,
    )
    assert carries.shape == (1, 10, 4, 8) and carries.isfinite()[:, :9].all()

"""Gradients of gated_write: first and second order, transforms, compilation. The reference differentiates itself."""

import pytest
import torch
from gated_write_data import SETTINGS, double, make, write
from torch.func import grad, vmap

from fastmem.ops.gated_write import Bank

NAMES = ("bank.keys", "bank.values", "bank.strength", "keys", "values", "surprise")


def split(data):
    """(the six differentiable tensors, a function of them that writes), decisions far from every edge."""
    bank, keys, values, surprise, stats = data
    # A strength of exactly 0 is an edge: a little more is alive.
    leaves = [*bank._replace(strength=torch.where(bank.strength > 0, bank.strength, -1.0))[:3], keys, values, surprise]

    def run(setting, leaves, backend="auto", **kwargs):
        bk, bv, bs, k, v, s = leaves
        new, _, written = write(setting, (Bank(bk, bv, bs, *bank[3:]), k, v, s, stats), backend=backend, **kwargs)
        return new[:3], written

    return leaves, run


def small():
    """Small enough for gradcheck; every kind of write and every route of the strength occurs (tested below)."""
    return make(2, 3, 6, 4, 3, torch.float64, seed=5)


def wanted(setting, leaves):
    """Leaves that require gradients; only a store's strength is the surprise."""
    return [x.detach().clone().requires_grad_(i < 5 or setting == "store") for i, x in enumerate(leaves)]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_gradcheck_and_gradgradcheck(setting, backend):
    leaves, run = split(small())
    leaves = wanted(setting, leaves)

    def f(*leaves):
        # The conflict with what is stored is a constant to autograd but not to finite differences.
        return run(setting, leaves, backend, conflict_weight=0.0)[0]

    fast = backend == "reference"  # a loop over many small operations
    assert torch.autograd.gradcheck(f, leaves, fast_mode=fast)
    # The map is linear, so its gradient does not depend on the leaves: cubed, it does.
    cubed = lambda *leaves: [x.pow(3) for x in f(*leaves)]  # noqa: E731
    assert torch.autograd.gradgradcheck(cubed, leaves, atol=1e-4, fast_mode=fast)


def test_the_small_data_takes_every_route():
    leaves, run = split(small())
    blends = {setting: run(setting, leaves, conflict_weight=0.0)[1].blend.unique().tolist() for setting in SETTINGS}
    assert blends == {"buffer": [0.1, 0.3, 1.0], "gated buffer": [0, 0.1, 0.3, 1.0], "store": [0, 0.3, 1.0]}
    bank, keys, values, surprise, stats = small()
    for setting, routes in (("buffer", [0, 1]), ("store", [0, 1, 2])):
        rule = raw_rule(setting)
        rule[11] = 0.0  # conflict_weight, as above
        out = torch.ops.fastmem.gated_write(*leaves[:3], *bank[3:], keys, values, surprise, *stats, None, rule)
        assert out[12].unique().tolist() == routes


def raw_rule(setting):
    numbers, _ = SETTINGS[setting]
    boost = -1.0 if numbers["boost"] is None else numbers["boost"]
    retention = numbers.get("retention", (1.0, 0.0, 0.0))
    alphas = numbers.get("alpha_match", 0.1), numbers.get("alpha_evict", 0.3)
    rest = (numbers.get("z_threshold", 1.0), 0.5, 0.1, 2.0, 0.3, 1.0)
    return [numbers.get("match_threshold", 0.5), *alphas, boost, numbers["min_strength"], *retention, *rest]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("size", [(2, 20, 135, 65, 33), (1, 20, 40, 100, 257)])
def test_float32_gradients_match_float64(size, setting):
    data = make(*size)
    leaves, run = split(data)
    exact, run_exact = split(double(data))
    leaves, exact = wanted(setting, leaves), wanted(setting, exact)
    weights = [torch.randn_like(x) for x in leaves[:3]]
    ours = torch.autograd.grad(run(setting, leaves)[0], [x for x in leaves if x.requires_grad], weights)
    truth = torch.autograd.grad(
        run_exact(setting, exact, "reference")[0], [x for x in exact if x.requires_grad], [w.double() for w in weights]
    )
    for name, x, y in zip(NAMES, ours, truth, strict=False):
        assert (x.double() - y).norm() <= 1e-4 * y.norm(), name


@pytest.mark.parametrize("setting", SETTINGS)
def test_partial_and_expanded_gradients(setting):
    leaves, run = split(make(2, 5, 12, 6, 4, torch.float64))
    for part in range(3):
        both = []
        for backend in ("cpp", "reference"):
            mine = wanted(setting, leaves)
            run(setting, mine, backend)[0][part].sum().backward()
            both.append([torch.zeros_like(x) if x.grad is None else x.grad for x in mine])
        torch.testing.assert_close(*both)


def test_decisions_and_counters_carry_no_gradient():
    data = make(2, 5, 12, 6, 4)
    leaves, bank, stats = wanted("store", split(data)[0]), data[0], data[4]
    new, new_stats, written = write("store", (Bank(*leaves[:3], *bank[3:]), *leaves[3:], stats))
    assert all(x.requires_grad for x in new[:3])
    assert not any(x.requires_grad for x in (*new[3:], *new_stats, *written))


@pytest.mark.parametrize("setting", SETTINGS)
def test_garbage_in_overwritten_slots_does_not_reach_gradients(setting):
    bank, keys, values, surprise, stats = make(2, 4, 9, 6, 4, full=0.0)
    bank.keys[:], bank.values[:], bank.strength[:] = float("nan"), float("inf"), 0.0
    for backend in ("cpp", "reference"):
        k = keys.clone().requires_grad_()
        new, _, written = write(setting, (bank, k, values, surprise, stats), backend=backend)
        (new.keys[written.slot.new_tensor([0]), written.slot[:1, 0].clamp(min=0)] ** 2).sum().backward()
        assert k.grad.isfinite().all() and k.grad.any()


@pytest.mark.parametrize("setting", SETTINGS)
def test_vmap_of_second_order_gradients(setting):
    leaves, run = split(make(2, 4, 7, 5, 3, torch.float64))
    tasks = torch.stack([leaves[3], leaves[3] + 0.01, leaves[3] - 0.02])

    def adapted(backend):
        """A step of gradient descent on the keys, then a loss: second order, as in MAML; the bank is shared."""

        def loss(keys):
            out = run(setting, [*leaves[:3], keys, *leaves[4:]], backend)[0]
            return sum(x.pow(3).sum() for x in out)

        return lambda keys: loss(keys - 1e-3 * grad(loss)(keys))

    ours, truth = (vmap(grad(adapted(backend)))(tasks) for backend in ("cpp", "reference"))
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(grad(adapted("cpp"))(tasks[1]), truth[1])


def test_vmap_over_memories_of_its_own():
    data = make(6, 4, 7, 5, 3)
    whole = write("store", data)
    bank, keys, values, surprise, stats = data

    def fold(x):
        return x.unflatten(0, (3, 2))

    stacked = (Bank(*map(fold, bank)), *map(fold, (keys, values, surprise)), type(stats)(*map(fold, stats)))
    new, new_stats, written = vmap(lambda *data: write("store", data))(*stacked)
    for x, y in zip((*new, *new_stats, *written), (*whole[0], *whole[1], *whole[2]), strict=True):
        torch.testing.assert_close(x.flatten(0, 1), y, rtol=0, atol=0)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("size", [(2, 4, 7, 5, 3), (2, 3, 0, 4, 4)])
def test_opcheck(size, setting):
    bank, keys, values, surprise, stats = make(*size)
    gate = (surprise, *stats) if SETTINGS[setting][1] else (None,) * 4
    mask = torch.ones(keys.shape[:2], dtype=torch.bool)
    args = (*bank, keys, values, *gate, mask, raw_rule(setting))
    torch.library.opcheck(torch.ops.fastmem.gated_write.default, args)
    out = torch.ops.fastmem.gated_write(*args)
    decisions = (out[8], out[9], out[12])
    torch.library.opcheck(torch.ops.fastmem.gated_write_replay.default, (*bank[:3], keys, values, surprise, *decisions))
    torch.library.opcheck(torch.ops.fastmem.gated_write_backward.default, (*bank[:3], *decisions))


@pytest.mark.parametrize("setting", SETTINGS)
def test_compiles_without_a_graph_break(setting):
    leaves, run = split(make(2, 4, 7, 5, 3))
    leaves = wanted(setting, leaves)
    needed = [x for x in leaves if x.requires_grad]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *leaves: run(setting, leaves)[0], fullgraph=True, backend="aot_eager")
    out, expected = compiled(*leaves), run(setting, leaves)[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    weights = [torch.randn_like(x) for x in out]
    torch.testing.assert_close(
        torch.autograd.grad(out, needed, weights), torch.autograd.grad(expected, needed, weights)
    )

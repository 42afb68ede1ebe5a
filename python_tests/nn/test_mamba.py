import copy
import pickle
from itertools import pairwise

import pytest
import torch
from naive_mamba import naive_mamba
from tiny_chat import one_thread  # noqa: F401
from torch.func import functional_call, grad, vmap

from fastmem.nn import Mamba, MambaState

SIZES = {
    "usual": dict(d_model=24),
    "odd": dict(d_model=7, d_state=3, d_conv=3, expand=3, dt_rank=5, bias=True),
    "no conv bias": dict(d_model=8, d_state=1, d_conv=2, conv_bias=False),
}


def block(name="usual", dtype=torch.float32):
    torch.manual_seed(1)
    made = Mamba(**SIZES[name])
    with torch.no_grad():  # A_log and D start alike for all channels
        made.A_log.add_(0.1 * torch.randn_like(made.A_log))
        made.D.normal_()
    return made.to(dtype)


def error(ours, truth):
    return ((ours.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("L", [1, 3, 63, 100])
def test_forward_and_gradients_follow_the_definition(name, L):
    ours, truth = block(name), block(name, torch.float64)
    x = torch.randn(2, L, ours.d_model)
    state = MambaState(torch.randn_like(ours.empty_state(2).conv), torch.randn_like(ours.empty_state(2).ssm))
    leaves = [x, *state]
    exact = [a.double().requires_grad_() for a in leaves]
    for a in leaves:
        a.requires_grad_()
    y, new = ours(x, state, return_state=True)
    expected, expected_state = naive_mamba(truth, exact[0], exact[1:])
    for a, b in zip((y, *new), (expected, *expected_state), strict=True):
        assert error(a, b) < 1e-5
    weights = [torch.randn_like(a) for a in (y, *new)]
    sum((a * w).sum() for a, w in zip((y, *new), weights, strict=True)).backward()
    sum((a * w).sum() for a, w in zip((expected, *expected_state), weights, strict=True)).backward()
    for a, b in zip(leaves, exact, strict=True):
        assert error(a.grad, b.grad) < 1e-4
    for (key, a), b in zip(ours.named_parameters(), truth.parameters(), strict=True):
        assert error(a.grad, b.grad) < 1e-4, key


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 0, 3, 1]])
def test_calls_of_any_length_and_steps_equal_one_long_call(pieces):
    ours, x = block(), torch.randn(3, 9, 24)
    whole, end = ours(x, return_state=True)
    state, outs = ours.empty_state(3), []
    for part in x.split(pieces, 1):
        y, state = ours(part, state, return_state=True)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state, end, rtol=1e-4, atol=1e-6)
    state, outs = ours.empty_state(3), []
    for x_t in x.unbind(1):
        before = [a.clone() for a in state]
        y, new = ours.step(x_t, state)
        assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))  # what is given stays
        state = new
        outs.append(y)
    torch.testing.assert_close(torch.stack(outs, 1), whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(state, end, rtol=1e-4, atol=1e-6)


def test_steps_have_the_gradients_of_the_long_call():
    ours, x = block(), torch.randn(2, 6, 24)
    parameters = list(ours.parameters())
    whole = torch.autograd.grad(ours(x).square().sum(), parameters)
    state, loss = ours.empty_state(2), 0.0
    for x_t in x.unbind(1):
        y, state = ours.step(x_t, state)
        loss = loss + y.square().sum()
    for a, b in zip(torch.autograd.grad(loss, parameters), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_reset_and_packed_sequences_do_not_see_each_other():
    ours, truth = block(), block(dtype=torch.float64)
    x = torch.randn(1, 11, 24)
    starts = [0, 2, 3, 3, 8, 11]  # one is empty
    parts = [x[:, a:b] for a, b in pairwise(starts)]
    reset = torch.zeros(1, 11, dtype=torch.bool)
    reset[0, [2, 3, 8]] = True
    expected, _ = naive_mamba(truth, x.double(), starts=(2, 3, 8))
    assert error(ours(x, reset=reset), expected) < 1e-5
    packed, state = ours(x, cu_seqlens=torch.tensor(starts), return_state=True)
    assert error(packed, expected) < 1e-5
    for i, part in enumerate(parts):
        _, end = ours(part, return_state=True)
        for a, b in zip(state, end, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-4, atol=1e-6)


def test_second_derivatives():
    ours = block("odd", torch.float64)
    start = MambaState(*(torch.randn_like(a) for a in ours.empty_state(1)))
    x = torch.randn(1, 4, 7, dtype=torch.float64)

    def call(x, conv, ssm, A_log):
        y, new = functional_call(ours, {"A_log": A_log}, (x, MambaState(conv, ssm)), {"return_state": True})
        return y, *new

    leaves = [a.detach().requires_grad_() for a in (x, *start, ours.A_log)]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_meta_gradient_over_tasks_equals_the_definition():
    ours = block("odd", torch.float64)
    weights = {k: v.detach() for k, v in ours.named_parameters()}
    x, target = torch.randn(2, 3, 2, 5, 7, dtype=torch.float64)

    def meta_loss(call):
        def loss(weights, x, target):
            return (call(weights, x) - target).square().mean()

        def after_one_step(weights, x, target):
            gradient = grad(loss)(weights, x, target)
            return loss({k: w - 0.1 * gradient[k] for k, w in weights.items()}, x, target)

        return after_one_step

    def truth(weights, x):
        stand_in = copy.deepcopy(ours)
        return functional_call(_Naive(stand_in), {f"block.{k}": v for k, v in weights.items()}, (x,))

    mine = vmap(grad(meta_loss(lambda w, x: functional_call(ours, w, (x,)))), (None, 0, 0))(weights, x, target)
    for i in range(3):
        expected = grad(meta_loss(truth))(weights, x[i], target[i])
        for k in weights:
            torch.testing.assert_close(mine[k][i], expected[k], rtol=1e-6, atol=1e-9)


class _Naive(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return naive_mamba(self.block, x)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    ours, truth = block(dtype=dtype), block(dtype=dtype).double()
    x = torch.randn(2, 40, 24).to(dtype)
    y, state = ours(x, return_state=True)
    assert y.dtype == state.conv.dtype == dtype and state.ssm.dtype == torch.float32
    expected, _ = naive_mamba(truth, x.double())
    assert error(y, expected) < 1e-2
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


def test_autocast_keeps_the_scan_in_float32():
    ours, x = block(), torch.randn(2, 12, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = ours(x, return_state=True)
    assert y.dtype == torch.bfloat16 and state.ssm.dtype == torch.float32
    assert error(y, ours(x).double()) < 2e-2


def test_parameters_start_as_mamba_ssm_starts_them():
    torch.manual_seed(0)
    ours = Mamba(64, d_state=5, dt_min=0.01, dt_max=0.2)
    assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == {
        "A_log": (128, 5),
        "D": (128,),
        "in_proj.weight": (256, 64),
        "conv1d.weight": (128, 1, 4),
        "conv1d.bias": (128,),
        "x_proj.weight": (14, 128),
        "dt_proj.weight": (128, 4),
        "dt_proj.bias": (128,),
        "out_proj.weight": (64, 128),
    }
    torch.testing.assert_close(ours.A_log.exp(), torch.arange(1.0, 6).expand(128, 5))
    assert (ours.D == 1).all()
    dt = torch.nn.functional.softplus(ours.dt_proj.bias)
    assert 0.01 <= dt.min() < 0.02 and 0.1 < dt.max() <= 0.2001
    assert dt.log().mean().item() == pytest.approx(torch.tensor([0.01, 0.2]).log().mean().item(), abs=0.3)
    assert 0.4 < ours.dt_proj.weight.abs().max() <= 0.5  # dt_rank ** -0.5
    constant = Mamba(64, dt_init="constant", dt_scale=2.0, dt_init_floor=0.05, dtype=torch.bfloat16)
    assert (constant.dt_proj.weight == 1).all()
    assert torch.nn.functional.softplus(constant.dt_proj.bias.float()).min() > 0.049
    assert constant.A_log.dtype == constant.D.dtype == torch.float32
    assert constant.in_proj.weight.dtype == torch.bfloat16


def test_empty_sequences_and_batches():
    ours = block()
    state = MambaState(*(torch.randn_like(a) for a in ours.empty_state(2)))
    y, new = ours(torch.randn(2, 0, 24), state, return_state=True)
    assert y.shape == (2, 0, 24)
    torch.testing.assert_close(new, state)
    assert ours(torch.randn(0, 5, 24)).shape == (0, 5, 24)


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda m: m([1.0]), TypeError, "x: expected a tensor, got list"),
        (lambda m: m(torch.zeros(2, 24)), ValueError, r"x: expected \(B, L, 24\), got \(2, 24\)"),
        (lambda m: m(torch.zeros(2, 3, 25)), ValueError, r"x: expected \(B, L, 24\), got \(2, 3, 25\)"),
        (lambda m: m(torch.zeros(2, 3, 24).long()), TypeError, "x: expected a float dtype, got torch.int64"),
        (
            lambda m: m(torch.zeros(2, 3, 24).double()),
            TypeError,
            "x: expected torch.float32 like the module's weights, got torch.float64",
        ),
        (lambda m: m.bfloat16()(torch.zeros(2, 3, 24)), TypeError, "x: expected torch.bfloat16 like the module's"),
        (
            lambda m: m.step(torch.zeros(2, 1, 24), m.empty_state(2)),
            ValueError,
            r"x: expected \(B, 24\), got \(2, 1, 24\)",
        ),
        (
            lambda m: m(torch.zeros(2, 3, 24), m.empty_state(1)),
            ValueError,
            r"state.conv: expected \(2, 3, 48\), got \(1, 3, 48\)",
        ),
        (
            lambda m: m(torch.zeros(1, 4, 24), m.empty_state(1), cu_seqlens=torch.tensor([0, 1, 4])),
            ValueError,
            r"state.conv: expected \(2, 3, 48\), got \(1, 3, 48\)",
        ),
        (
            lambda m: m.step(torch.zeros(2, 24), (m.empty_state(2).conv, torch.zeros(2, 48, 15))),
            ValueError,
            r"state.ssm: expected \(2, 48, 16\), got \(2, 48, 15\)",
        ),
        (
            lambda m: m(torch.zeros(2, 3, 24), (m.empty_state(2).conv, torch.zeros(2, 48, 16).double())),
            TypeError,
            "state.ssm: expected torch.float32, as the block computes in torch.float32, got torch.float64",
        ),
        (lambda m: m(torch.zeros(2, 3, 24), reset=torch.zeros(2, 4, dtype=torch.bool)), ValueError, "reset: expected"),
        (lambda m: m(torch.zeros(2, 3, 24), cu_seqlens=torch.tensor([0, 3])), ValueError, "cu_seqlens: expected"),
        (lambda m: m(torch.zeros(1, 3, 24), m.empty_state(1), cu_seqlens=[0, 3]), TypeError, "cu_seqlens: expected a"),
        (lambda m: Mamba(0), ValueError, "d_model: expected at least 1, got 0"),
        (lambda m: Mamba(8.0), TypeError, "d_model: expected an int, got 8.0"),
        (lambda m: Mamba(8, True), TypeError, "d_state: expected an int, got True"),
        (lambda m: Mamba(8, d_conv=0), ValueError, "d_conv: expected at least 1, got 0"),
        (lambda m: Mamba(8, expand="2"), TypeError, "expand: expected a number, got '2'"),
        (
            lambda m: Mamba(8, expand=0.1),
            ValueError,
            r"expand: expected at least one inner channel, int\(expand \* 8\)",
        ),
        (lambda m: Mamba(8, expand=float("nan")), ValueError, "expand: expected a finite number, got nan"),
        (lambda m: Mamba(8, dt_rank="all"), ValueError, "dt_rank: expected 'auto' or an int, got 'all'"),
        (lambda m: Mamba(8, dt_rank=0), ValueError, "dt_rank: expected at least 1, got 0"),
        (lambda m: Mamba(8, dt_min=0), ValueError, "dt_min: expected a finite number above 0, got 0"),
        (lambda m: Mamba(8, dt_min=0.2), ValueError, "dt_max: expected at least dt_min, 0.2, got 0.1"),
        (lambda m: Mamba(8, dt_init="zero"), ValueError, "dt_init: expected 'random' or 'constant', got 'zero'"),
        (lambda m: Mamba(8, dt_scale=None), TypeError, "dt_scale: expected a number, got None"),
        (lambda m: Mamba(8, dtype=torch.int8), TypeError, "dtype: expected float32, bfloat16, float16 or float64, got"),
    ],
)
def test_wrong_arguments_are_named(call, exception, message):
    with pytest.raises(exception, match=f"^{message}"):
        call(block())


def test_autocast_takes_states_of_any_float_type():
    block, x = Mamba(8, 4), torch.randn(2, 5, 8)
    expected, _ = block(x, state=block.empty_state(2), return_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = block(x, state=block.empty_state(2), return_state=True)
        first, _ = block.step(x[:, 0], block.empty_state(2))
    assert (y - expected).norm() < 2e-2 * expected.norm()
    assert (first - expected[:, 0]).norm() < 2e-2 * expected[:, 0].norm()


@pytest.mark.parametrize("default", [False, True])
def test_built_in_float64(default):
    if default:
        torch.set_default_dtype(torch.float64)
    try:
        block = Mamba(8, 4) if default else Mamba(8, 4, dtype=torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)
    y = block(torch.randn(1, 3, 8, dtype=torch.float64))
    assert y.dtype == torch.float64 and y.isfinite().all()


def test_copies_keep_the_marks_of_parameters():
    block = Mamba(8)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert other.A_log._no_weight_decay and other.D._no_weight_decay and other.dt_proj.bias._no_reinit
        assert torch.equal(other.A_log, block.A_log) and other.A_log is not block.A_log


def test_a_state_may_be_a_plain_pair():
    block, x = Mamba(8), torch.randn(2, 3, 8)
    _, state = block(x, return_state=True)
    assert torch.equal(block(x, state=tuple(state)), block(x, state=state))
    assert torch.equal(block.step(x[:, 0], tuple(state))[0], block.step(x[:, 0], state)[0])
    with pytest.raises(TypeError, match="state: expected a MambaState, got dict"):
        block(x, state={})

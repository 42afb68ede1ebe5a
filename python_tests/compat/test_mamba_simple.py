import importlib

import pytest
import torch
from naive_mamba import naive_mamba
from plain import names_of_arguments
from tiny_chat import one_thread  # noqa: F401

import fastmem.nn
from fastmem.compat.mamba_ssm import Mamba
from fastmem.compat.mamba_ssm.utils.generation import InferenceParams


def block(dtype=torch.float32, **more):
    torch.manual_seed(3)
    made = Mamba(12, d_state=5, layer_idx=2, **more)
    with torch.no_grad():
        made.A_log.add_(0.1 * torch.randn_like(made.A_log))
        made.D.normal_()
    return made.to(dtype)


def test_block_is_the_definition():
    x = torch.randn(2, 9, 12)
    expected, _ = naive_mamba(block(dtype=torch.float64), x.double())
    torch.testing.assert_close(block()(x).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prompt", [1, 2, 3, 7])
def test_decoding_with_inference_params(prompt):
    """The cache holds what mamba-ssm's holds: the last d_conv inputs, padded on the left, and the scan's state."""
    ours, x = block(), torch.randn(2, 9, 12)
    whole = ours(x)
    params = InferenceParams(max_seqlen=9, max_batch_size=2)
    with torch.no_grad():
        torch.testing.assert_close(ours(x[:, :prompt], inference_params=params), whole[:, :prompt])
        conv, ssm = params.key_value_memory_dict[2]
        inputs = ours.in_proj(x)[..., :24].transpose(1, 2)
        padded = torch.nn.functional.pad(inputs[..., :prompt], (4, 0))[..., -4:]
        assert conv.shape == (2, 24, 4) and (conv[..., : max(0, 4 - prompt)] == 0).all()
        torch.testing.assert_close(conv, padded)
        addresses = conv.data_ptr(), ssm.data_ptr()
        for t in range(prompt, 9):
            params.seqlen_offset = t
            y = ours(x[:, t : t + 1], inference_params=params)
            torch.testing.assert_close(y, whole[:, t : t + 1], rtol=1e-4, atol=1e-6)
        assert params.key_value_memory_dict[2][0] is conv and (conv.data_ptr(), ssm.data_ptr()) == addresses
        torch.testing.assert_close(conv, inputs[..., -4:])
        torch.testing.assert_close(ssm, naive_mamba(ours, x)[1][1], rtol=1e-4, atol=1e-6)


def test_steps_from_an_allocated_cache():
    ours, x = block(), torch.randn(3, 6, 12)
    conv, ssm = ours.allocate_inference_cache(3, max_seqlen=6)
    assert (conv.shape, ssm.shape) == ((3, 24, 4), (3, 24, 5)) and not conv.any() and not ssm.any()
    whole = ours(x)
    with torch.no_grad():
        for t in range(6):
            y, conv_, ssm_ = ours.step(x[:, t : t + 1], conv, ssm)
            assert conv_ is conv and ssm_ is ssm
            torch.testing.assert_close(y, whole[:, t : t + 1], rtol=1e-4, atol=1e-6)
    half = ours.allocate_inference_cache(1, 1, dtype=torch.float16)
    assert half[0].dtype == half[1].dtype == torch.float16


def test_half_precision_caches():
    ours, x = block(torch.bfloat16), torch.randn(2, 8, 12).bfloat16()
    whole, params = ours(x), InferenceParams(8, 2)
    with torch.no_grad():
        ours(x[:, :5], params)
        assert [s.dtype for s in params.key_value_memory_dict[2]] == [torch.bfloat16] * 2
        for t in range(5, 8):
            params.seqlen_offset = t
            torch.testing.assert_close(ours(x[:, t : t + 1], params), whole[:, t : t + 1], rtol=5e-2, atol=2e-2)


def test_parameters_and_constructor_are_those_of_mamba_ssm():
    assert names_of_arguments(Mamba) == (
        "d_model d_state d_conv expand dt_rank dt_min dt_max dt_init dt_scale dt_init_floor "
        "conv_bias bias use_fast_path layer_idx device dtype"
    )
    assert names_of_arguments(Mamba.forward) == "self hidden_states inference_params"
    plain = fastmem.nn.Mamba(12, d_state=5)
    plain.load_state_dict(block().state_dict())  # the same names
    x = torch.randn(1, 4, 12)
    assert torch.equal(plain(x), block()(x))
    assert all(getattr(p, "_no_weight_decay", False) for p in (plain.A_log, plain.D))


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("mamba_ssm", ["Mamba", "selective_scan_fn", "mamba_inner_fn"]),
        ("mamba_ssm.ops.selective_scan_interface", ["selective_scan_fn", "selective_scan_ref", "mamba_inner_fn"]),
        ("mamba_ssm.ops.triton.selective_state_update", ["selective_state_update", "selective_state_update_ref"]),
        ("mamba_ssm.modules.mamba_simple", ["Mamba"]),
        ("mamba_ssm.utils.generation", ["InferenceParams"]),
        ("causal_conv1d", ["causal_conv1d_fn", "causal_conv1d_update"]),
        ("causal_conv1d.causal_conv1d_interface", ["causal_conv1d_fn", "causal_conv1d_ref"]),
    ],
)
def test_submodules_have_the_names_that_people_import(path, names):
    module = importlib.import_module(f"fastmem.compat.{path}")
    for name in names:
        assert callable(getattr(module, name))


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="layer_idx"):
        Mamba(12)(torch.zeros(1, 2, 12), inference_params=InferenceParams(4, 1))
    ours = block()
    with pytest.raises(ValueError, match=r"hidden_states: expected \(B, 1, 12\), got \(1, 2, 12\)"):
        ours.step(torch.zeros(1, 2, 12), *ours.allocate_inference_cache(1, 1))

"""The Triton kernels without a GPU: results in triton's interpreter, and compilation for the GPUs we support."""

import itertools
import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

INTERPRETED = """
import torch
import triton_interpreter
from gated_write_data import SETTINGS, make
from test_gated_write_autograd import raw_rule
from fastmem.kernels import gated_write as kernels
from fastmem.ops._gated_write_autograd import _backward_results, _replay_results, _results

for (size, dtype), setting in zip(SIZES, list(SETTINGS) * len(SIZES)):
    bank, keys, values, surprise, stats = make(*size, dtype)
    mask = torch.rand(keys.shape[:2]) < 0.9
    bank.keys[:, 1:2] = torch.nan  # dead or alive, in some memory
    gate = (surprise, *stats) if SETTINGS[setting][1] else (None,) * 4
    inputs, tolerance = (*bank, keys, values, *gate, mask), 1e-5 if dtype == torch.float32 else 1e-12
    out = _results(bank, keys)
    kernels.forward(inputs, out, tuple(raw_rule(setting)))
    expected = torch.ops.fastmem.gated_write(*inputs, raw_rule(setting))
    assert torch.equal(out[8], expected[8])
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    decisions = expected[8], expected[9], expected[12]
    ones = [torch.randn_like(x) for x in (*bank[:3], keys, values, surprise)]
    back, forth = _backward_results(*ones[:3], *decisions), _replay_results(*ones, *decisions)
    kernels.backward((*ones[:3], *decisions), back)
    kernels.replay((*ones, *decisions), forth)
    torch.testing.assert_close(back, torch.ops.fastmem.gated_write_backward(*ones[:3], *decisions))
    torch.testing.assert_close(forth, torch.ops.fastmem.gated_write_replay(*ones, *decisions))
"""


@pytest.mark.parametrize(
    "sizes",
    [
        "[((2, 5, 13, 8, 6), torch.float64), ((2, 5, 13, 8, 6), torch.float32), ((2, 5, 13, 3, 9), torch.float32),"
        "((0, 3, 2, 4, 5), torch.float32)]",
        "[((1, 33, 3, 257, 130), torch.float32), ((2, 3, 5, 300, 1), torch.float64), "
        "((1, 18, 4, 7, 257), torch.float32), ((1, 1, 1, 1, 1), torch.float32), "
        "((2, 0, 3, 4, 5), torch.float32), ((2, 3, 0, 4, 5), torch.float32)]",
    ],
)
def test_interpreted_kernels_match(sizes):
    program = INTERPRETED.replace("for (size", f"SIZES = {sizes}\nfor (size", 1)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=os.path.dirname(__file__), env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def spilled(kernel, pointer, config, capability, tmp_path, others, **constants):
    """Bytes of registers that ptxas spills in a kernel whose pointers are `pointer`, except the `others`."""
    from triton_compiled import compiled

    return compiled(kernel, config, capability, tmp_path, lambda name: others.get(name, pointer), **constants).spilled


FLAGS = ("gated", "masked", "boosted", "update")
# Everything that `forward` can ask for: without a gate there is a boost, and nothing to update.
ALL_FLAGS = [dict(zip(FLAGS, flags, strict=True)) for flags in itertools.product([False, True], repeat=4)]
ALL_FLAGS = [flags for flags in ALL_FLAGS if flags["gated"] or (flags["boosted"] and not flags["update"])]


def check_forward(flags, pointer, capability, tmp_path):
    from fastmem.kernels import gated_write as kernels

    others = {"p_slot": "i64", "p_route": "i8", "p_mask": "u8"}
    config = kernels.FORWARD_CONFIG
    assert spilled(kernels._forward, pointer, config, capability, tmp_path, others, **flags) == 0, flags


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("pointer", ["fp32", "fp64"])
def test_forward_compiles_without_spills(pointer, capability, tmp_path):
    for flags in (ALL_FLAGS[0], ALL_FLAGS[-1]):
        check_forward(flags, pointer, capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("pointer", ["fp32", "fp64"])
def test_every_forward_compiles_without_spills(pointer, capability, tmp_path):
    for flags in ALL_FLAGS:
        check_forward(flags, pointer, capability, tmp_path)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("pointer", ["fp32", "fp64"])
def test_replays_compile_without_spills(pointer, capability, tmp_path):
    from fastmem.kernels import gated_write as kernels

    others = {"p_slot": "i64", "p_route": "i8"}
    for kernel, config in (
        (kernels._replay, kernels.REPLAY_CONFIG),
        (kernels._replay_strength, kernels.STRENGTH_CONFIG),
    ):
        for transposed in (False, True):
            assert spilled(kernel, pointer, config, capability, tmp_path, others, transposed=transposed) == 0


def test_the_op_does_not_import_triton_until_a_kernel_runs():
    program = "import sys, torch; had = 'triton' in sys.modules; import fastmem; fastmem.gated_write; "
    program += "assert had or 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)

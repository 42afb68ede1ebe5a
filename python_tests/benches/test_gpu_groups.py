"""What is measured on a GPU, without one: that it is there, and that its candidates agree at small sizes."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benches import _harness, causal_conv1d, selective_scan
from benches.__main__ import claims
from fastmem.compat import causal_conv1d as compat_conv
from fastmem.compat import mamba_ssm as compat_scan


@pytest.fixture
def install(monkeypatch):
    """Puts a module with some contents in the place of one that needs nvcc."""

    def install(name, **contents):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    return install


@pytest.mark.parametrize("op", ["selective_scan ", "causal_conv1d ", "topk_attention ", "gated_write "])
@pytest.mark.parametrize("training", [False, True])
def test_every_op_is_measured_on_a_gpu(op, training):
    names = [c.group.name for c in claims() if c.group.device == "cuda"]
    assert any(name.startswith(op) and ("forward + backward" in name) == training for name in names)


def checked(group):
    """The candidates of a group, each of which agrees with the reference on a CPU."""
    sets = _harness.Sets(replace(group, device="cpu"))
    for name in group.candidates:
        sets.calls(name)
    return list(group.candidates)


@pytest.mark.parametrize("training", [False, True])
def test_mamba_ssm_is_a_peer_where_its_extension_is(install, training):
    size = (2, 9, 8, 4)
    alone = selective_scan.gpu_group(size, training, {"loop": selective_scan.loop})
    assert checked(alone) == ["fastmem", "loop"] and not _harness.ratio_of_present(alone, {"mamba-ssm": 3.0}).at_least
    install("selective_scan_cuda")
    install("mamba_ssm")
    install("mamba_ssm.ops")
    install("mamba_ssm.ops.selective_scan_interface", selective_scan_fn=compat_scan.selective_scan_fn)
    group = selective_scan.gpu_group(size, training, {})
    assert checked(group) == ["fastmem", "mamba-ssm"]
    assert _harness.ratio_of_present(group, {"mamba-ssm": 3.0}).at_least == {"mamba-ssm": 3.0}


@pytest.mark.parametrize("training", [False, True])
def test_causal_conv1d_is_a_peer_where_its_extension_is(install, training):
    install("causal_conv1d_cuda")
    install("causal_conv1d", causal_conv1d_fn=compat_conv.causal_conv1d_fn)
    group = causal_conv1d.gpu_group(torch.float32, training, B=1)
    assert checked(group) == ["fastmem", "conv1d", "shifted sums", "causal-conv1d"]


def test_the_rate_of_special_functions_is_that_of_exponentials():
    pytest.importorskip("triton")
    program = """
import torch, triton_interpreter
from benches._exponentials import _repeat
x, y = torch.zeros(8), torch.zeros(8)
_repeat[(2,)](x, 3, 4, 2)
for _ in range(6):
    y = torch.exp2(-y)
torch.testing.assert_close(x, y)
"""
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root / "python_tests" / "ops")}
    run = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_gpu_floor_counts_exponentials(monkeypatch):
    monkeypatch.setattr(_harness, "bandwidth", lambda device, threads: 1e12)
    monkeypatch.setattr(_harness, "matmul_rate", lambda device, threads, dtype: 1e12)
    monkeypatch.setattr(_harness, "exponential_rate", lambda device, threads: {"cuda": 4e9, "cpu": 1e9}[device])
    work = _harness.Work(bytes=1, ops=1, exponentials=8e9)
    assert _harness.floor_seconds(work, "cuda") == 2 and _harness.floor_seconds(work, "cpu") == 8

"""The interpreted tests of kernels see what a GPU would not say: accesses outside of what a kernel was given."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import sys, torch, triton, triton.language as tl, triton_interpreter

@triton.jit
def copy(x, y, step, masked: tl.constexpr, b: tl.constexpr):
    at = tl.arange(0, b)
    if masked:
        tl.store(y + at, tl.load(x + at * step, mask=at < 3, other=0), mask=at < 3)
    else:
        tl.store(y + at, tl.load(x + at * step))

wide = torch.arange(16.0)
x = {"read": wide[:3], "gap": wide[:8:2], "write": wide[:4]}.get(sys.argv[1], wide[:3])
y = torch.zeros(3 if sys.argv[1] in ("write", "masked") else 4)
copy[(1,)](x, y, 1, sys.argv[1] == "masked", 4)
print(y.tolist())
"""


@pytest.mark.parametrize("access", ["read", "gap", "write", "masked"])
def test_access_outside_of_the_arguments(access, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "program.py", access]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if access == "masked":
        assert run.returncode == 0 and run.stdout == "[0.0, 1.0, 2.0]\n", run.stderr
    else:
        assert run.returncode != 0 and "no element of an argument" in run.stderr

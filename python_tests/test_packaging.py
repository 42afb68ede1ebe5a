"""What an installation must be: light to import, alone under its own name, and working without its extras."""

import ast
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastmem import _native

ROOT = Path(__file__).resolve().parent.parent
ONE_CALL = """
import torch, fastmem
from fastmem.ops import _typical
args, kwargs = _typical.calls("cpu")["topk_attention"]
def call(**more):
    return fastmem.topk_attention(*args, **kwargs, **more)
"""


def python(code: str, cwd: Path | None = None, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter; its current folder is on sys.path."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=600
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return tmp_path_factory.mktemp("cwd")


@pytest.mark.parametrize(
    "use",
    ["import fastmem", "import fastmem; fastmem.topk_attention, fastmem.gated_write, fastmem.Bank, fastmem.nn"],
)
def test_import_brings_no_extras(empty, use):
    code = f"import sys, json\n{use}\nprint(json.dumps(sorted(sys.modules)))"
    modules = {name.partition(".")[0] for name in json.loads(python(code, empty).stdout)}
    assert "fastmem" in modules
    assert not modules & {"triton", "transformers", "gymnasium", "safetensors", "tyro", "rich", "matplotlib", "redis"}


def test_public_names_are_imported_when_they_are_used(empty):
    """Each name of __all__ is there, and none of them costs an import of torch before it is asked for."""
    code = """
import sys, fastmem
assert "torch" not in sys.modules
missing = [name for name in fastmem.__all__ if getattr(fastmem, name, None) is None or name not in dir(fastmem)]
assert not missing, missing
from fastmem.ops import gated_write
assert fastmem.Bank is gated_write.Bank and fastmem.SurpriseStats is gated_write.SurpriseStats
print(len(fastmem.__all__))
"""
    assert int(python(code, empty).stdout) > 10


def test_import_takes_little_longer_than_torch(empty):
    clock = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
    ours, torchs = [], []
    for _ in range(3):
        ours.append(
            float(python(clock.format("import torch, fastmem; fastmem.topk_attention; fastmem.nn"), empty).stdout)
        )
        torchs.append(float(python(clock.format("import torch"), empty).stdout))
    assert statistics.median(ours) < 1.5 * statistics.median(torchs), (ours, torchs)


def test_transformers_mamba_imports_beside_our_kernels_folder():
    """transformers probes for a package named `kernels`; in the repository root it finds ours."""
    pytest.importorskip("transformers")
    code = """
import importlib.util, pathlib
assert pathlib.Path(importlib.util.find_spec("kernels").origin).parent == pathlib.Path.cwd() / "kernels"
import torch
from transformers import MambaConfig, MambaForCausalLM
model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4)).eval()
with torch.no_grad():
    print(tuple(model(torch.tensor([[1, 2, 3]])).logits.shape))
"""
    assert python(code, ROOT).stdout.strip() == "(1, 3, 16)"


def test_kernels_package_is_a_docstring():
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


def test_packages_all_lie_under_fastmem():
    code = """
import json
from distutils.core import run_setup
packages = run_setup("setup.py", stop_after="init").packages
print(json.dumps(packages))
"""
    packages = json.loads(python("import setuptools\n" + code, ROOT).stdout.splitlines()[-1])
    assert "fastmem.kernels" in packages and "fastmem.ops" in packages
    assert all(name.split(".")[0] == "fastmem" for name in packages), packages
    on_disk = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "fastmem").rglob("__init__.py")}
    assert on_disk | {"fastmem.data", "fastmem.kernels"} == set(packages)


def test_unknown_instruction_set(empty):
    done = python("import fastmem._native", empty, check=False, FASTMEM_CPU_ISA="sse9")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ValueError: FASTMEM_CPU_ISA: expected one of generic, avx2, avx512, got 'sse9'"


@pytest.mark.skipif(_native.missing is not None, reason="needs the C++ extension")
@pytest.mark.parametrize("isa", _native.ISAS)
def test_each_instruction_set_gives_the_reference_result(empty, isa):
    code = f"""{ONE_CALL}
from fastmem import _native
out = call(backend="cpp")
truth = fastmem.topk_attention(*(a.double() for a in args), **kwargs, backend="reference")
print(_native.isa, ((out - truth).norm() / truth.norm()).item())
"""
    done = python(code, empty, check=False, FASTMEM_CPU_ISA=isa)
    if done.returncode:
        assert f"this CPU cannot run '{isa}'" in done.stderr, done.stderr
        pytest.skip(f"this CPU has no {isa}")
    used, error = done.stdout.split()
    assert used == isa
    assert float(error) < 1e-5


def test_works_without_the_extension(empty):
    code = f"""
import sys, warnings
sys.modules["fastmem._cpu_generic"] = None  # as if it had not been built
{ONE_CALL}
warnings.simplefilter("error")  # to explain is not to run
for op, (given, named) in _typical.calls("cpu").items():
    explanation = fastmem.explain(op, *given, **named)
    assert explanation.chosen == "reference", explanation
    assert "not built" in explanation.refused["cpp"], explanation
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first, second = call(), call()
assert torch.equal(first, second)
assert torch.equal(first, call(backend="reference"))
try:
    call(backend="cpp")
except ValueError as error:
    print(error)
print(sum("slow" in str(w.message) for w in caught), "warning")
"""
    lines = python(code, empty).stdout.splitlines()
    assert "cannot serve this call" in lines[0] and "not built" in lines[0]
    assert lines[1] == "1 warning"


@pytest.mark.slow
def test_wheel(tmp_path):
    """An isolated build: what lands in site-packages, and that it runs from there."""
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(source)], check=True, timeout=900)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "fastmem",
        wheel.name.split("-py")[0].split("-cp")[0] + ".dist-info",
    }
    assert {"fastmem/kernels/__init__.py", "fastmem/py.typed", "fastmem/ops/topk_attention.py"} <= set(names)
    built = {name.split("/")[1].split(".")[0] for name in names if name.startswith("fastmem/_cpu_")}
    assert built == (
        {"_cpu_generic", "_cpu_avx2", "_cpu_avx512"} if platform.machine() == "x86_64" else {"_cpu_generic"}
    )
    tracked_data = {n for n in tracked.split("\0") if n.startswith("fastmem/data/")}
    assert tracked_data <= set(names), tracked_data - set(names)

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=300)
    code = f"""{ONE_CALL}
call(backend="cpp")
import fastmem.kernels
print(fastmem.__file__, fastmem.kernels.__file__, sep="\\n")
"""
    lines = python(code, tmp_path, PYTHONPATH=str(site)).stdout.splitlines()
    assert all(Path(line).is_relative_to(site) for line in lines), lines

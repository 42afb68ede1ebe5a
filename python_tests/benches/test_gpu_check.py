"""benches/gpu_check.sh with a python that only notes its calls: what runs, what is left out, what the status is."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benches" / "gpu_check.sh"
TESTS, SANITIZED, ROWS, RATIOS = (
    "-m pytest -m gpu",
    "-m benches._sanitize",
    "-m benches rows --device cuda",
    "-m benches ratios --device cuda",
)


@pytest.fixture
def check(tmp_path):
    """Runs the script: (status, stdout and stderr, the calls of python in order)."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name))

    def program(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)

    calls = tmp_path / "calls"
    program(tmp_path / "python", f'[ "$1" = -c ] && echo "$GPU" && exit; echo "$*" >> {calls}; [ "$*" != "$FAILS" ]')

    def run(*, gpu="a-gpu", sanitizer=None, fails=""):
        if sanitizer is not None:
            program(tmp_path / sanitizer, f'echo "$2" >> {calls}; shift 4; "$@"')
        done = subprocess.run(
            [tools / "bash", SCRIPT, tmp_path / "python"],
            env={"PATH": f"{tools}:{tmp_path / 'path'}", "CUDA_HOME": str(tmp_path), "GPU": gpu, "FAILS": fails},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_without_the_sanitizer_the_rest_runs(check):
    status, said, calls = check()
    assert status == 0 and calls == [TESTS, SANITIZED, ROWS, RATIOS]
    assert "compute-sanitizer is not installed (it comes with the CUDA toolkit); its checks are left out" in said
    assert said.endswith("passed, compute-sanitizer left out; results in benches/results/a-gpu.json\n")


@pytest.mark.parametrize("where", ["path", "bin", "compute-sanitizer"])
def test_with_the_sanitizer(check, where):
    status, said, calls = check(sanitizer=f"{where}/compute-sanitizer")
    assert status == 0 and calls == [TESTS, "memcheck", SANITIZED, "racecheck", SANITIZED, ROWS, RATIOS]
    assert said == "gpu-check: passed; results in benches/results/a-gpu.json\n"


@pytest.mark.parametrize("sanitizer", [None, "path/compute-sanitizer"])
@pytest.mark.parametrize("fails", [TESTS, SANITIZED, ROWS, RATIOS])
def test_what_fails_is_the_status(check, sanitizer, fails):
    status, said, calls = check(sanitizer=sanitizer, fails=fails)
    assert status == 1 and "passed" not in said and calls[-1] == fails


def test_no_gpu(check):
    status, said, calls = check(gpu="")
    assert status == 1 and calls == [] and said == "gpu-check: no CUDA device that torch can use on this machine\n"

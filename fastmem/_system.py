"""What this machine and this installation are: names and versions for `fastmem info`, results and benchmarks."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "fastmem",
    "torch",
    "numpy",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "gguf",
    "faiss-cpu",
    "mambapy",
)


def versions() -> dict[str, str]:
    """Version of Python and of each package of `PACKAGES` that is installed; imports none of them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The CPU's model name, such as "AMD EPYC 9B14"."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_device(threads: int) -> str:
    """The CPU as results name it: model, the instruction set that our kernels use, threads. Hosts of one model name
    may differ in instruction set."""
    from fastmem import _native

    return f"{cpu_name()}, {_native.isa}, {threads} threads"


def gpu_name() -> str | None:
    """The current CUDA device's name, or None where there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def slug(name: str) -> str:
    """`name` as part of a file name: "Intel(R) Xeon(R) CPU @ 2.70GHz" -> "intel-xeon-cpu-2.70ghz"."""
    return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def git_commit() -> str | None:
    """Commit of the checkout that fastmem runs from, "-dirty" added where tracked files differ; None outside one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        return f"{commit}-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    done = subprocess.run(
        ["git", *arguments], cwd=root, env=env, capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout

"""Which threads the CPU kernels compute on: torch's own, where its OpenMP runtime can be reached.

torch's threads spin for some milliseconds after each op. Kernels on other threads would wait for a core meanwhile; on
the same threads they begin at once. `FASTMEM_THREADS=own|torch`: own ones, or torch's where they can be had (default).
"""

import os
from pathlib import Path

import torch

from fastmem import _native


def _borrow() -> bool:
    wanted = os.environ.get("FASTMEM_THREADS") or "torch"
    if wanted not in ("own", "torch"):
        raise ValueError(f"FASTMEM_THREADS: expected own or torch, got {wanted!r}")
    if _native.kernels is None or wanted == "own":
        return False
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return _native.kernels.borrow_threads(str(library))


BORROWED = _borrow()

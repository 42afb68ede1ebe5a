"""Which threads the CPU kernels compute on: torch's own, where its OpenMP runtime can be reached.

torch's threads spin for some milliseconds after each op. Kernels on other threads would wait for a core meanwhile; on
the same threads they begin at once.
"""

import os
from pathlib import Path

import torch

from fastmem import _native


def _borrow() -> bool:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if _native.kernels is None or os.environ.get("FASTMEM_THREADS") == "own":
        return False
    return _native.kernels.borrow_threads(str(library))


BORROWED = _borrow()

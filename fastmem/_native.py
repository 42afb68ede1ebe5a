"""The CPU kernels: one extension module per instruction set, chosen once by what this CPU has.

`FASTMEM_CPU_ISA=generic|avx2|avx512` forces one, for tests. Needs neither torch nor numpy.
"""

import importlib
import os
from types import ModuleType

ISAS = ("generic", "avx2", "avx512")
DTYPE_CODES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}  # csrc/common.h, enum Dtype


def _load() -> tuple[str, ModuleType | None, str | None]:
    """(instruction set, module or None, why there is none)."""
    try:
        generic = importlib.import_module("fastmem._cpu_generic")
    except ImportError as error:
        return "none", None, f"the C++ extension is not built ({error})"
    best = generic.best_isa()
    isa = os.environ.get("FASTMEM_CPU_ISA") or best
    if isa not in ISAS:
        raise ValueError(f"FASTMEM_CPU_ISA: expected one of {', '.join(ISAS)}, got {isa!r}")
    if ISAS.index(isa) > ISAS.index(best):
        raise ValueError(f"FASTMEM_CPU_ISA: this CPU cannot run {isa!r}; its best is {best!r}")
    if isa == "generic":
        return isa, generic, None
    return isa, importlib.import_module(f"fastmem._cpu_{isa}"), None


isa, kernels, missing = _load()

"""Builds the CPU kernels once per instruction set, and the registry once. Everything else stands in pyproject.toml."""

import platform
import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup

SOURCES = [
    "csrc/bindings.cpp",
    "csrc/causal_conv1d.cpp",
    "csrc/dense_attention.cpp",
    "csrc/dense_attention_backward.cpp",
    "csrc/gated_write.cpp",
    "csrc/parallel.cpp",
    "csrc/selective_scan.cpp",
    "csrc/selective_scan_backward.cpp",
    "csrc/topk_attention.cpp",
    "csrc/topk_attention_backward.cpp",
]

# One module per instruction set; fastmem/_native.py picks one at import by what the CPU has.
ISA_FLAGS = {"generic": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    ISA_FLAGS |= {"avx2": avx2, "avx512": avx512}
# Contraction to FMA is wanted and keeps every result correctly ordered; nothing else of -ffast-math is.
BASE_FLAGS = ["-fno-math-errno", "-ffp-contract=fast", "-pthread"]


class BuildPerIsa(build_ext):
    """The modules share their sources, so each gets its own folder of object files."""

    def build_extension(self, ext):
        base = self.build_temp
        self.build_temp = f"{base}/{ext.name}"
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = base


def extension(isa: str, flags: list[str]) -> Pybind11Extension:
    return Pybind11Extension(
        f"fastmem._cpu_{isa}",
        SOURCES,
        depends=glob("csrc/*.h"),
        cxx_std=20,
        define_macros=[("FASTMEM_MODULE", f"_cpu_{isa}"), (f"FASTMEM_ISA_{isa.upper()}", "1")],
        # Beside others, the generic module serves what is too old for speed, and -O2 compiles in half the time.
        extra_compile_args=["-O3" if flags or len(ISA_FLAGS) == 1 else "-O2", *BASE_FLAGS, *flags],
        extra_link_args=["-pthread", *(["-ldl"] if sys.platform == "linux" else [])],
    )


REGISTRY = Extension(
    "fastmem._registry",
    ["csrc/registry.cpp", "csrc/signature.cpp", "csrc/fix_fields.cpp", "csrc/fix_table.cpp"],
    depends=["csrc/registry.h", "csrc/fix_table.h"],
    language="c++",
    extra_compile_args=["-std=c++20", "-O3", *BASE_FLAGS, "-fvisibility=hidden"],
    extra_link_args=["-pthread"],
)

ParallelCompile("FASTMEM_BUILD_JOBS", default=0).install()

setup(
    packages=[*find_packages(include=["fastmem", "fastmem.*"]), "fastmem.data", "fastmem.kernels"],
    package_dir={"fastmem.kernels": "kernels"},
    package_data={"fastmem": ["py.typed", "*.pyi"], "fastmem.registry": ["*.lua", "*.css"], "fastmem.data": ["**/*"]},
    ext_modules=[REGISTRY, *(extension(isa, flags) for isa, flags in ISA_FLAGS.items())],
    cmdclass={"build_ext": BuildPerIsa},
)

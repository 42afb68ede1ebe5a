"""What the real compiler makes of a Triton kernel, for GPUs that need not be there."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Compiled(NamedTuple):
    """Registers of a thread, bytes of them that ptxas spills, the PTX, and the file of machine code."""

    registers: int
    spilled: int
    ptx: str
    cubin: Path


def first_loop(cubin: Path) -> list[str]:
    """The instructions of the innermost loop that ends first in a kernel's machine code."""
    nvdisasm = triton.knobs.nvidia.nvdisasm.path
    text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    labels, instructions = {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction.group(1))
            back = re.search(r"BRA.*`\((\.L_\w+)\)", instructions[-1])
            if back and back.group(1) in labels:
                return instructions[labels[back.group(1)] :]
    raise AssertionError("no loop")


def compiled(kernel, config, capability, tmp_path, pointers, scalars=None, aligned=False, **constants):
    """`kernel`, a triton.jit function, compiled with `config`: its block sizes, and num_warps.

    Args:
        capability: 80 or 90.
        tmp_path: a folder for the code.
        pointers: function from a pointer's name to what it points to, such as "fp32".
        scalars: name -> type of the scalars that are not int32.
        aligned: whether pointers and scalars are multiples of 16, as far as triton looks for that.
        constants: values of constexpr arguments, and None for pointers that are absent.
    """
    config = dict(config)
    options = {"num_warps": config.pop("num_warps")}
    constants |= config
    signature, attributes = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = name.startswith("p_")
        signature[name] = "*" + pointers(name) if pointer else (scalars or {}).get(name, "i32")
        if aligned and (pointer or not parameter.do_not_specialize):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert result.asm["cubin"]
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(result.asm["ptx"])
    arch = {80: "sm_80", 90: "sm_90a"}[capability]
    cubin = tmp_path / "kernel.cubin"
    ptxas = [triton.knobs.nvidia.ptxas.path, "-v", "-arch", arch, str(ptx), "-o", str(cubin)]
    report = subprocess.run(ptxas, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.findall(r"Used (\d+) registers", report), re.findall(r"(\d+) bytes spill", report)
    assert registers and spilled, report
    return Compiled(max(map(int, registers)), max(map(int, spilled)), result.asm["ptx"], cubin)

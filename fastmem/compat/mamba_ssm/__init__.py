"""mamba-ssm 2.3's first-generation Mamba: the same names, signatures and layouts, on CPU and GPU.

In place of `from mamba_ssm import Mamba` write `from fastmem.compat.mamba_ssm import Mamba`; the submodules have their
names too. Beyond mamba-ssm, the gradient of the last state counts, and second derivatives are exact.
"""

from fastmem.compat.mamba_ssm.modules.mamba_simple import Mamba
from fastmem.compat.mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
from fastmem.compat.mamba_ssm.ops.triton.selective_state_update import selective_state_update

__all__ = ["Mamba", "mamba_inner_fn", "selective_scan_fn", "selective_state_update"]

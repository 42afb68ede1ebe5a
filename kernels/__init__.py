"""Triton kernels, one file per op; installed as fastmem.kernels."""

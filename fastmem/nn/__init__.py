"""Drop-in modules, one idea per file."""

from fastmem.nn.decaying_buffer import DecayingBuffer
from fastmem.nn.dual_memory_layer import DualMemoryLayer, DualMemoryState
from fastmem.nn.mamba import Mamba, MambaState
from fastmem.nn.memory_config import MemoryConfig
from fastmem.nn.memory_cross_attention import MemoryCrossAttention
from fastmem.nn.surprise_gated_store import SurpriseGatedStore

__all__ = [
    "DecayingBuffer",
    "DualMemoryLayer",
    "DualMemoryState",
    "Mamba",
    "MambaState",
    "MemoryConfig",
    "MemoryCrossAttention",
    "SurpriseGatedStore",
]

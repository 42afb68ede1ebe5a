"""Whole networks made of fastmem.nn."""

from fastmem.models.mamba_lm import MambaLM, MambaLMConfig
from fastmem.models.memory_augmented_model import ExperimentConfig, MemoryAugmentedModel
from fastmem.models.memory_directory import MemoryDirectory
from fastmem.models.memory_model import MemoryModel, get_memory_model
from fastmem.nn import MemoryConfig

__all__ = [
    "ExperimentConfig",
    "MambaLM",
    "MambaLMConfig",
    "MemoryAugmentedModel",
    "MemoryConfig",
    "MemoryDirectory",
    "MemoryModel",
    "get_memory_model",
]

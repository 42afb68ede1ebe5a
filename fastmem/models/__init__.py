"""Whole networks made of fastmem.nn."""

from fastmem.models.memory_augmented_model import ExperimentConfig, MemoryAugmentedModel
from fastmem.models.memory_directory import MemoryDirectory
from fastmem.models.memory_model import MemoryModel, get_memory_model
from fastmem.nn import MemoryConfig

__all__ = [
    "ExperimentConfig",
    "MemoryAugmentedModel",
    "MemoryConfig",
    "MemoryDirectory",
    "MemoryModel",
    "get_memory_model",
]

"""Sizes and rates of the dual memory."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryConfig:
    """Configuration of a DualMemoryLayer, and of the model that carries several of them.

    The write rates differ from the usual blending rates (0.3 and 0.1): a value here is one token's content, and a
    blend of two tokens is neither. A write replaces what it matches, so that the latest word wins.

    Raises:
        ValueError: if a size or rate is out of range.
    """

    hidden_dim: int = 768
    """Width of the hidden states that the layer sits on."""
    buffer_slots: int = 256
    """Slots of the decaying buffer."""
    store_slots: int = 128
    """Slots of the surprise-gated store."""
    memory_dim: int = 192
    """Width of the keys."""
    num_heads: int = 1
    """Heads of the read; keys and values are split between them."""
    top_k: int | None = None
    """Slots that a read attends to; None: all."""
    temperature: float = 1.0
    """Divides the scores of a read."""
    decay_rate: float = 0.95
    """What remains of a buffer activation after one decay cycle."""
    novelty_threshold: float = 0.9
    """Cosine to the best live slot below which a token is new to the buffer. Above the store's: the buffer keeps an
    aunt's name apart from an uncle's, the store lets the latest word win."""
    write_alpha_novel: float = 1.0
    """Blend when a new token takes over the weakest live slot."""
    write_alpha_reinforce: float = 1.0
    """Blend when a token matches a buffer slot."""
    activation_boost: float = 1.0
    """Added to the activation of a buffer slot that is written, up to 1."""
    z_score_threshold: float = 0.25
    """Standard deviations above the mean surprise from which the store writes."""
    ema_alpha: float = 0.1
    """Weight of the newest surprise in the running statistics."""
    capacity_pressure: float = 0.5
    """How much a full store raises the threshold."""
    consolidation_similarity_threshold: float = 0.8
    """Cosine from which a token is blended into the store slot that it matches."""
    write_alpha: float = 1.0
    """Blend when a token matches a store slot."""
    surprise_dim: int = 64
    """Hidden width of the surprise predictor."""
    gate_dim: int = 64
    """Hidden width of the output gate."""
    memory_layer_positions: tuple[int, ...] | None = None
    """Blocks after which memory stands, 0 the first; None: at 45, 69 and 93 % of the depth."""

    def __post_init__(self) -> None:
        counts = ["hidden_dim", "buffer_slots", "store_slots", "memory_dim", "num_heads", "surprise_dim", "gate_dim"]
        for name in counts if self.top_k is None else [*counts, "top_k"]:
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name}: expected an integer, got {getattr(self, name)!r}")
        if any(type(p) is not int for p in self.memory_layer_positions or ()):
            raise ValueError(f"memory_layer_positions: expected integers, got {self.memory_layer_positions}")
        for name in ("hidden_dim", "memory_dim", "num_heads", "surprise_dim", "gate_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("buffer_slots", "store_slots"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("hidden_dim", "memory_dim"):
            if getattr(self, name) % self.num_heads:
                raise ValueError(
                    f"{name}: expected a multiple of num_heads {self.num_heads}, got {getattr(self, name)}"
                )
        for name in ("decay_rate", "write_alpha_novel", "write_alpha_reinforce", "write_alpha", "ema_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(self, name)}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected None or at least 1, got {self.top_k}")
        if self.memory_layer_positions is not None:
            object.__setattr__(self, "memory_layer_positions", tuple(self.memory_layer_positions))

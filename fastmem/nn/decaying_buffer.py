"""Short-term memory: every token is written, and fades with each cycle unless it is written again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmem.nn._checks import check_cycles
from fastmem.nn.memory_config import MemoryConfig
from fastmem.ops.gated_write import Bank, Written, gated_write

MIN_ACTIVATION = 0.01


def empty_bank(batch: int, slots: int, key_dim: int, value_dim: int, device: torch.device | str | None = None) -> Bank:
    """A bank without a live slot: keys (batch, slots, key_dim), values (batch, slots, value_dim), fp32."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    return Bank(
        zeros(batch, slots, key_dim),
        zeros(batch, slots, value_dim),
        zeros(batch, slots),
        zeros(batch, slots),
        zeros(batch, slots),
    )


class DecayingBuffer(nn.Module):
    """Slots with an activation in [0, 1] that decays by `decay_rate` a cycle; below 0.01 a slot is empty.

    It holds no state: banks go in and out, so one module serves any number of memories. `Bank.strength` is the
    activation, `Bank.age` counts cycles since a slot was written.

    Args:
        config: sizes and rates.
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config

    def empty(self, batch: int, device: torch.device | str | None = None) -> Bank:
        """Banks of `batch` memories that hold nothing: keys (batch, buffer_slots, memory_dim), values (batch,
        buffer_slots, hidden_dim), on `device`."""
        config = self.config
        return empty_bank(batch, config.buffer_slots, config.memory_dim, config.hidden_dim, device)

    def decay(self, bank: Bank, cycles: int | Tensor = 1) -> Bank:
        """a <- a * decay_rate^cycles; what falls below 0.01 is empty.

        Args:
            bank: the memories, B of them.
            cycles: how many pass; a tensor (B, 1) gives each memory its own number.

        Raises:
            ValueError: if cycles are negative.
        """
        check_cycles(cycles)
        strength = bank.strength * self.config.decay_rate**cycles
        strength = torch.where(strength < MIN_ACTIVATION, torch.zeros_like(strength), strength)
        return bank._replace(strength=strength, age=bank.age + cycles)

    def write(self, bank: Bank, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> tuple[Bank, Written]:
        """Write tokens in order.

        A token whose best cosine to a live slot is below novelty_threshold takes an empty slot, or the weakest one
        (write_alpha_novel); else the best match (write_alpha_reinforce). The activation grows by activation_boost.

        Args:
            bank: the memories, B of them.
            keys: (B, T, memory_dim).
            values: (B, T, hidden_dim).
            mask: (B, T) bool, true where a token is written; None: everywhere.

        Returns:
            The new bank, and what was written where.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, dtype or shape.
        """
        config = self.config
        new_bank, _, written = gated_write(
            bank,
            keys,
            values,
            mask=mask,
            match_threshold=config.novelty_threshold,
            alpha_match=config.write_alpha_reinforce,
            alpha_evict=config.write_alpha_novel,
            boost=config.activation_boost,
            min_strength=MIN_ACTIVATION,
            retention=(1.0, 0.0, 0.0),
        )
        return new_bank, written

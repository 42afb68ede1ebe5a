"""Long-term memory: only what surprises is written, and it stays until something more surprising needs the room."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmem.nn._checks import check_cycles
from fastmem.nn.decaying_buffer import empty_bank
from fastmem.nn.memory_config import MemoryConfig
from fastmem.ops.gated_write import Bank, SurpriseStats, Written, gated_write


class SurpriseGatedStore(nn.Module):
    """Slots that take a token when its surprise exceeds an adaptive threshold.

    Surprise is how far a token is from what an MLP predicts from the token before it,
    s_pred = sqrt(mean((x_t - MLP(W_c x_{t-1}))^2)), or twice the conflict with what is stored, whichever is larger.
    `Bank.strength` is the surprise, `Bank.access` counts reads, `Bank.age` cycles since a slot was written.

    Training moves the statistics of surprise, each memory's own and the module's, from which new memories start;
    evaluation moves neither.

    Args:
        config: sizes and rates.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.context_proj = nn.Linear(config.hidden_dim, config.surprise_dim, bias=False)
        prediction = nn.Linear(config.surprise_dim, config.hidden_dim)
        nn.init.zeros_(prediction.weight)
        nn.init.zeros_(prediction.bias)
        self.predictor = nn.Sequential(nn.Linear(config.surprise_dim, config.surprise_dim), nn.GELU(), prediction)
        for name in ("mean", "var", "count"):
            self.register_buffer(name, torch.zeros(()))

    def empty(self, batch: int, device: torch.device | str | None = None) -> tuple[Bank, SurpriseStats]:
        """Banks of `batch` memories that hold nothing, with the statistics that training left: keys (batch,
        store_slots, memory_dim), values (batch, store_slots, hidden_dim), on `device`."""
        config = self.config
        bank = empty_bank(batch, config.store_slots, config.memory_dim, config.hidden_dim, device)
        stats = SurpriseStats(*(x.detach().to(device).expand(batch).clone() for x in (self.mean, self.var, self.count)))
        return bank, stats

    def age(self, bank: Bank, cycles: int | Tensor = 1) -> Bank:
        """Let `cycles` cycles pass; nothing fades, but old slots are evicted first.

        Args:
            bank: the memories, B of them.
            cycles: how many pass; a tensor (B, 1) gives each memory its own number.

        Raises:
            ValueError: if cycles are negative.
        """
        check_cycles(cycles)
        return bank._replace(age=bank.age + cycles)

    def surprise(self, context: Tensor, content: Tensor) -> Tensor:
        """s_pred of each token.

        Args:
            context: (B, T, hidden_dim) normalised hidden state of the token before.
            content: (B, T, hidden_dim) what is to be predicted.

        Returns:
            (B, T), differentiable.
        """
        error = content - self.predictor(self.context_proj(context))
        return (error.square().mean(-1) + 1e-12).sqrt()

    def write(
        self,
        bank: Bank,
        stats: SurpriseStats,
        keys: Tensor,
        values: Tensor,
        surprise: Tensor,
        mask: Tensor | None = None,
    ) -> tuple[Bank, SurpriseStats, Written]:
        """Write the surprising tokens in order.

        Args:
            bank: the memories, B of them.
            stats: their running statistics.
            keys: (B, T, memory_dim).
            values: (B, T, hidden_dim).
            surprise: (B, T) s_pred.
            mask: (B, T) bool, true where a token may be written; None: everywhere.

        Returns:
            The new bank, the new statistics (unchanged in evaluation), what was written where.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, dtype or shape.
        """
        config = self.config
        new_bank, new_stats, written = gated_write(
            bank,
            keys,
            values,
            surprise,
            stats,
            mask=mask,
            match_threshold=config.consolidation_similarity_threshold,
            alpha_match=config.write_alpha,
            alpha_evict=1.0,
            boost=None,
            min_strength=0.0,
            retention=(0.5, 0.3, 0.001),
            z_threshold=config.z_score_threshold,
            capacity_pressure=config.capacity_pressure,
            ema_alpha=config.ema_alpha,
            update_stats=self.training,
        )
        assert new_stats is not None
        if self.training and len(new_stats.mean):
            with torch.no_grad():
                for name, x in zip(("mean", "var", "count"), new_stats, strict=True):
                    getattr(self, name).copy_(x.mean())
        return new_bank, new_stats, written

    def count_reads(self, bank: Bank, mass: Tensor) -> Bank:
        """Add attention mass (B, store_slots), the store's part of `MemoryCrossAttention.attention_mass`, to the access
        counts: what is read is evicted later."""
        return bank._replace(access=bank.access + mass)

"""Whether decay bounds memory: new fixes in every epoch, and how many are alive."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass

from fastmem.experiments.registry_command import Result, error, fix, main, option, positive, table
from fastmem.registry import DecayConfig, ErrorSignature, FixRegistry


@dataclass(frozen=True)
class Config:
    """What `run` does; the help text of a field says what it is. A number that makes no sense is a ValueError."""

    epochs: int = option(1000, "epochs")
    rate: int = option(10, "fixes registered in each epoch")
    exp_decay: float = option(0.97, "factor of the strength per epoch")
    lin_decay: float = option(0.001, "what the strength loses per epoch besides")
    threshold: float = option(0.01, "strength below which a fix goes")
    reinforce: float = option(0.0, "part of the living fixes that succeed in each epoch")
    seed: int = option(0, "which fixes succeed")

    def __post_init__(self) -> None:
        positive(self, "epochs", "rate")
        if not 0 <= self.reinforce <= 1:
            raise ValueError(f"reinforce: expected a number, 0 to 1, got {self.reinforce}")


def run(config: Config) -> Result:
    """Sizes over time. Without reinforcement the steady state is known beforehand: rate x epochs that a fix lives."""
    decay = DecayConfig(config.exp_decay, config.lin_decay, config.threshold)
    registry, generator = FixRegistry(decay_config=decay), random.Random(config.seed)
    number = peak = 0
    history: list[dict[str, int]] = []
    alive: list[ErrorSignature] = []
    for epoch in range(config.epochs):
        fresh = [error(n) for n in range(number, number + config.rate)]
        registry.register_many(fresh, [fix(n) for n in range(number, number + config.rate)])
        number += config.rate
        peak = max(peak, len(registry))
        if config.reinforce:
            alive = [signature for signature in alive if signature in registry] + fresh
            for signature in generator.sample(alive, int(len(alive) * config.reinforce)):
                registry.report_success(signature)
        pruned = registry.advance_epoch()
        history.append({"epoch": epoch, "size": len(registry), "registered": config.rate, "pruned": pruned})
    sizes = [row["size"] for row in history]
    last_quarter = sizes[-max(1, len(sizes) // 4) :]
    final = {
        "registered": float(number),
        "peak_size": float(peak),
        "final_size": float(sizes[-1]),
        "last_quarter_mean": statistics.fmean(last_quarter),
        "last_quarter_std": statistics.pstdev(last_quarter),
    }
    step = max(1, config.epochs // 20)
    shown_rows = [row for row in history if row["epoch"] % step == 0 or row is history[-1]]
    lines = [
        *table(
            ["epoch", "size", "pruned"], [[f"{r['epoch']}", f"{r['size']:,}", f"{r['pruned']:,}"] for r in shown_rows]
        ),
        f"{number:,} registered, at most {peak:,} alive; in the last quarter {final['last_quarter_mean']:,.1f} "
        f"with a standard deviation of {final['last_quarter_std']:.1f}",
    ]
    return Result(final, history, lines)


def command(arguments: list[str] | None = None) -> int:
    """`fastmem registry memory-decay`; its exit status."""
    return main("memory-decay", __doc__, Config, run, arguments)

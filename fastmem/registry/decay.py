"""How strengths fall: per epoch `s <- max(0, rate * s - linear)`, and below `min_strength` an entry is pruned."""

from __future__ import annotations

import math
from dataclasses import dataclass

INITIAL_STRENGTH = 1.0
SUCCESS_GAIN = 0.05
FAILURE_LOSS = 0.1


@dataclass(frozen=True)
class DecayConfig:
    """The rule of forgetting.

    Attributes:
        exponential_rate: factor per epoch, 0 to 1.
        linear_rate: subtracted per epoch, 0 or more; what makes even a slow factor end.
        min_strength: an entry below it is pruned, 0 to 1; at 0 nothing ever is.
    """

    exponential_rate: float = 0.97
    linear_rate: float = 0.001
    min_strength: float = 0.01

    def __post_init__(self) -> None:
        for name, low, high in (
            ("exponential_rate", 0.0, 1.0),
            ("linear_rate", 0.0, math.inf),
            ("min_strength", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not (low <= value <= high and math.isfinite(value)):
                upper = f" to {high:g}" if math.isfinite(high) else " or more"
                raise ValueError(f"{name}: expected a number, {low:g}{upper}, got {value!r}")

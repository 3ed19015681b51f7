"""How long many things took, in little memory."""

import math
from dataclasses import dataclass, field
from typing import Final

_FLOOR_MS: Final = 0.001
_STEP: Final = math.log(1.01)
_SIZES: Final = 2000
"""From a microsecond to seven minutes; what is longer counts as that."""


@dataclass(slots=True)
class Spread:
    """Milliseconds, as counts by size: each is known to within 1 %, and told as the most that it can have been."""

    counts: list[int] = field(default_factory=lambda: [0] * _SIZES)
    worst: float = 0.0

    @property
    def number(self) -> int:
        """How many there are."""
        return sum(self.counts)

    def add(self, milliseconds: float) -> None:
        """Count one."""
        self.worst = max(self.worst, milliseconds)
        size = math.ceil(math.log(milliseconds / _FLOOR_MS) / _STEP) if milliseconds > _FLOOR_MS else 0
        self.counts[min(size, _SIZES - 1)] += 1

    def quantile(self, share: float) -> float:
        """Give the shortest time within which at least this share of them ended; 0 where there are none."""
        wanted, seen = share * self.number, 0
        for size, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                return min(self.worst, _FLOOR_MS * math.exp(size * _STEP))
        return self.worst

    def summary(self) -> dict[str, float]:
        """Give what a reader wants to know of them."""
        quantiles = {f"p{100 * share:g}": self.quantile(share) for share in (0.5, 0.9, 0.99, 0.999)}
        return {"number": self.number, **quantiles, "worst": self.worst}

"""A share of the last change on top: the dynamic feature reuse of FasterCache (arXiv:2410.19355)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cache4diffusion.predictors.base import LinearPredictor


@dataclass(frozen=True)
class WeightedChange(LinearPredictor):
    """``y = y_last + w (y_last - y_prev)`` with the last two full steps, wherever they lie; ``w = weight + slope * k``.

    ``k`` counts steps from ``since``. Exact on lines if w is the cached step's distance from the last full step over
    the distance between the two: 0.5 where every second step is full. Weight 0 is plain reuse.

    Args:
        weight: w at step ``since``. Code: 0.3 to 0.5.
        slope: how much it grows in a step.
        since: the first step that counts.

    Memory: two copies of the feature.
    """

    weight: float = 0.5
    slope: float = 0.0
    since: int = 0

    @property
    def capacity(self) -> int:
        """The newest two, or one where no change counts."""
        return 1 if self.weight == 0 and self.slope == 0 else 2

    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """``1 + w`` and ``-w``."""
        if len(times) < 2:
            return [1.0]
        w = self.weight + self.slope * max(time - self.since, 0.0)
        return [1.0 + w, -w]

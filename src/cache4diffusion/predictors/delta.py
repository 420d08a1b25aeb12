"""Delta predictor: the feature used last, plus a fraction of how it changed last.

Source: GOC, arXiv:2503.05156; released code qiujx0520/GOC_ICCV2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cache4diffusion.predictors.base import RecursivePredictor


@dataclass(frozen=True)
class Delta(RecursivePredictor):
    """Predict ``y_i = u + eta (u - v)``, where ``u`` and ``v`` are the features used last and before, of any steps.

    What was used is what a full step computed or a cached step went on with, so errors feed back. Exact for constant
    features; for lines at ``eta=1`` once both are exact and one step apart.

    Args:
        eta: fraction of the last change that is added; 0 is plain reuse. Code: 1.2 on FORA, 0.8 on L2C.
        steps: the cached steps at which it is added; reuse at the others. None for all. The first cached step after a
            single full one is always reuse.

    Memory: 2 copies of the feature per site and branch.
    """

    eta: float = 1.0
    steps: tuple[int, ...] | None = None

    @property
    def capacity(self) -> int:
        """The last two values used."""
        return 2

    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """On the last two values, whenever they were."""
        if len(times) < 2 or (self.steps is not None and time not in self.steps):
            return [1.0]
        return [1 + self.eta, -self.eta]

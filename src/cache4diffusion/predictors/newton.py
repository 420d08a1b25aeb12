"""Newton predictor: polynomial extrapolation by divided differences. Ours; exact where `Taylor` is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cache4diffusion.errors import SettingError
from cache4diffusion.predictors.base import LinearPredictor
from cache4diffusion.predictors.differences import lagrange


@dataclass(frozen=True)
class Newton(LinearPredictor):
    """The polynomial of degree ``order`` through the last ``order + 1`` full steps, evaluated at the cached step.

    Exact for features that are polynomials of that degree in the step, at any spacing of the full steps. Order 1
    equals `Taylor` of order 1. Early on fewer full steps exist and the degree is lower.

    Args:
        order: degree, 0 or more; 0 is plain reuse. High orders amplify noise: the weights' absolute sum grows like
            ``2^(order+1) - 1`` for one step ahead at unit spacing.

    Raises:
        SettingError: ``order`` is negative.

    Memory: ``order + 1`` copies of the feature per site and branch.
    """

    order: int = 1

    def __post_init__(self) -> None:
        if self.order < 0:
            raise SettingError(f"Newton(order={self.order}): order must be 0 (plain reuse) or more.")

    @property
    def capacity(self) -> int:
        """One more than the degree."""
        return self.order + 1

    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """Lagrange's form of the same polynomial."""
        return lagrange(times, time)

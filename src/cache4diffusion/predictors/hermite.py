"""Hermite predictor: TaylorSeer's differences on scaled Hermite polynomials instead of powers.

Source: HiCache, arXiv:2508.16984.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cache4diffusion.errors import SettingError
from cache4diffusion.predictors.base import LinearPredictor
from cache4diffusion.predictors.differences import combine, ladder, powers


def hermite(order: int, x: float) -> list[float]:
    """Physicists' Hermite polynomials ``H_0(x) .. H_order(x)``: ``H_{n+1} = 2x H_n - 2n H_{n-1}``."""
    values = [1.0, 2 * x]
    for n in range(1, order):
        values.append(2 * x * values[n] - 2 * n * values[n - 1])
    return values[: order + 1]


@dataclass(frozen=True)
class Hermite(LinearPredictor):
    """Predict ``y(i0 + k) = sum over m of sigma^m H_m(sigma k) / m! * d_m``, for m = 0 .. order.

    ``d_m`` are `Taylor`'s differences. Written out, ``d_1`` is weighted with ``2 sigma^2 k`` (`Taylor`: ``k``) and
    ``d_2`` with ``2 sigma^4 k^2 - sigma^2`` (`Taylor`: ``k^2 / 2``): a ``sigma`` below ``sqrt(1/2)`` follows only part
    of the slope, and from order 2 on the prediction does not meet the feature at ``k = 0``. Exact for constant
    features; for lines only at ``sigma = sqrt(1/2)`` and order 1, where it equals `Taylor`.

    Args:
        order: highest polynomial, 0 or more; 0 is plain reuse. Published: 2.
        sigma: contraction, more than 0. Published: 0.5; FreqCa uses 0.71.
        first_difference_step: full steps before this one give no differences; see `Taylor`.

    Raises:
        SettingError: a value is out of range.

    Memory: ``order + 1`` copies of the feature per site and branch.
    """

    order: int = 2
    sigma: float = 0.5
    first_difference_step: int = 0

    def __post_init__(self) -> None:
        if self.order < 0:
            raise SettingError(f"Hermite(order={self.order}): order must be 0 (plain reuse) or more.")
        if not self.sigma > 0:
            raise SettingError(f"Hermite(sigma={self.sigma}): sigma must be more than 0.")
        if self.first_difference_step < 0:
            raise SettingError(
                f"Hermite(first_difference_step={self.first_difference_step}): must be a step index, 0 or more."
            )

    @property
    def capacity(self) -> int:
        """A difference of order m needs m + 1 full steps."""
        return self.order + 1

    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """Of the recursion's differences, ``sigma^m H_m(sigma k) / m!`` of each."""
        rungs = ladder(times, self.order, self.first_difference_step)
        polynomials = hermite(len(rungs) - 1, self.sigma * (time - times[0]))
        factors = [scale * value for scale, value in zip(powers(self.sigma, len(rungs)), polynomials, strict=True)]
        return combine(rungs, factors)

"""Taylor predictor: extrapolate a feature from its values at past full steps.

Source: TaylorSeer, arXiv:2503.06923, and the recursion of its released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cache4diffusion.errors import SettingError
from cache4diffusion.predictors.base import LinearPredictor
from cache4diffusion.predictors.differences import combine, ladder, powers


@dataclass(frozen=True)
class Taylor(LinearPredictor):
    """Predict ``y(i0 + k) = sum over m of k^m / m! * d_m``, for m = 0 .. order.

    ``d_0`` is the feature at the last full step ``i0``; ``d_m`` is the change of ``d_{m-1}`` since the full step
    before, divided by the distance of *those two* steps (for every m, also where earlier distances differed: the
    released recursion). Early on fewer differences exist and the order is lower. Exact for features affine in the
    step if ``order >= 1``; not for quadratics at any order, because ``d_1`` is a backward difference and not a
    derivative (`Newton` is exact).

    Args:
        order: highest power, 0 or more; 0 is plain reuse. Official code: 1 for FLUX, 2 for HiDream, 4 for DiT.
        first_difference_step: full steps before this one give no differences. The presets set it to ``warmup - 1``,
            as in the official code; a predictor does not know the gate.

    Raises:
        SettingError: ``order`` or ``first_difference_step`` is negative.

    Memory: ``order + 1`` copies of the feature per site and branch.
    """

    order: int = 1
    first_difference_step: int = 0

    def __post_init__(self) -> None:
        if self.order < 0:
            raise SettingError(f"Taylor(order={self.order}): order must be 0 (plain reuse) or more.")
        if self.first_difference_step < 0:
            raise SettingError(
                f"Taylor(first_difference_step={self.first_difference_step}): must be a step index, 0 or more."
            )

    @property
    def capacity(self) -> int:
        """A difference of order m needs m + 1 full steps."""
        return self.order + 1

    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """Of the recursion's differences, ``k^m / m!`` of each."""
        rungs = ladder(times, self.order, self.first_difference_step)
        return combine(rungs, powers(time - times[0], len(rungs)))

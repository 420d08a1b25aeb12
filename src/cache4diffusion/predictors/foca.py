"""FoCa's predictor: a local slope that relaxes to the slope between full steps.

Source: FoCa, arXiv:2508.16211, eq. 6 to 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from torch import Tensor

from cache4diffusion.errors import SettingError
from cache4diffusion.predictors.base import LinearPredictor
from cache4diffusion.predictors.differences import lagrange
from cache4diffusion.predictors.history import History, Track


@dataclass(frozen=True)
class ForecastCalibrate(LinearPredictor):
    """Forecast by BDF2, calibrate by Heun with the slope ``D`` between the last two full steps, in closed form.

    With unit steps and backward differences for the derivatives the paper's recursion is ``d <- (D + d) / 2``,
    ``y <- y + d``, which sums up to

        ``y(i0 + k) = y(i0) + k D + (d_0 - D) (1 - 2^-k)``

    ``d_0`` is the change into the last full step ``i0``, from the value used at ``i0 - 1`` (predicted, if that step was
    cached). Exact for features affine in the step at any spacing. After two adjacent full steps ``d_0 = D``: `Taylor`
    of order 1. Until there is a second full step: plain reuse, which tells nothing of a slope, so ``d_0 = D`` after it.

    Args:
        variant: ``"paper"`` as above. ``"anchored"`` is ``y(i0) + k/2 (D + d)``, always from the full step, ``d`` being
            the change between the last two values (equal for ``k = 1``). ``"bdf2"`` leaves the calibration out:
            ``y(i0) + k d_0``.

    Raises:
        SettingError: an unknown variant.

    Memory: 3 copies of the feature per site and branch; nothing is written on cached steps.
    """

    variant: Literal["paper", "anchored", "bdf2"] = "paper"

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "anchored", "bdf2"):
            raise SettingError(
                f"ForecastCalibrate(variant={self.variant!r}): variant must be 'paper', 'anchored' or 'bdf2'."
            )

    @property
    def capacity(self) -> int:
        """The last full step, the step before it, and the full step before."""
        return 3

    def update(self, state: History, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None) -> None:
        """Keep what the step before went on with, where it was cached, and then the feature."""
        fits = state.fits(leaves, rows)
        for group, track in _groups(state, rows):
            if fits and len(track.times) > 1 and track.times[0] < time - 1:
                state.write(self.predict(state, time - 1, group), time - 1, group, is_prediction=True)
        state.write(leaves, time, rows)

    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """With full steps only in the history, the local slope is that between them: a line through the last two."""
        return lagrange(times[:2], time)

    def row_weights(self, state: History, track: Track, row: int, time: float) -> list[float]:
        """Of the last full step, the value before it, and the full step before."""
        times = track.times
        full = [i for i, is_prediction in enumerate(track.predicted) if not is_prediction][:2]
        if len(full) < 2:
            return [1.0] + [0.0] * (len(times) - 1)
        now, before = full
        gap, (slope, local) = times[now] - times[before], _slopes(self.variant, time - times[now])
        if before == now + 1:  # nothing was predicted in between: d_0 = D
            slope, local = slope + local, 0.0
        weights = [0.0] * len(times)
        weights[now] += 1 + slope / gap + local
        weights[before] -= slope / gap
        weights[now + 1] -= local
        return weights


@lru_cache(maxsize=64)
def _slopes(variant: str, k: float) -> tuple[float, float]:
    """Coefficients of ``D`` and ``d_0`` in ``y(i0 + k) - y(i0)``."""
    if variant == "paper":
        return k - (1 - 2.0**-k), 1 - 2.0**-k
    return (0.0, k) if variant == "bdf2" else _anchored(k)


def _anchored(k: float) -> tuple[float, float]:
    """The same by the recursion, where every value is made from the full step's."""
    before, now = (0.0, -1.0), (0.0, 0.0)  # of y(i0 - 1) and y(i0)
    for j in range(1, round(k) + 1):
        change = (now[0] - before[0], now[1] - before[1])
        before, now = now, (j / 2 * (1 + change[0]), j / 2 * change[1])
    return now


def _groups(state: History, rows: Sequence[int] | None) -> list[tuple[list[int] | None, Track]]:
    """Rows that share a list of steps, to be written together."""
    if state.shared is not None:
        return [(None if rows is None else list(rows), state.shared)]
    return [([row], state.tracks[row]) for row in (range(len(state.tracks)) if rows is None else rows)]

"""Z-Cache's predictor: extrapolation from the past, blended with extrapolation back from a step ahead.

Source: the idea of Z-Cache (submission 4826 to ICLR 2026), after its switch in the code of FreqCa (Tammytcl/FreqCa).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from cache4diffusion.errors import SettingError
from cache4diffusion.predictors.base import LinearPredictor
from cache4diffusion.predictors.hermite import Hermite
from cache4diffusion.predictors.history import History
from cache4diffusion.predictors.taylor import Taylor


@dataclass(frozen=True)
class TwoSided(LinearPredictor):
    """Predict ``(1 - w) P(i) + w Q(i)`` with ``w = log(|i - A| + 1) / log(|B - A| + 1)`` between two anchors.

    ``B`` is a step computed ahead of its time, at a latent that was itself predicted; ``A`` is the anchor before it.
    ``P`` extrapolates from ``A``, ``Q`` backwards from ``B`` (whose differences are taken against ``A``). The last
    value of a cycle takes ``B``'s place as an anchor, and the next cycle starts from there. Without a step ahead: ``P``
    alone.
    Exact for features affine in the step while both anchors are true; at ``A`` it is ``P``, at ``B`` the value there.

    Args:
        order: of both extrapolations, 0 or more. Code: 2.
        basis: ``"hermite"`` (code) or ``"taylor"``.
        sigma: of the Hermite polynomials. Code: 0.71.
        interval: steps of a cycle, as in the gate.
        ahead: how far it looks, as in the gate.
        first_difference_step: full steps before this one give no differences; see `Taylor`.

    Raises:
        SettingError: a value is out of range.

    Memory: ``order + 2`` copies of the velocity and one latent per run.
    """

    order: int = 2
    basis: Literal["hermite", "taylor"] = "hermite"
    sigma: float = 0.71
    interval: int = 6
    ahead: int = 6
    first_difference_step: int = 0

    def __post_init__(self) -> None:
        if self.basis not in ("hermite", "taylor"):
            raise SettingError(f"TwoSided(basis={self.basis!r}): basis must be 'hermite' or 'taylor'.")
        if not 1 <= self.interval <= self.ahead:
            raise SettingError(f"TwoSided(interval={self.interval}, ahead={self.ahead}): 1 <= interval <= ahead.")
        self._inner()

    def _inner(self) -> LinearPredictor:
        if self.basis == "taylor":
            return Taylor(self.order, self.first_difference_step)
        return Hermite(self.order, self.sigma, self.first_difference_step)

    @property
    def capacity(self) -> int:
        """The anchors of one extrapolation, and the step ahead."""
        return self.order + 2

    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """Of the past alone, or of both sides where the newest snapshot lies ahead."""
        inner = self._inner()
        if times[0] <= time:
            return inner.weights(times[: self.order + 1], time)
        back = inner.weights(times[: self.order + 1], time)
        past = [0.0, *inner.weights(times[1:], time)]
        share = math.log(abs(time - times[1]) + 1) / math.log(abs(times[0] - times[1]) + 1)
        back += [0.0] * (len(past) - len(back))
        return [(1 - share) * p + share * q for p, q in zip(past, back, strict=True)]

    def commit(self, state: History, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None) -> None:
        """The last value of a cycle becomes the anchor in place of the step ahead."""
        track = state.shared
        if track is not None and track.times[0] > time and time == track.times[0] - self.ahead + self.interval:
            track.times[0] = time
            state.write(leaves, time, rows, is_prediction=True)

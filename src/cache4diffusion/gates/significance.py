"""Whether what enters a block has changed by more than noise would: the gate of FastCache (arXiv:2505.20353)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import Entrance, Place, Step

TIMESTEPS = 1000.0  # of the training schedule, by which the released code divides


@dataclass(frozen=True)
class Levels:
    """Where a run is, as a fraction of the training schedule: 1 is noise."""

    known: tuple[float, ...] | None
    num_steps: int

    def at(self, index: int) -> float:
        """``u`` at a step; by progress where no timesteps are known."""
        if self.known is not None and index < len(self.known):
            return self.known[index] / TIMESTEPS
        return 1 - index / self.num_steps


@dataclass(frozen=True)
class Significance:
    """A block is cached while the change of what enters it is no more than a statistical bound.

    With ``H`` what enters, of N tokens and D channels, and ``H_ref`` what entered when the block last ran:
    ``delta = |H - H_ref|_F / |H_ref|_F``; ``stat = sqrt((N D + z sqrt(2 N D)) / (N D))``, the normal approximation of a
    chi-square quantile; ``adapt = b0 + b1 delta + b2 u + b3 u^2`` with the timestep ``u = t / 1000``. Cached iff
    ``delta <= max(threshold, min(stat, adapt))``; never at a threshold of 0.

    ``stat`` is above 1 and so never decides; with the published ``adapt``, which holds half of ``delta`` itself, only
    changes up to about 0.02 pass, so that from there on the bound is the threshold alone.

    Args:
        threshold: 0 or more.
        significance: level of the test, above 0 and below 1; ``z`` is the two-sided normal quantile. Code: z = 1.96.
        adaptive: ``b0 .. b3``. Code: 0.01, 0.5, -0.002, 0.00005.
        is_off_at_zero: whether a threshold of 0 never caches; the released code then still caches small changes.

    Raises:
        SettingError: a value is out of range.
    """

    threshold: float = 0.05
    significance: float = 0.05
    adaptive: tuple[float, ...] = (0.01, 0.5, -0.002, 0.00005)
    is_off_at_zero: bool = True

    def __post_init__(self) -> None:
        if not self.threshold >= 0 or not 0 < self.significance < 1 or len(self.adaptive) != 4:
            raise SettingError(
                f"Significance(threshold={self.threshold}, significance={self.significance}, adaptive={self.adaptive}):"
                " threshold must be 0 or more, significance between 0 and 1, adaptive four numbers."
            )

    @property
    def watch(self) -> Entrance:
        """What enters each block, by its Frobenius norm, and how much that is."""
        return Entrance(norm="l2", with_size=True)

    @property
    def needs_num_steps(self) -> bool:
        """The bound follows the timestep, or progress where timesteps are not known."""
        return True

    def begin(self, num_steps: int | None) -> Levels:
        """By progress."""
        return self.begin_at(Place(num_steps))

    def begin_at(self, place: Place) -> Levels:
        """By the run's timesteps."""
        assert place.num_steps is not None  # the engine refuses to begin without it
        return Levels(place.levels, place.num_steps)

    def bound(self, change: float, size: int, u: float) -> float:
        """The largest change that passes."""
        z = NormalDist().inv_cdf(1 - self.significance / 2)
        stat = math.sqrt((size + z * math.sqrt(2 * size)) / size)
        b0, b1, b2, b3 = self.adaptive
        return max(self.threshold, min(stat, b0 + b1 * change + b2 * u + b3 * u**2))

    def propose(self, state: Levels, step: Step, score: Any) -> bool:
        """Compare with the bound."""
        if score is None or (self.threshold == 0 and self.is_off_at_zero):
            return False
        change, size = score
        return change <= self.bound(change, size, state.at(step.index))

    def commit(self, state: Levels, step: Step, cached: bool, score: Any) -> None:
        """Nothing to remember."""

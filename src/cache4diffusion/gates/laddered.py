"""A block's divergence says how long it may be reused, and one that turns nothing may be left out: QuantCache's rules.

Source: arXiv:2503.06545; no code is out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import Entrance, Step

RATES = (6, 5, 4, 3, 2, 1)  # intervals, from the smallest divergence to the largest
RUNGS = (0.2, 0.4, 0.6, 0.8, 1.0)  # of the threshold, between them


@dataclass
class LadderedState:
    """Where a block is between two full steps."""

    last: int | None = None  # the last full step
    interval: int = 1  # from there to the next
    is_spared: bool = False  # whether that was put off already, because the block turns nothing


@dataclass(frozen=True)
class LadderedEntrance:
    """A block that runs compares what enters with what entered at its last run, and that sets its next interval.

    ``d = mean|x - x_ref| / mean|x_ref|``, divided by the steps between; the interval is 6, 5, 4, 3 or 2 while ``d`` is
    below 0.2, 0.4, 0.6, 0.8 or 1 times ``threshold``, else 1. Each block follows its own; the first interval is 1. A
    block whose output was nearly parallel to its input (``1 - cos < prune``), which is the output of the block before,
    is left out once when its time has come, and measured the next time: its interval is doubled.

    With a threshold of 0.5 and a divergence of 0.35 per step, 9 steps are ``FFccFccFc``.

    Args:
        threshold: 0 or more; 0 never caches, whatever ``prune`` is.
        prune: 0 (none) to 1; largest ``1 - cos`` of a block that is left out.

    Raises:
        SettingError: a value is out of range.
    """

    threshold: float = 0.2
    prune: float = 0.0

    def __post_init__(self) -> None:
        if not self.threshold >= 0 or not 0 <= self.prune <= 1:
            raise SettingError(
                f"LadderedEntrance(threshold={self.threshold}, prune={self.prune}): threshold must be 0 (off) or more, "
                "prune 0 (none) to 1."
            )

    @property
    def never_caches(self) -> bool:
        """Whether it is off."""
        return self.threshold == 0

    @property
    def watch(self) -> Entrance:
        """What enters each block; beside it how far its last run turned that, where somebody asks."""
        return Entrance(with_angle=self.prune > 0)

    @property
    def needs_num_steps(self) -> bool:
        """Never."""
        return False

    def begin(self, num_steps: int | None) -> LadderedState:
        """Before the first step."""
        return LadderedState()

    def interval_for(self, divergence: float) -> int:
        """How long a divergence per step allows reuse."""
        return next((rate for rate, rung in zip(RATES, RUNGS, strict=False) if divergence < rung * self.threshold), 1)

    def _is_left_out(self, state: LadderedState, score: Any) -> bool:
        if self.prune == 0 or state.is_spared:
            return False
        angle = score[1]
        return angle is not None and angle < self.prune

    def propose(self, state: LadderedState, step: Step, score: Any) -> bool:
        """Cached until the interval is over, and once more if the block turns nothing."""
        if state.last is None or score is None or self.never_caches:
            return False
        return step.index - state.last < state.interval or self._is_left_out(state, score)

    def commit(self, state: LadderedState, step: Step, cached: bool, score: Any) -> None:
        """A run sets the next interval; a block that is left out doubles its own."""
        if cached:
            if step.index - (state.last or 0) >= state.interval:
                state.interval, state.is_spared = 2 * state.interval, True
            return
        change = score[0] if self.prune > 0 and score is not None else score
        state.interval = 1
        if change is not None and state.last is not None and step.index > state.last:
            state.interval = self.interval_for(change / (step.index - state.last))
        state.last, state.is_spared = step.index, False

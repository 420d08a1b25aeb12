"""The next interval follows from the last change: the gate of AdaCache (arXiv:2411.02397)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import Outputs, Step


@dataclass
class AdaptiveState:
    """Where a unit is between two full steps."""

    interval: int = 1  # from the last full step to the next
    last: int | None = None  # the last two full steps
    before: int | None = None
    is_fresh: bool = False  # whether the score of the last full step was not used yet
    motion: float = 1.0  # at the last measurement


@dataclass(frozen=True)
class AdaptiveInterval:
    """A full step measures how fast a block's residual changes, and a codebook says how long it may be reused.

    ``d = score / tau`` with ``tau`` the distance of the last two full steps; the next interval is ``rates[j]`` for the
    first ``j`` with ``d < thresholds[j]``, else the last rate. The first interval is 1, and so is the one behind a full
    step that had nothing to be compared with (another conditioning, a step that was recomputed). A codebook of all 3
    over 12 steps is ``FFccFccFccFc``.

    With ``motion`` the score is a pair, and ``d`` is multiplied by ``m + |gain * (m - m_before) / tau|``, where ``m =
    (motion / scale) ** power`` within the window and 1 outside: what moves is cached for shorter.

    Args:
        thresholds: rising, one less than rates.
        rates: intervals, 1 or more, one for each range between the thresholds.
        block: the block that is measured: its place in the stack, a fraction of the depth.
        motion: whether motion shortens the intervals.
        scale, power, gain: see above. Code: 0.385, 8, 10.
        window: steps (counted from 1, as fractions of the run) between which motion counts. Code: 4 to 26 of 30.

    Raises:
        SettingError: a value is out of range.
    """

    thresholds: tuple[float, ...] = (0.08, 0.16, 0.24, 0.32, 0.40)
    rates: tuple[int, ...] = (6, 5, 4, 3, 2, 1)
    block: float = 0.5
    motion: bool = False
    scale: float = 0.385
    power: float = 8.0
    gain: float = 10.0
    window: tuple[float, ...] = (4 / 30, 26 / 30)

    def __post_init__(self) -> None:
        is_rising = all(a < b for a, b in pairwise(self.thresholds))
        if len(self.rates) != len(self.thresholds) + 1 or not is_rising or min(self.rates) < 1:
            raise SettingError(
                f"AdaptiveInterval(thresholds={self.thresholds}, rates={self.rates}): thresholds must rise, and there "
                "must be one rate more than thresholds, each 1 or more."
            )
        if not 0 <= self.block <= 1 or not self.scale > 0 or not self.power > 0 or not self.gain >= 0:
            raise SettingError(
                f"AdaptiveInterval(block={self.block}, scale={self.scale}, power={self.power}, gain={self.gain}): "
                "block must be 0 to 1, scale and power above 0, gain 0 or more."
            )
        if len(self.window) != 2 or not 0 <= self.window[0] <= self.window[1] <= 1:
            raise SettingError(f"AdaptiveInterval(window={self.window}): give two fractions of the run, rising.")

    @property
    def never_caches(self) -> bool:
        """Whether every interval is 1."""
        return max(self.rates) == 1

    @property
    def watch(self) -> Outputs:
        """The residual of one block."""
        return Outputs(blocks=self.block, of="residual", frames=self.motion)

    @property
    def needs_num_steps(self) -> bool:
        """The window in which motion counts is a part of the run."""
        return self.motion

    def begin(self, num_steps: int | None) -> AdaptiveState:
        """Before the first step."""
        return AdaptiveState()

    def _measured(self, state: AdaptiveState, step: Step, score: Any) -> tuple[int, float]:
        """The interval from the last full step on, and the motion there."""
        if not state.is_fresh:
            return state.interval, state.motion
        if score is None or state.last is None or state.before is None:
            return 1, state.motion  # nothing was there to compare with: as at the beginning
        tau = state.last - state.before
        change, factor = score if isinstance(score, tuple) else (score, 1.0)
        change, motion = change / tau, 1.0
        if self.motion:
            assert step.num_steps is not None
            low, high = (fraction * step.num_steps for fraction in self.window)
            if low <= state.last + 1 <= high:
                motion = (factor / self.scale) ** self.power
            change *= motion + abs(self.gain * (motion - state.motion) / tau)
        place = next((j for j, limit in enumerate(self.thresholds) if change < limit), len(self.thresholds))
        return self.rates[place], motion

    def propose(self, state: AdaptiveState, step: Step, score: Any) -> bool:
        """Cached until the interval is over."""
        return state.last is not None and step.index - state.last < self._measured(state, step, score)[0]

    def commit(self, state: AdaptiveState, step: Step, cached: bool, score: Any) -> None:
        """Take the measurement in; a full step makes a new one."""
        state.interval, state.motion = self._measured(state, step, score)
        state.is_fresh = False
        if not cached:
            state.before, state.last, state.is_fresh = state.last, step.index, True

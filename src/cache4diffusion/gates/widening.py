"""Full steps at growing distances: the gate of Spectrum (arXiv:2603.01623)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import StaticGate, Step


@dataclass
class WideningState:
    """How far the interval has grown, and the cached steps since the last full one."""

    window: float
    run: int = 0


@dataclass(frozen=True)
class WideningInterval(StaticGate):
    """After ``warmup`` full steps, every ``floor(window)``-th step is full, and each such step widens the window.

    ``WideningInterval(warmup=3, window=2.0, growth=1.0)`` over 15 steps is ``FFFcFccFcccFccc``.

    Args:
        warmup: first steps that are always full, 1 or more. Published: 5.
        window: first distance of full steps, 1 or more. Published: 2.
        growth: what every full step adds to it, 0 or more. Published: 0.75 (14 full steps of 50) and 3 (10 of 50).
            ``window=1, growth=0`` never caches.

    Raises:
        SettingError: a value is out of range.
    """

    warmup: int = 5
    window: float = 2.0
    growth: float = 0.75

    def __post_init__(self) -> None:
        if self.warmup < 1:
            raise SettingError(f"WideningInterval(warmup={self.warmup}): warmup must be 1 or more.")
        if self.window < 1:
            raise SettingError(f"WideningInterval(window={self.window}): window must be 1 (every step full) or more.")
        if self.growth < 0:
            raise SettingError(f"WideningInterval(growth={self.growth}): growth must be 0 or more.")

    @property
    def never_caches(self) -> bool:
        """Whether every step is full."""
        return math.floor(self.window) == 1 and self.growth == 0

    def begin(self, num_steps: int | None) -> WideningState:
        """The first window."""
        return WideningState(self.window)

    def propose(self, state: WideningState, step: Step, score: float | None) -> bool:
        """Cached until the window is through."""
        return step.index >= self.warmup and (state.run + 1) % math.floor(state.window) != 0

    def commit(self, state: Any, step: Step, cached: bool, score: float | None) -> None:
        """Count the run; a full step after the warm-up widens the window."""
        state.run = state.run + 1 if cached else 0
        if not cached and step.index >= self.warmup:
            state.window = round(state.window + self.growth, 3)

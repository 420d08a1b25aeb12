"""Accumulated error of a magnitude law: the gate of MagCache (arXiv:2506.09045)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import Place, StaticGate, Step


def resampled(ratios: tuple[float, ...], num_steps: int, how: Literal["law", "nearest"]) -> tuple[float, ...]:
    """The ratios for a run of another length; the first stays 1.

    ``"nearest"`` takes the ratio of the nearest step, as the released code does, although a shorter step changes less.
    ``"law"`` keeps the law itself: the magnitude relative to the first step (the product of the ratios so far) is
    interpolated geometrically, so that a run of twice the steps has square roots for ratios.
    """
    if len(ratios) == num_steps or num_steps == 1:
        return ratios[:num_steps]
    scale = (len(ratios) - 1) / (num_steps - 1)
    if how == "nearest":
        return tuple(ratios[round(i * scale)] for i in range(num_steps))
    logs = [0.0]
    for ratio in ratios[1:]:
        logs.append(logs[-1] + math.log(ratio))

    def log_magnitude(place: float) -> float:
        low = min(int(place), len(logs) - 2)
        return logs[low] + (place - low) * (logs[low + 1] - logs[low])

    places = [log_magnitude(i * scale) for i in range(num_steps)]
    return (1.0, *[math.exp(b - a) for a, b in pairwise(places)])


@dataclass
class MagnitudeState:
    """What piled up since the last full step."""

    ratios: tuple[float, ...]
    scale: float = 1.0  # magnitude of the residual, relative to the one that is cached
    error: float = 0.0
    run: int = 0


@dataclass(frozen=True)
class MagnitudeError(StaticGate):
    """Cached while the error that a law of the residual's magnitude predicts stays below a threshold.

    ``A = product of ratios``, ``error += |1 - A|``, ``run += 1`` on every step after the retained ones; cached while
    ``error < threshold`` and ``run <= max_run``; a full step sets A = 1, error = 0, run = 0. Where all ratios are 1 and
    the threshold is above 0, the strip after the retained steps is ``cccFcccF...`` for ``max_run = 3``. Nothing is
    watched: the schedule is known before sampling. Needs the length of the run.

    Args:
        ratios: mean ratio of the residual's norm to that of the step before, by step; the first is not used.
        threshold: 0 or more; 0 never caches.
        max_run: most cached steps in a row, 0 or more.
        retention: the first ``int(retention * num_steps + 0.5)`` steps are full, a fraction.
        resample: how a table of another length is brought to this run's; see `resampled`.
        is_inclusive: cached also where the error equals the threshold, as in the released code.
        branches: ratios of single CFG branches, by name, that take the place of ``ratios``.
        exempt: steps, counted in the table's own length, that are always full.

    Raises:
        SettingError: a value is out of range.
    """

    ratios: tuple[float, ...] = (1.0, 1.0)
    threshold: float = 0.06
    max_run: int = 3
    retention: float = 0.2
    resample: Literal["law", "nearest"] = "law"
    is_inclusive: bool = False
    exempt: tuple[int, ...] = ()
    branches: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        every = [ratio for ratios in (self.ratios, *self.branches.values()) for ratio in ratios]
        is_odd = any(len(ratios) != len(self.ratios) for ratios in self.branches.values())
        if len(self.ratios) < 2 or is_odd or not all(ratio > 0 and math.isfinite(ratio) for ratio in every):
            raise SettingError(
                f"MagnitudeError(ratios={self.ratios}): give two or more numbers above 0, one per step of a run."
            )
        if not self.threshold >= 0 or self.max_run < 0 or not 0 <= self.retention <= 1:
            raise SettingError(
                f"MagnitudeError(threshold={self.threshold}, max_run={self.max_run}, retention={self.retention}): "
                "threshold must be 0 (off) or more, max_run 0 or more, retention 0 to 1."
            )
        if self.resample not in ("law", "nearest"):
            raise SettingError(f"MagnitudeError(resample={self.resample!r}): use 'law' or 'nearest'.")

    @property
    def needs_num_steps(self) -> bool:
        """Ratios belong to steps of a run of known length."""
        return True

    def begin(self, num_steps: int | None) -> MagnitudeState:
        """The ratios of this run."""
        return self.begin_at(Place(num_steps))

    def begin_at(self, place: Place) -> MagnitudeState:
        """The ratios of this run and branch."""
        assert place.num_steps is not None  # the engine refuses to begin without it
        ratios = self.branches.get(place.branch, self.ratios)
        return MagnitudeState(resampled(ratios, place.num_steps, self.resample))

    def _advanced(self, state: MagnitudeState, step: Step) -> tuple[float, float]:
        scale = state.scale * state.ratios[step.index]
        return scale, state.error + abs(1 - scale)

    def propose(self, state: MagnitudeState, step: Step, score: float | None) -> bool:
        """Compare the error, this step's included, with the threshold."""
        assert step.num_steps is not None
        if self.threshold == 0 or step.index < max(int(self.retention * step.num_steps + 0.5), 1):
            return False
        if step.index >= len(state.ratios):
            return False
        place = step.index * (len(self.ratios) - 1) / max(step.num_steps - 1, 1)
        if round(place) in self.exempt or state.run + 1 > self.max_run:
            return False
        error = self._advanced(state, step)[1]
        return error <= self.threshold if self.is_inclusive else error < self.threshold

    def commit(self, state: MagnitudeState, step: Step, cached: bool, score: float | None) -> None:
        """A full step empties everything, also a forced one."""
        if cached:
            state.scale, state.error = self._advanced(state, step)
            state.run += 1
        else:
            state.scale, state.error, state.run = 1.0, 0.0, 0

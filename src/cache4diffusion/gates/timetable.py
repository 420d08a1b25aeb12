"""Schedules that were made for certain noise levels, one for each of several decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from cache4diffusion.errors import CalibrationError
from cache4diffusion.gates.base import PartInput, Place, StaticGate, Step
from cache4diffusion.gates.schedule import Schedule


@dataclass(frozen=True)
class Timetable(StaticGate):
    """Full at the steps listed for the decision, cached elsewhere. ``Timetable({"": (0, 1, 5)})`` over 7 steps is
    ``FFcccFc``.

    Each list belongs to noise levels. A run with other levels is an error, or, with ``resample``, a full step becomes
    the run's step of the nearest level: the distances in noise over which features are reused stay as they are.

    Args:
        full_steps: by the name of the decision (a kind of part, a block ...; ``""`` where a site takes only one), the
            indices of its full steps, rising from 0. A decision that is not named is always full.
        num_steps: length of the run they were made for. None accepts any.
        levels: the scheduler's timestep at each of its steps; None where it is not known.
        resample: whether a run of other levels is accepted.

    Raises:
        SettingError: a list is empty, not rising, does not begin with 0 or goes beyond the run.
    """

    full_steps: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"": (0,)})
    num_steps: int | None = None
    levels: tuple[float, ...] | None = None
    resample: bool = False

    def __post_init__(self) -> None:
        for steps in self.full_steps.values():
            Schedule(steps, self.num_steps)

    @property
    def needs_num_steps(self) -> bool:
        """To see whether the lists fit."""
        return self.num_steps is not None

    @property
    def never_caches(self) -> bool:
        """Whether every step is full."""
        return self.num_steps is not None and all(len(steps) == self.num_steps for steps in self.full_steps.values())

    def begin(self, num_steps: int | None) -> frozenset[int] | None:
        """The full steps of a run of this length; None if all are."""
        return self.begin_at(Place(num_steps))

    def begin_at(self, place: Place) -> frozenset[int] | None:
        """The full steps of this decision in this run; None if all are.

        Raises:
            CalibrationError: the run has other noise levels.
        """
        steps = self.full_steps.get(place.decision)
        if self.num_steps is None:
            return None if steps is None else frozenset(steps)
        positions = positions_of(place, self.num_steps, self.levels, resample=self.resample)
        if steps is None or len(steps) == self.num_steps:  # full everywhere, also where a longer run has steps between
            return None
        return frozenset(nearest(positions, step) for step in steps)

    def propose(self, state: frozenset[int] | None, step: Step, score: float | None) -> bool:
        """Cached unless listed."""
        return state is not None and step.index not in state


def positions_of(
    place: Place, num_steps: int, levels: Sequence[float] | None, *, resample: bool, has_option: bool = True
) -> list[float]:
    """Where each step of a run lies among the steps that something was measured at.

    Args:
        place: the run.
        num_steps: how many steps it was measured at.
        levels: their noise levels; None where they are not known.
        resample: whether to interpolate; by the noise level where both sides' levels are known, else by progress.
        has_option: whether the user could ask for that.

    Raises:
        CalibrationError: the run differs and ``resample`` is off.
    """
    count = place.num_steps
    assert count is not None  # the engine refuses to begin without it
    here = place.levels if place.levels is not None and len(place.levels) == count else None
    are_known = here is not None and levels is not None
    if count == num_steps and (not are_known or _are_close(here, levels)):  # type: ignore[arg-type]
        return [float(i) for i in range(count)]
    if not resample:
        way_out = ", or give resample=True to go by the nearest noise levels" if has_option else ""
        raise CalibrationError(
            f"This was calibrated for {_words(num_steps, levels)}, and the run has {_words(count, here)}. "
            f"Calibrate for such runs{way_out}."
        )
    if not are_known:
        return [i * (num_steps - 1) / max(count - 1, 1) for i in range(count)]
    return [_position(level, levels) for level in here]  # type: ignore[union-attr, arg-type]


def nearest_steps(watch: PartInput, place: Place) -> list[int] | None:
    """For each step of a run, the one whose weights it takes; None: its own.

    Raises:
        CalibrationError: the run has other noise levels.
    """
    if watch.num_steps is None:
        return None
    positions = positions_of(place, watch.num_steps, watch.levels, resample=watch.resample)
    return [round(position) for position in positions]


def nearest(positions: Sequence[float], step: int) -> int:
    """The step of the run that lies nearest to a measured one; the first of equals. Step 0 is always the first."""
    if step == 0:
        return 0
    return min(range(len(positions)), key=lambda i: (abs(positions[i] - step), i))


def _are_close(a: Sequence[float], b: Sequence[float]) -> bool:
    span = max(abs(b[0] - b[-1]), abs(b[0]), 1e-12)
    return all(abs(x - y) <= 1e-3 * span for x, y in zip(a, b, strict=True))


def _position(level: float, levels: Sequence[float]) -> float:
    """Where a level lies among falling ones, in steps; the ends for what is beyond them."""
    if level >= levels[0]:
        return 0.0
    for i, (high, low) in enumerate(pairwise(levels)):
        if level >= low:
            return i + (high - level) / (high - low)
    return float(len(levels) - 1)


def _words(count: int, levels: Sequence[float] | None) -> str:
    ends = "" if levels is None else f" at noise levels {levels[0]:.6g} to {levels[-1]:.6g}"
    return f"{count} steps{ends}"

"""A schedule given step by step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import StaticGate, Step


@dataclass(frozen=True)
class Schedule(StaticGate):
    """Full at the listed steps, cached elsewhere. ``Schedule((0, 1, 5))`` over 7 steps is ``FFcccFc``.

    Args:
        full_steps: indices of the full steps, rising; must begin with 0, because nothing can be predicted before.
        num_steps: the run length the list was made for; a run of another length is an error. None accepts any.

    Raises:
        SettingError: the list is empty, not rising, or does not begin with 0.
    """

    full_steps: tuple[int, ...] = (0,)
    num_steps: int | None = None

    def __post_init__(self) -> None:
        steps = self.full_steps
        if not steps or steps[0] != 0 or any(b <= a for a, b in pairwise(steps)):
            raise SettingError(f"Schedule(full_steps={steps}): the steps must rise and begin with 0.")
        if self.num_steps is not None and steps[-1] >= self.num_steps:
            raise SettingError(f"Schedule(full_steps={steps}): step {steps[-1]} is beyond {self.num_steps} steps.")

    @property
    def needs_num_steps(self) -> bool:
        """Only to check that the list was made for this run."""
        return self.num_steps is not None

    def begin(self, num_steps: int | None) -> Any:
        """Check the run's length."""
        if self.num_steps is not None and num_steps != self.num_steps:
            raise SettingError(f"This schedule was made for {self.num_steps} steps; the run has {num_steps}.")
        return None

    def propose(self, state: Any, step: Step, score: float | None) -> bool:
        """Cached unless listed."""
        return step.index not in self.full_steps


@dataclass(frozen=True)
class ScaledSchedule(StaticGate):
    """A schedule made for one run length, stretched to the run's. Needs the length of the run.

    Step ``i`` of the list becomes ``round(i * num_steps / made_for)``. ``ScaledSchedule((0, 1, 5), made_for=10)`` over
    20 steps is full at 0, 2 and 10.

    Args:
        full_steps: indices of the full steps, rising from 0; None computes every step.
        made_for: the run length the list was made for.

    Raises:
        SettingError: the list is empty, not rising, does not begin with 0 or goes beyond ``made_for``.
    """

    full_steps: tuple[int, ...] | None = (0,)
    made_for: int = 50

    def __post_init__(self) -> None:
        if self.full_steps is not None:
            Schedule(self.full_steps, self.made_for)

    @property
    def needs_num_steps(self) -> bool:
        """To be stretched."""
        return self.full_steps is not None

    @property
    def never_caches(self) -> bool:
        """Whether every step is full."""
        return self.full_steps is None

    def propose(self, state: Any, step: Step, score: float | None) -> bool:
        """Cached unless listed."""
        if self.full_steps is None:
            return False
        assert step.num_steps is not None  # the engine refuses to begin without it
        return all(round(i * step.num_steps / self.made_for) != step.index for i in self.full_steps)

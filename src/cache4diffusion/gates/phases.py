"""Full steps at two distances, one early and one late in the run: TokenCache's schedule (arXiv:2409.18523)."""

from __future__ import annotations

from dataclasses import dataclass

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import StaticGate, Step


@dataclass(frozen=True)
class TwoPhase(StaticGate):
    """A full step, then ``early - 1`` cached ones, in turn; from ``switch`` of the run on, ``late - 1`` cached ones.

    Each full step says how far the next one is, by the phase that it lies in: ``TwoPhase(4, 2, 0.5)`` over 12 steps is
    ``FcccFcccFcFc``. Needs the length of the run, unless both distances are the same.

    Args:
        early, late: distance of two full steps in each phase, 1 or more; 1 never caches.
        switch: where the late phase begins, as a fraction of the steps, 0 to 1.

    Raises:
        SettingError: a value is out of range.
    """

    early: int = 4
    late: int = 2
    switch: float = 0.5

    def __post_init__(self) -> None:
        if min(self.early, self.late) < 1 or not 0 <= self.switch <= 1:
            raise SettingError(
                f"TwoPhase(early={self.early}, late={self.late}, switch={self.switch}): distances must be 1 (never "
                "cached) or more, switch a fraction of the steps, 0 to 1."
            )

    @property
    def needs_num_steps(self) -> bool:
        """To know where the phases meet."""
        return self.early != self.late

    @property
    def never_caches(self) -> bool:
        """Whether every step is full."""
        return self.early == self.late == 1

    def _distance(self, index: int, num_steps: int | None) -> int:
        return self.early if num_steps is None or index < self.switch * num_steps else self.late

    def propose(self, state: object, step: Step, score: float | None) -> bool:
        """Cached unless the turns, counted from the first step, come to this one."""
        full = 0
        while full < step.index:
            full += self._distance(full, step.num_steps if self.needs_num_steps else None)
        return full != step.index

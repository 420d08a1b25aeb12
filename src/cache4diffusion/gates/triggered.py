"""Reuse from the first quiet step on: the gate of BWCache (arXiv:2509.13789)."""

from __future__ import annotations

from dataclasses import dataclass

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import Outputs, Step


@dataclass
class TriggeredState:
    """Whether reuse has begun."""

    until: int | None = None  # the step at which it ends; None before it begins
    run: int = 0  # cached steps in a row


@dataclass(frozen=True)
class TriggeredInterval:
    """Full until two neighbouring steps differ by less than a threshold; then reuse, refreshed now and then.

    ``score < threshold`` at a step triggers: from the next one on, ``max(int(reuse * num_steps), 1)`` steps are cached
    and one is full, again and again, through the first half of the steps that remain. The second half is full. With
    ``reuse = 0.1``, triggered by step 3 of 20: ``FFFFccFccFccFFFFFFFF``. Needs the length of the run.

    Args:
        threshold: 0 or more; 0 never caches.
        reuse: steps cached in a row, as a fraction of the run.
        tail: share of the steps that remain at the trigger which are full at the end.

    Raises:
        SettingError: a value is out of range.
    """

    threshold: float = 0.15
    reuse: float = 0.1
    tail: float = 0.5

    def __post_init__(self) -> None:
        if not self.threshold >= 0 or not 0 <= self.reuse <= 1 or not 0 <= self.tail <= 1:
            raise SettingError(
                f"TriggeredInterval(threshold={self.threshold}, reuse={self.reuse}, tail={self.tail}): threshold must "
                "be 0 (off) or more, reuse and tail 0 to 1."
            )

    @property
    def watch(self) -> Outputs:
        """What leaves every block, on average."""
        return Outputs()

    @property
    def needs_num_steps(self) -> bool:
        """How many steps remain must be known."""
        return True

    def begin(self, num_steps: int | None) -> TriggeredState:
        """Not triggered."""
        return TriggeredState()

    def _until(self, state: TriggeredState, step: Step, score: float | None) -> int | None:
        """The step at which reuse ends, if it has begun."""
        assert step.num_steps is not None  # the engine refuses to begin without it
        if state.until is None and score is not None and self.threshold > 0 and score < self.threshold:
            remain = step.num_steps - step.index
            return step.num_steps - int(self.tail * remain)
        return state.until

    def propose(self, state: TriggeredState, step: Step, score: float | None) -> bool:
        """Cached once triggered, for so many steps in a row, until the tail begins."""
        until = self._until(state, step, score)
        assert step.num_steps is not None
        return until is not None and step.index < until and state.run < max(int(self.reuse * step.num_steps), 1)

    def is_sated(self, state: TriggeredState) -> bool:
        """Once triggered nothing is compared any more."""
        return state.until is not None

    def commit(self, state: TriggeredState, step: Step, cached: bool, score: float | None) -> None:
        """Note whether this triggers, and how long the run of cached steps is."""
        state.until = self._until(state, step, score)
        state.run = state.run + 1 if cached else 0

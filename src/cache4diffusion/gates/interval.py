"""Full steps at a fixed distance: the gate of FORA (arXiv:2407.01425) and TaylorSeer (arXiv:2503.06923)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import StaticGate, Step


@dataclass(frozen=True)
class FixedInterval(StaticGate):
    """A full step, then ``interval - 1`` cached ones, again and again.

    Three anchors, because published codes differ by where they start to count (F full, c cached; 12 steps):

    - ``"first"``: full where ``step % interval == 0``. ``FixedInterval(3)`` is ``FccFccFccFcc``.
    - ``"last"``: counted back from the last step, the first one full as well; FORA's code.
      ``FixedInterval(3, anchor="last")`` is ``FcFccFccFccF``. Needs the length of the run.
    - ``"warmup"``: the first ``warmup`` steps full, then a counter that starts at their end; TaylorSeer's code.
      ``FixedInterval(3, anchor="warmup", warmup=3)`` is ``FFFccFccFccF``.

    Args:
        interval: distance of two full steps, 1 or more; 1 never caches.
        anchor: see above.
        warmup: first steps that are always full, 0 or more. With ``"first"`` and ``"last"`` they do not shift the
            schedule.
        offset: with ``"first"``, the step the count begins at: full where ``(step - offset) % interval == 0``.

    Raises:
        SettingError: a value is out of range.
    """

    interval: int = 5
    anchor: Literal["first", "last", "warmup"] = "first"
    warmup: int = 0
    offset: int = 0

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise SettingError(f"FixedInterval(interval={self.interval}): interval must be 1 (never cached) or more.")
        if self.warmup < 0:
            raise SettingError(f"FixedInterval(warmup={self.warmup}): warmup must be 0 or more.")
        if self.offset < 0 or (self.offset and self.anchor != "first"):
            raise SettingError(f"FixedInterval(offset={self.offset}): offset must be 0 or more, with anchor='first'.")
        if self.anchor not in ("first", "last", "warmup"):
            raise SettingError(f"FixedInterval(anchor={self.anchor!r}): anchor must be 'first', 'last' or 'warmup'.")

    @property
    def needs_num_steps(self) -> bool:
        """Only when counting back from the last step."""
        return self.anchor == "last"

    def propose(self, state: Any, step: Step, score: float | None) -> bool:
        """Cached unless the schedule says full."""
        i = step.index
        if i < max(self.warmup, 1) or self.interval == 1:
            return False
        if self.anchor == "last":
            assert step.num_steps is not None  # the engine refuses to begin without it
            return (step.num_steps - 1 - i) % self.interval != 0
        if self.anchor == "warmup":
            return (i - max(self.warmup, 1) + 1) % self.interval != 0
        return (i - self.offset) % self.interval != 0

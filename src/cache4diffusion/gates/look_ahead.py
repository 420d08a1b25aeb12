"""Cycles that look ahead: the schedule of Z-Cache, as in the code of FreqCa (Tammytcl/FreqCa)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import StaticGate, Step


class Planned(NamedTuple):
    """A step's place in the plan: whether it is full, and which step it then computes if not its own."""

    is_full: bool
    target: int | None = None


@dataclass(frozen=True)
class LookAhead(StaticGate):
    """One full step per cycle of ``interval`` steps, computed not where the cycle stands but ``ahead - 1`` steps on.

    After ``warmup + 1`` full steps a cycle begins; the first one has its first step behind it. The last steps, from
    where the next look would leave the run, have an interval without looking ahead. Needs the length of the run.
    ``LookAhead(warmup=3, interval=3, ahead=3)`` over 20 steps is ``FFFFAcAccAccAccccFcc``; ``A`` is a full step that
    looks ahead.

    Args:
        warmup: first steps that are always full, 1 or more (one more follows).
        interval: steps of a cycle; 1 never caches.
        ahead: how far a cycle looks, its first step included; ``interval`` or more.

    Raises:
        SettingError: a value is out of range.
    """

    warmup: int = 3
    interval: int = 6
    ahead: int = 6

    def __post_init__(self) -> None:
        if self.warmup < 1 or self.interval < 1:
            raise SettingError(f"LookAhead(warmup={self.warmup}, interval={self.interval}): both must be 1 or more.")
        if self.ahead < self.interval:
            raise SettingError(f"LookAhead(ahead={self.ahead}): ahead must be interval={self.interval} or more.")

    @property
    def needs_num_steps(self) -> bool:
        """To end the cycles in time."""
        return self.interval > 1

    def propose(self, state: Any, step: Step, score: float | None) -> bool:
        """Cached unless the plan says full."""
        return not self._planned(step).is_full

    def target(self, step: Step) -> int | None:
        """Which step a full step computes instead of its own; None for its own."""
        return self._planned(step).target

    def _planned(self, step: Step) -> Planned:
        if self.interval == 1:
            return Planned(True)
        assert step.num_steps is not None  # the engine refuses to begin without it
        plan = _plan(self.warmup, self.interval, self.ahead, step.num_steps)
        return plan[step.index] if step.index < len(plan) else Planned(True)


@lru_cache(maxsize=16)
def _plan(warmup: int, interval: int, ahead: int, num_steps: int) -> list[Planned]:
    """What is done at every step of a run."""
    plan = [Planned(True)] * warmup
    while len(plan) + ahead < num_steps - 1 - ahead:
        start = len(plan)
        plan += [Planned(True)] if start == warmup else []
        plan.append(Planned(True, start + ahead - 1))
        plan += [Planned(False)] * (start + interval - len(plan))
    counter = 0
    while len(plan) < num_steps:
        counter = 0 if counter == interval - 1 else counter + 1
        plan.append(Planned(counter == 0))
    return plan[:num_steps]

"""An interval that varies over the run: ToCa's full steps on DiT and PixArt (arXiv:2410.05317, released code)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import StaticGate, Step


def modulated_steps(num_steps: int, interval: int, rule: str) -> tuple[int, ...]:
    """The full steps of a run of ``num_steps``, by a rule of `ModulatedInterval`."""
    full, distance = [0], interval
    for index in range(num_steps):
        count = num_steps - 1 - index if rule == "dit" else index
        if index > 0 and count % distance != 0:
            continue
        progress = count / num_steps
        distance = round(interval / (1.4 - 0.8 * progress if rule == "dit" else 0.8 + 0.4 * progress))
        if rule == "dit" and int(0.2 * num_steps) <= count < int(0.4 * num_steps):
            distance = 2
        if index > 0 and count % distance == 0:
            full.append(index)
    return tuple(full)


@dataclass(frozen=True)
class ModulatedInterval(StaticGate):
    """Full where a count is a multiple of ``n``, and ``n``, near ``interval``, is set anew at each full step.

    - ``"dit"`` counts ``s`` down from ``T - 1``: ``n = round(interval / (1.4 - 0.8 s / T))``, but 2 for ``s`` from
      ``floor(0.2 T)`` up to, not with, ``floor(0.4 T)``. ``ModulatedInterval(3)`` over 20 steps is
      ``FccccccFccFccFcFcFcF``.
    - ``"pixart"`` counts ``s`` up: ``n = round(interval / (0.8 + 0.4 s / T))``.
      ``ModulatedInterval(3, "pixart")`` over 20 steps is ``FcccccFccFccFccFccFc``.

    The first step is full. The released code asks in every block, so that where the new ``n`` disagrees with the old
    one only the first block is computed; such a step is cached here, and ``n`` is set anew as there. Needs the length
    of the run.

    Args:
        interval: mean distance of two full steps, 1 or more; 1 never caches.
        rule: see above.

    Raises:
        SettingError: a value is out of range.
    """

    interval: int = 3
    rule: Literal["dit", "pixart"] = "dit"

    def __post_init__(self) -> None:
        if self.interval < 1 or self.rule not in ("dit", "pixart"):
            raise SettingError(
                f"ModulatedInterval(interval={self.interval}, rule={self.rule!r}): interval must be 1 (never cached) "
                "or more, rule 'dit' or 'pixart'."
            )

    @property
    def needs_num_steps(self) -> bool:
        """Progress is a fraction of the run."""
        return self.interval > 1

    def begin(self, num_steps: int | None) -> tuple[int, ...]:
        """The full steps."""
        if self.interval == 1:
            return ()
        assert num_steps is not None
        return modulated_steps(num_steps, self.interval, self.rule)

    def propose(self, state: tuple[int, ...], step: Step, score: float | None) -> bool:
        """Cached unless listed."""
        return self.interval > 1 and step.index not in state

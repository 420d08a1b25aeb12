"""Full steps that are denser around one step: the non-uniform schedule of DeepCache (arXiv:2312.00858)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import StaticGate, Step


def quadratic_steps(num_steps: int, count: int, center: float, power: float) -> tuple[int, ...]:
    """The released code's list of ``count`` full steps.

    ``count + 1`` points are spread evenly between ``(-center)^(1/p)`` and ``(num_steps - center)^(1/p)`` and raised to
    ``p`` again. The first base is negative, so its root is complex and the points lie on a straight line in the complex
    plane; the real part is truncated. The power is lowered by 0.02 until ``count`` different steps come out.

    Raises:
        SettingError: no power above 1 gives that many different steps.
    """
    while power > 1:
        low, high = complex(-center) ** (1 / power), complex(num_steps - center) ** (1 / power)
        points = [low + (high - low) * i / count for i in range(count + 1)]
        steps = sorted({math.trunc((point**power).real) for point in points})
        inner = [step + math.trunc(center) for step in steps[1:-1]]
        if len(inner) + 1 == count:
            return (0, *inner)
        power -= 0.02
    raise SettingError(
        f"Quadratic(center={center}): no list of {count} different full steps for {num_steps} steps; use another "
        "center or a shorter interval."
    )


@dataclass(frozen=True)
class Quadratic(StaticGate):
    """``ceil(num_steps / interval)`` full steps, denser around the step ``center``. Needs the length of the run.

    Args:
        interval: mean distance of two full steps, 2 or more.
        center: step around which they gather.
        power: how strongly, above 1.

    Raises:
        SettingError: a value is out of range, or (at the start of a run) no such list exists.
    """

    interval: int = 5
    center: float = 15.0
    power: float = 1.4

    def __post_init__(self) -> None:
        if self.interval < 2 or self.center < 0 or not self.power > 1:
            raise SettingError(
                f"Quadratic(interval={self.interval}, center={self.center}, power={self.power}): interval must be 2 or "
                "more, center 0 or more, power above 1."
            )

    @property
    def needs_num_steps(self) -> bool:
        """The list is made for one length."""
        return True

    def begin(self, num_steps: int | None) -> tuple[int, ...]:
        """The list of full steps."""
        assert num_steps is not None
        return quadratic_steps(num_steps, math.ceil(num_steps / self.interval), self.center, self.power)

    def propose(self, state: tuple[int, ...], step: Step, score: float | None) -> bool:
        """Cached unless listed."""
        return step.index not in state

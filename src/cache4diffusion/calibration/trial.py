"""What came of a trial: a method with its new calibration beside plain reuse, which needs none, at equal FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WINS = 0.75  # of the prompts: fewer may be chance
LITTLE = 1.05  # FLOPs saved: below, there is nothing to judge


@dataclass(frozen=True)
class Trial:
    """What came of a trial.

    Args:
        method: what was tried, as it is written in calls.
        counterpart: plain reuse of about its FLOPs, likewise.
        speedup: FLOPs of the uncached runs over the method's.
        counterpart_speedup: likewise.
        errors: ``|x - x0| / |x0|`` of what the pipeline returns (images in 0..1, unless its call asks for something
            else), per prompt; x0 is the uncached one. Latents would not do: a decoder forgives some errors of theirs.
        counterpart_errors: likewise.
    """

    method: str
    counterpart: str
    speedup: float
    counterpart_speedup: float
    errors: tuple[float, ...]
    counterpart_errors: tuple[float, ...]

    @property
    def wins(self) -> int:
        """Prompts for which the method came closer to the uncached result."""
        return sum(mine < theirs for mine, theirs in zip(self.errors, self.counterpart_errors, strict=True))

    @property
    def is_won(self) -> bool:
        """Whether it saves something, and is closer for three quarters of the prompts and on average."""
        is_closer = _mean(self.errors) < _mean(self.counterpart_errors) and self.wins >= WINS * len(self.errors)
        return self.speedup >= LITTLE and is_closer

    def verdict(self) -> str:
        """What that means, in words."""
        count = len(self.errors)
        tried = f"{self.method}, tried on {count} prompt{'s' * (count != 1)} from other noise: "
        if self.speedup < LITTLE:
            return f"{tried}{self.speedup:.2f}x FLOPs, so hardly anything is cached."
        facts = (
            f"{self.speedup:.2f}x FLOPs, error {_mean(self.errors):.2%}; {self.counterpart}, which needs no "
            f"calibration: {self.counterpart_speedup:.2f}x, {_mean(self.counterpart_errors):.2%}"
        )
        share = f"closer for {self.wins} of {count}"
        if self.is_won:
            return f"{tried}{facts}. It was {share}: worth its calibration here."
        return f"{tried}{facts}. It was {share}: not worth its calibration here."


def _mean(values: Sequence[float]) -> float:
    """Geometric, as a mean of PSNR is: one prompt that goes astray does not decide alone."""
    return math.exp(sum(math.log(max(value, 1e-12)) for value in values) / len(values))

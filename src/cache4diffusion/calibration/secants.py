"""What DPCache measures: how far a line through two earlier steps misses a later one. Source: arXiv:2602.22654."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cache4diffusion.calibration.calibrator import Fit, Shape, Sums
from cache4diffusion.calibration.figure import Figure
from cache4diffusion.calibration.statistic import Seen, StepMeans
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class SecantErrors(StepMeans):
    """``e[t, g - 1, h - 1] = mean|y_j + h / g (y_j - y_(j-g)) - y_t|``, ``j = t - h``, for what the last block makes.

    The error at step t of the line through full steps j and j - g, for gaps g up to ``max_gap`` and horizons h below
    it; a mean over prompts and branches, in float32. 0 where there is no such step.

    Memory: ``2 max_gap`` copies of the last block's output.
    """

    effect: ClassVar[str] = "how far lines miss"

    max_gap: int = setting(10, "most steps from one full step to the next", ge=2, le=50)

    @property
    def site(self) -> Span:
        """What the final norm is given."""
        return Span(form="output")

    def measure(self, memory: dict[str, Any], seen: Seen) -> Mapping[str, tuple[int, Tensor]]:
        """The errors of all lines at this step."""
        now = list(seen.features.values())[-1][0].detach().float().clone()
        past: deque[Tensor] = memory.setdefault("past", deque(maxlen=2 * self.max_gap))
        errors = torch.full((self.max_gap, self.max_gap - 1), torch.nan, dtype=torch.float64)
        for horizon in range(1, min(self.max_gap, len(past) + 1)):
            base = past[-horizon]
            for gap in range(1, min(self.max_gap, len(past) - horizon) + 1):
                line = base + (base - past[-horizon - gap]) * (horizon / gap)
                errors[gap - 1, horizon - 1] = float((line - now).abs().mean())
        past.append(now)
        return {"errors": (seen.step, errors)}

    def figure(self, sums: Sums, fit: Fit) -> Figure:
        """Errors of lines through the last two steps."""
        errors = fit.tensors["errors"]
        lines = {
            f"{horizon} ahead": [(float(t), float(errors[t, 0, horizon - 1])) for t in range(horizon + 1, len(errors))]
            for horizon in sorted({1, 2, self.max_gap - 1})
        }
        return Figure("step", "error of a line through two successive steps", lines=lines)

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """By step, gap and horizon."""
        return {"errors": (num_steps, self.max_gap, self.max_gap - 1)}

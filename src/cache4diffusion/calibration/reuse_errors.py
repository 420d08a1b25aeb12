"""What LeMiCa weighs edges with: how far reuse from one full step to the next moves the result. arXiv:2511.00090."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cache4diffusion.calibration.calibrator import Shape, Sums
from cache4diffusion.calibration.figure import Figure
from cache4diffusion.calibration.statistic import Fit, Seen, StepMeans
from cache4diffusion.settings import setting
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class ReuseErrors(StepMeans):
    """``e[t, r - 1] = mean |sum over t - r < s <= t of ds_s (R_(t-r) - R_s)|``: the edge from step t - r to step t + 1.

    If step ``i = t - r`` is full and the r steps after it reuse the residual R of all blocks, the sample is off by that
    much afterwards: every step adds its own error times the length ``ds`` of its stride in noise (as a share of the
    whole way), and errors of one direction add up while others cancel. A mean over prompts and branches, in float32,
    of the image stream. 0 where there is no such step.

    One uncached run per prompt. The paper samples once per edge with that edge's steps cached and compares what comes
    out, which also holds what later steps make of the error; this is its first order.

    Memory: ``2 max_gap`` copies of the residual.
    """

    effect: ClassVar[str] = "how far reuse moves the result"

    max_gap: int = setting(10, "most steps from one full step to the next", ge=2, le=50)

    @property
    def site(self) -> Span:
        """The residual of all blocks."""
        return Span()

    def measure(self, memory: dict[str, Any], seen: Seen) -> Mapping[str, tuple[int, Tensor]]:
        """The edges that end behind this step."""
        now = list(seen.features.values())[-1][0].detach().float().clone()
        stride = _stride(seen)
        past: list[tuple[Tensor, Tensor]] = memory.setdefault("past", [])  # residual and sum, newest first
        errors = torch.full((self.max_gap - 1,), torch.nan, dtype=torch.float64)
        for run, (held, total) in enumerate(past, 1):
            total += stride * (held - now)
            errors[run - 1] = float(total.abs().mean())
        past.insert(0, (now, torch.zeros_like(now)))
        del past[self.max_gap - 1 :]
        return {"errors": (seen.step, errors)}

    def figure(self, sums: Sums, fit: Fit) -> Figure:
        """Edges over one cached step, and over as many as there can be."""
        errors = fit.tensors["errors"]
        lines = {
            f"{run} cached": [(float(t), float(errors[t, run - 1])) for t in range(run, len(errors))]
            for run in sorted({1, self.max_gap - 1})
        }
        return Figure("last cached step", self.effect, lines=lines)

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """By last cached step, and how many were."""
        return {"errors": (num_steps, self.max_gap - 1)}


def _stride(seen: Seen) -> float:
    """The share of the whole way in noise that a step goes; equal shares where levels are not known."""
    if seen.levels is None or len(seen.levels) != seen.num_steps or not seen.levels[0] > 0:
        return 1 / seen.num_steps
    ends = (*seen.levels, 0.0)
    return (ends[seen.step] - ends[seen.step + 1]) / seen.levels[0]

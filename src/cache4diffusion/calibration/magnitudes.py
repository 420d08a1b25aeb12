"""What MagCache measures: how the residual's magnitude changes from step to step. Source: arXiv:2506.09045."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cache4diffusion.calibration.calibrator import Fit, Shape, Sums
from cache4diffusion.calibration.statistic import Seen, StepMeans
from cache4diffusion.sites import Span


@dataclass(frozen=True)
class MagnitudeRatios(StepMeans):
    """``ratio_i``: the mean over tokens of ``|R_i| / |R_(i-1)|`` for the residual R of all blocks, by CFG branch.

    The first is 1. Norms are over channels, in float32, of the first stream (the image). ``ratios`` is the mean of all
    branches, ``ratios/BRANCH`` that of one.
    """

    effect: ClassVar[str] = "how the residual's magnitude changes"
    rule: ClassVar[str] = "a law for all prompts"
    nothing: ClassVar[float] = 1.0

    @property
    def site(self) -> Span:
        """All blocks."""
        return Span()

    def measure(self, memory: dict[str, Any], seen: Seen) -> Mapping[str, tuple[int, float]]:
        """Compare with the step before."""
        residual = next(iter(seen.features.values()))[0]
        now = torch.linalg.vector_norm(residual.float(), dim=-1)
        before, memory["norms"] = memory.get("norms"), now
        ratio = 1.0 if before is None else float((now / before).mean())
        return {"ratios": (seen.step, ratio), f"ratios/{seen.branch}": (seen.step, ratio)}

    def fit(self, sums: Sums) -> Fit:
        """Means by step."""
        whole = super().fit({"ratios": sums["ratios"]})  # or every number would count twice
        branches = {name: value for name, value in sums.items() if name != "ratios"}
        return Fit({**whole.tensors, **super().fit(branches).tensors}, whole.quality)

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """One per step, and per branch."""
        return {"ratios": (num_steps,), "ratios/*": (num_steps,)}

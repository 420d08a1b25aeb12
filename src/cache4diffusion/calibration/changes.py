"""What TaoCache measures: how successive changes of the guided output shrink and turn. Source: arXiv:2508.08978."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cache4diffusion.calibration.calibrator import Fit, Shape, Sums
from cache4diffusion.calibration.figure import Figure
from cache4diffusion.calibration.quality import judged
from cache4diffusion.calibration.statistic import Seen, Statistic
from cache4diffusion.errors import CalibrationError
from cache4diffusion.predictors.tao import compare_changes
from cache4diffusion.sites import Trajectory


@dataclass(frozen=True)
class ChangeScales(Statistic):
    """``r_i = |d_i| / |d_(i-1)|`` and ``c_i = cos(d_i, d_(i-1))`` for ``d_i = y_i - y_(i-1)``, means over prompts.

    Both are 1 at steps 0 and 1, which have no earlier change. The quality is how much of a change the scaled last one
    explains: ``1 - |d_i - r_i c_i d_(i-1)|^2 / |d_i|^2``, over all prompts and steps.
    """

    listed: ClassVar[tuple[str, ...]] = ("changes",)

    @property
    def site(self) -> Trajectory:
        """After guidance."""
        return Trajectory()

    def init(self) -> Sums:
        """No change yet; a row is step, ratio, cosine."""
        return {"changes": torch.zeros((0, 3), dtype=torch.float64), "steps": torch.zeros(1, dtype=torch.float64)}

    def merge(self, shards: Any) -> Sums:
        """Changes one after another; the length of the runs is the same."""
        merged = super().merge(shards)
        merged["steps"] = shards[0]["steps"].clone()
        return merged

    def observe(self, sums: Sums, memory: dict[str, Any], seen: Seen) -> None:
        """Compare the last two changes."""
        (velocity,) = seen.features["trajectory"]
        now = velocity.detach().clone()
        sums["steps"].fill_(seen.num_steps)
        before, memory["output"] = memory.get("output"), now
        if before is None:
            return
        change = now.double() - before.double()
        last, memory["change"] = memory.get("change"), change
        if last is not None:
            row = torch.tensor([[seen.step, *compare_changes(change, last)]], dtype=torch.float64)
            sums["changes"] = torch.cat([sums["changes"], row])

    def fit(self, sums: Sums) -> Fit:
        """Means, 1 where there is nothing to compare."""
        steps, ratio, cosine = sums["changes"].T
        if not len(steps):
            raise CalibrationError("No two successive changes were seen: runs need three steps or more.")
        ratios, cosines = torch.ones(int(sums["steps"]), dtype=torch.float64), torch.ones(int(sums["steps"])).double()
        for step in steps.unique().long().tolist():
            ratios[step], cosines[step] = ratio[steps == step].mean(), cosine[steps == step].mean()
        scale = (ratios * cosines)[steps.long()]
        left = 1 - 2 * scale * cosine / ratio.clamp_min(1e-300) + (scale / ratio.clamp_min(1e-300)).square()
        left = left[ratio > 0]
        share = float(1 - left.mean()) if len(left) else None
        residual = float(left.clamp_min(0).mean().sqrt()) if len(left) else 0.0
        quality = judged(share, residual, len(left), "the scaled last change", "the next change", "this predictor")
        return Fit({"ratios": ratios, "cosines": cosines}, quality)

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """One of each per step."""
        return {"ratios": (num_steps,), "cosines": (num_steps,)}

    def figure(self, sums: Sums, fit: Fit) -> Figure:
        """Every ratio and cosine, and their means."""
        points = {
            name: [(float(row[0]), float(row[column])) for row in sums["changes"]]
            for name, column in (("norm ratios", 1), ("cosines", 2))
        }
        lines = {f"mean {name}": list(enumerate(fit.tensors[name].tolist())) for name in ("ratios", "cosines")}
        return Figure("step", "between successive changes", points=points, lines=lines)

"""What L2P measures: how the outputs of all steps lie to each other. Source: arXiv:2604.26365."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cache4diffusion.calibration.calibrator import Shape, Sums
from cache4diffusion.calibration.figure import Figure
from cache4diffusion.calibration.quality import judged
from cache4diffusion.calibration.statistic import Fit, Seen, Statistic
from cache4diffusion.errors import CalibrationError
from cache4diffusion.gates import FixedInterval, Step
from cache4diffusion.predictors.learned import solved
from cache4diffusion.settings import setting
from cache4diffusion.sites import Denoiser


@dataclass(frozen=True)
class StepGram(Statistic):
    """``G_ij = <F_i, F_j>`` of the denoiser's outputs at steps i and j, summed over prompts and branches.

    All that least squares must know, for every schedule: the error of weights w of full steps J for step s is
    ``G_ss - 2 w.G_Js + w^T G_JJ w``. The quality is the share of the squared change since the last full step that the
    weights explain, for full steps as the method has them by default.

    Memory: one copy of the output per step while a prompt is sampled.
    """

    interval: int = setting(5, "distance of two full steps in the schedule by which the fit is judged", ge=2)
    warmup: int = setting(3, "first steps that are full in that schedule", ge=1)

    @property
    def site(self) -> Denoiser:
        """The output."""
        return Denoiser()

    def init(self) -> Sums:
        """The length of a run is not known yet."""
        return {}

    def observe(self, sums: Sums, memory: dict[str, Any], seen: Seen) -> None:
        """A row and a column."""
        steps: dict[int, list[Tensor]] = memory.setdefault("outputs", {})
        now = steps[seen.step] = [leaf.detach().clone() for leaf in seen.outputs]
        gram = sums.setdefault("gram", torch.zeros(seen.num_steps, seen.num_steps, dtype=torch.float64))
        for step, then in steps.items():
            product = sum(float((a.double() * b.double()).sum()) for a, b in zip(now, then, strict=True))
            gram[seen.step, step] += product
            if step != seen.step:
                gram[step, seen.step] += product

    def fit(self, sums: Sums) -> Fit:
        """The matrix itself; its weights depend on the schedule."""
        if "gram" not in sums:
            raise CalibrationError("No output was seen: sample under torch.no_grad().")
        gram = sums["gram"]
        left = moved = 0.0
        count = 0
        gate = FixedInterval(self.interval, anchor="warmup", warmup=self.warmup)
        cached = [gate.propose(None, Step(step, len(gram)), None) for step in range(len(gram))]
        for step, is_cached in enumerate(cached):
            full = [i for i in range(step - 1, -1, -1) if not cached[i]]
            if is_cached:
                weights = torch.tensor(solved(gram, full, step, 1e-5), dtype=torch.float64)
                left += float(error_of(gram, full, step, weights))
                moved += float(error_of(gram, full[:1], step, torch.ones(1, dtype=torch.float64)))
                count += 1
        size = float(gram.diagonal().sum())
        r2 = 1 - left / moved if moved > 1e-12 * size else None
        residual = (max(left, 0.0) / size) ** 0.5 if size > 0 else 0.0
        words = ("a combination of full steps", "the change since the last one", "doing better than reuse")
        return Fit({"gram": gram}, judged(r2, residual, count, *words))

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """By step and step."""
        return {"gram": (num_steps, num_steps)}

    def figure(self, sums: Sums, fit: Fit) -> Figure:
        """How alike the outputs of neighbouring steps are."""
        gram = fit.tensors["gram"]
        sizes = gram.diagonal().clamp_min(1e-300).sqrt()
        cosines = gram / sizes / sizes[:, None]
        lines = {
            f"{lag} steps apart": [(float(i + lag), float(v)) for i, v in enumerate(cosines.diagonal(lag))]
            for lag in (1, self.interval)
            if lag < len(gram)
        }
        return Figure("step", "cosine of outputs", lines=lines)


def error_of(gram: Tensor, full: list[int], step: int, weights: Tensor) -> Tensor:
    """Squared error of predicting a step from full ones, over all runs the matrix was made of."""
    return gram[step, step] - 2 * weights @ gram[full, step] + weights @ gram[full][:, full] @ weights

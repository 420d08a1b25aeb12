"""TaoCache's predictor: the last change of the output, scaled by how changes were seen to shrink and turn.

Source: the idea of TaoCache, arXiv:2508.08978. Its formula could not be read; this one is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cache4diffusion.devices import in_double
from cache4diffusion.errors import SettingError
from cache4diffusion.predictors.base import RecursivePredictor


@dataclass(frozen=True)
class ScaledDelta(RecursivePredictor):
    """Predict ``y_i = u + r_i c_i (u - v)``, where ``u`` and ``v`` are the values used at the two steps before.

    ``r_i`` is the calibrated ratio of the norms of successive changes and ``c_i`` the cosine between them: their
    product is the least-squares projection of a change on the one before. Exact for changes that form a geometric
    sequence ``d_i = q d_{i-1}`` with ``r = q, c = 1``; ``r c = 1`` is the line through the last two values, ``r = 0``
    reuse.

    Args:
        ratios: ``r_i`` by step, the last one for all later steps. `fit_changes` measures them.
        cosines: ``c_i`` by step, likewise; ``(1,)`` keeps the norm.

    Raises:
        SettingError: a list is empty.

    Memory: 2 copies of the feature per run.
    """

    ratios: tuple[float, ...] = (1.0,)
    cosines: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.ratios or not self.cosines:
            raise SettingError("ScaledDelta: ratios and cosines need one value at least.")

    @property
    def capacity(self) -> int:
        """The last two values used."""
        return 2

    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """On the last two values."""
        if len(times) < 2:
            return [1.0]
        step = round(time)
        scale = self.ratios[min(step, len(self.ratios) - 1)] * self.cosines[min(step, len(self.cosines) - 1)]
        return [1 + scale, -scale]


def compare_changes(now: Tensor, before: Tensor) -> tuple[float, float]:
    """Ratio of the norms of two successive changes, and the cosine between them; 0 where one is nothing."""
    now, before = in_double(now).flatten(), in_double(before).flatten()
    lengths = torch.linalg.vector_norm(now), torch.linalg.vector_norm(before)
    cosine = torch.dot(now, before) / (lengths[0] * lengths[1]).clamp_min(1e-300)
    return float(lengths[0] / lengths[1].clamp_min(1e-300)), float(cosine)


def fit_changes(trajectories: Sequence[Sequence[Tensor]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure ``r_i`` and ``c_i`` on uncached runs.

    Args:
        trajectories: per run, the output after guidance at every step; three steps or more, all runs as many.

    Returns:
        Mean norm ratio and mean cosine of ``d_i = y_i - y_{i-1}`` and ``d_{i-1}``, by step; 1 at steps 0 and 1, which
        have no earlier change.
    """
    ratios, cosines = [1.0, 1.0], [1.0, 1.0]
    for i in range(2, len(trajectories[0])):
        seen = []
        for run in trajectories:
            now, before = (in_double(run[j]) - in_double(run[j - 1]) for j in (i, i - 1))
            seen.append(compare_changes(now, before))
        ratios.append(sum(ratio for ratio, _ in seen) / len(seen))
        cosines.append(sum(cosine for _, cosine in seen) / len(seen))
    return tuple(ratios), tuple(cosines)

"""How well a fit explains what was measured: R² and residual, and what that means in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GOOD, POOR = 0.9, 0.5  # of R²: from here on a sound basis; below, none


@dataclass(frozen=True)
class Quality:
    """How good a fit is.

    Args:
        r2: the share of the variance (of the effect, for means) that the fit explains, at most 1; None where there was
            nothing to explain.
        residual: root mean square of what it leaves.
        count: numbers it was fitted to.
        verdict: what that means, in words.
    """

    r2: float | None
    residual: float
    count: int
    verdict: str

    @property
    def is_good(self) -> bool:
        """Whether it is a sound basis, as far as the fit goes."""
        return self.r2 is not None and self.r2 >= GOOD

    @property
    def is_poor(self) -> bool:
        """Whether the verdict is that it will not work."""
        return self.r2 is not None and self.r2 < POOR


def judged(r2: float | None, residual: float, count: int, cause: str, effect: str, rule: str) -> Quality:
    """A quality with its verdict.

    Args:
        r2, residual, count: see `Quality`.
        cause: what the fit is a function of, such as "the signal".
        effect: what it should explain, such as "the change of the output".
        rule: what relies on it, such as "this gate".
    """
    if r2 is None:
        return Quality(None, residual, count, f"{effect} did not vary, so there was nothing for {cause} to explain.")
    share = f"{cause} explains {max(r2, 0.0):.0%} of {effect}"
    if r2 >= GOOD:
        return Quality(r2, residual, count, f"{share}: a sound basis for {rule}.")
    if r2 >= POOR:
        return Quality(r2, residual, count, f"{share}: {rule} will err from prompt to prompt; compare before use.")
    return Quality(r2, residual, count, f"{share}: {rule} will not work here.")


def r2_of(values: Tensor, fitted: Tensor) -> tuple[float | None, float]:
    """R² of a fit and the root mean square of its residual."""
    residual = values - fitted
    within = float(residual.square().sum())
    total = float((values - values.mean()).square().sum())
    rms = math.sqrt(within / max(values.numel(), 1))
    return _share(within, total, float(values.square().sum())), rms


def r2_of_means(sums: Tensor, nothing: float) -> tuple[float | None, float]:
    """The share of an effect that means by group explain, and the root mean square of what they leave.

    The effect is the distance from ``nothing``, the value where nothing happens, and not from the overall mean: means
    that are the same in every group explain all there is if no number differs from them.

    Args:
        sums: ``[3, ...]`` counts, sums and squares by group; groups with none do not count.
        nothing: what the numbers are where there is no effect: 0 of an error, 1 of a ratio.
    """
    n, s, q = (row[sums[0] > 0].double() for row in sums)
    if not n.numel():
        return None, 0.0
    within = float((q - s.square() / n).clamp_min(0).sum())
    effect = float((q - 2 * nothing * s + n * nothing**2).sum())
    return _share(within, effect, float(q.sum())), math.sqrt(within / float(n.sum()))


def _share(within: float, total: float, scale: float) -> float | None:
    """``1 - within / total``; None where nothing varied beyond rounding."""
    if total <= 1e-20 + 1e-12 * scale:
        return None
    return 1 - within / total


def mean_of(sums: Tensor) -> Tensor:
    """Means from ``[3, ...]`` counts, sums and squares; 0 where there were none."""
    return torch.where(sums[0] > 0, sums[1] / sums[0].clamp_min(1), torch.zeros_like(sums[1]))

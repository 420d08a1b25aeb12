"""Each part decides by a trained score of what enters it: the gate of LazyDiT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import PartInput, Place, Step
from cache4diffusion.gates.timetable import nearest_steps


@dataclass(frozen=True, eq=False)
class LearnedScore:
    """A part is cached where its score is below ``threshold``: ``sigmoid(sum over tokens of z @ w) < threshold``.

    The score says how much computing is worth. Where there are no weights it is 0.5, so that at the published threshold
    such a part is always computed. With ``threshold=2`` a part is cached wherever it can be: ``Fccc``.

    Args:
        threshold: 0 (off) or more. Published: 0.5.
        weights: by the path of the part, ``[steps, channels]``.
        num_steps: length of the run the weights are for. None: of any.
        levels: the scheduler's timestep at each of its steps; None where it is not known.
        resample: whether a run of other levels is accepted.

    Raises:
        SettingError: the threshold is out of range.
    """

    threshold: float = 0.5
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    num_steps: int | None = None
    levels: tuple[float, ...] | None = None
    resample: bool = False

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise SettingError(f"LearnedScore(threshold={self.threshold}): threshold must be 0 (off) or more.")

    @property
    def watch(self) -> PartInput:
        """What enters each part."""
        return PartInput(self.weights, self.num_steps, self.levels, self.resample)

    @property
    def needs_num_steps(self) -> bool:
        """To see whether the weights fit."""
        return self.num_steps is not None

    def begin(self, num_steps: int | None) -> None:
        """No state."""

    def begin_at(self, place: Place) -> None:
        """No state; but other noise levels than the weights' are refused here.

        Raises:
            CalibrationError: the run has other noise levels.
        """
        nearest_steps(self.watch, place)

    def propose(self, state: None, step: Step, score: float | None) -> bool:
        """Compare with the threshold."""
        return score is not None and score < self.threshold

    def commit(self, state: None, step: Step, cached: bool, score: float | None) -> None:
        """Nothing to remember."""


def score_of(entering: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``sigmoid`` of the sum, over streams, tokens and channels, of what enters times its weight; per row, float32."""
    return logit_of(entering, weights).sigmoid()


def logit_of(entering: Sequence[Tensor], weights: Tensor) -> Tensor:
    """That sum; over shares of the tokens it adds up."""
    sums = [stream.float().flatten(1, -2).sum(1) for stream in entering]
    return torch.cat(sums, dim=1) @ weights

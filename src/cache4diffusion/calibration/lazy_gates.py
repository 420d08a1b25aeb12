"""What LazyDiT trains: for every second step and every part, a weight per channel of its modulated input.

Source: arXiv:2412.12444, code shawnricecake/lazydit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cache4diffusion.calibration.training import Leaves, Numbers, Reached, Spot, VectorTraining, mixed
from cache4diffusion.gates import score_of
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts

THRESHOLD = 0.5  # published: computed while sampling iff the score is 0.5 or more


@dataclass(frozen=True)
class LazyGates(VectorTraining):
    """A vector ``w`` per part and taught step; ``s = sigmoid(sum over tokens of z @ w)`` for each row of the batch.

    ``z`` is the part's normalised and modulated input (of both streams, one after the other, where it has two). The
    student goes on with ``s f(z) + (1 - s) F``, where ``F`` is what the step before computed. ``w`` begins as 0, and so
    ``s = 0.5``. Steps 0, 2, 4 ... fill the cache, steps 1, 3, 5 ... are taught; both latents are the uncached
    denoiser's. The loss is ``mean|target - student|^2`` plus ``price * mean(s)`` for every part.

    Differences from the code: one prompt per update, not 512 images; one price for all parts, where the code has one
    for attention and one for MLPs, which are equal in its scripts.
    """

    rate: float = setting(1e-4, "learning rate of AdamW. Code: 1e-4 (script), 1e-2 (default)", gt=0)
    price: float = setting(1e-4, "of computing a part: rho. Code: 1e-7 (script), 1e-2 (default)", ge=0)

    @property
    def site(self) -> Parts:
        """Every part, each with its own decision."""
        return Parts(decisions="part")

    def start(
        self, spots: Sequence[Spot], num_steps: int, generator: torch.Generator, measured: Mapping[str, Tensor]
    ) -> Numbers:
        """Zeros, for the second step of every pair."""
        return {
            step: {spot.name: [torch.zeros(sum(spot.entering))] for spot in spots} for step in range(1, num_steps, 2)
        }

    @staticmethod
    def scores(numbers: Numbers, reached: Reached) -> Tensor:
        """``s`` of every row."""
        return score_of(reached.entering, numbers[reached.step][reached.spot.name][0])

    def answer(self, numbers: Numbers, reached: Reached) -> Leaves:
        """``s f + (1 - s) F`` per row, at its price."""
        scores = self.scores(numbers, reached)
        reached.charge(self.price * scores.mean())
        return mixed(scores, reached.compute(), reached.cached)

    def sampled(self, numbers: Numbers, reached: Reached) -> tuple[Leaves, float]:
        """Each row computed or cached."""
        is_computed = self.scores(numbers, reached) >= THRESHOLD
        if not is_computed.any():
            return reached.cached, 1.0
        return mixed(is_computed, reached.compute(), reached.cached), 1 - float(is_computed.float().mean())

"""What our reading of MD-DiT trains: which tokens of a part are worth computing on a cached step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cache4diffusion.calibration.training import Leaves, Numbers, Reached, Spot, VectorTraining, mixed
from cache4diffusion.gates import FixedInterval, Step
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts
from cache4diffusion.tokens import routed_count


@dataclass(frozen=True)
class TokenRouters(VectorTraining):
    """A vector ``w`` per tokenwise part and cached step; ``s_n = sigmoid(z_n @ w)`` for each token.

    ``z_n`` is what enters the part; the student goes on with ``s_n f(z)_n + (1 - s_n) F_n``, where ``F`` is what the
    last full step computed. Parts in which tokens see each other (attention) are cached as they are. ``w`` begins as 0.
    All latents are the uncached denoiser's. The loss is ``mean|target - student|^2`` plus ``price * (mean(s) -
    capacity)^2`` for every part, so that the routers learn to spend the capacity where it matters.

    All of it is ours. A fused part sees today's attention in training, and the last full step's while sampling.
    """

    rate: float = setting(0.005, "learning rate of AdamW", gt=0)
    price: float = setting(0.01, "of a mean score that differs from the capacity", ge=0)
    capacity: float = setting(0.25, "share of the tokens that a part may compute on a cached step", ge=0, le=1)
    interval: int = setting(3, "distance of two full steps", ge=2)

    @property
    def site(self) -> Parts:
        """Every part."""
        return Parts()

    def start(
        self, spots: Sequence[Spot], num_steps: int, generator: torch.Generator, measured: Mapping[str, Tensor]
    ) -> Numbers:
        """Zeros, at steps that are cached."""
        gate = FixedInterval(self.interval)
        cached = [i for i in range(num_steps) if gate.propose(None, Step(i, num_steps), None)]
        routed = [spot for spot in spots if spot.is_tokenwise and spot.kind in ("ffn", "fused")]
        return {i: {spot.name: [torch.zeros(spot.entering[0])] for spot in routed} for i in cached} if routed else {}

    def answer(self, numbers: Numbers, reached: Reached) -> Leaves:
        """``s f + (1 - s) F`` per token; attention is cached."""
        scores = self._scores(numbers, reached)
        if scores is None:
            return reached.cached
        reached.charge(self.price * (scores.mean() - self.capacity).square())
        return mixed(scores, reached.compute(), reached.cached)

    @staticmethod
    def _scores(numbers: Numbers, reached: Reached) -> Tensor | None:
        weights = numbers[reached.step].get(reached.spot.name)
        return None if weights is None else (reached.entering[0].float() @ weights[0]).sigmoid()

    def sampled(self, numbers: Numbers, reached: Reached) -> tuple[Leaves, float]:
        """The tokens with the largest scores are computed."""
        scores = self._scores(numbers, reached)
        if scores is None:
            return reached.cached, 1.0
        k = routed_count(self.capacity, scores.shape[1])
        is_computed = torch.zeros_like(scores).scatter_(1, scores.topk(k, dim=1).indices, 1.0)
        return mixed(is_computed, reached.compute(), reached.cached), 1 - k / scores.shape[1]

    @property
    def nothing_words(self) -> str:
        """What to do where nothing is routed."""
        return "It needs parts that map every token by itself (MLPs), and more steps than the interval."

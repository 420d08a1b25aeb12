"""What L2C and HarmoniCa train: for every step and part, how likely it is worth computing.

Sources: L2C, arXiv:2406.01733, code horseee/learning-to-cache; HarmoniCa, arXiv:2410.01723, code ModelTC/HarmoniCa.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cache4diffusion.calibration.calibrator import Shape
from cache4diffusion.calibration.training import Answer, Leaves, Numbers, Reached, Spot, Training, mixed
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts

THRESHOLD = 0.1  # published: computed while sampling iff p > 0.1


@dataclass(frozen=True)
class Routers(Training):
    """One logit ``w`` per part and taught step, ``p = sigmoid(w)``; the student goes on with ``p f + (1 - p) F``.

    ``f`` is what the part computes and ``F`` what is cached, both before the adaLN gate. ``w`` begins as N(0, 1) and is
    kept within [-5, 5]. The loss is ``mean|target - student|^2 + price * sum(p)``, with a weight on the first term.

    Differences from the codes: one prompt per update, not 64 images.
    """

    limit: ClassVar[float] = 5.0

    rate: float = setting(0.05, "learning rate of AdamW. Codes: 0.001 (L2C), 0.01 (HarmoniCa)", gt=0)
    price: float = setting(1e-6, "of computing a part: l1, times the sum of p. Codes: 1e-6, 5e-6, 7e-8", ge=0)

    @property
    def site(self) -> Parts:
        """Every part, each with its own decision."""
        return Parts(decisions="part")

    def start(
        self, spots: Sequence[Spot], num_steps: int, generator: torch.Generator, measured: Mapping[str, Tensor]
    ) -> Numbers:
        """Random logits."""
        taught = range(num_steps)
        return {step: {spot.name: [torch.randn((), generator=generator)] for spot in spots} for step in taught}

    def is_taught(self, numbers: Numbers, step: int) -> bool:
        """Every step but the first."""
        return step > 0 and step in numbers

    @staticmethod
    def probability(numbers: Numbers, reached: Reached) -> Tensor:
        """``p`` of this part at this step."""
        return numbers[reached.step][reached.spot.name][0].sigmoid()

    def answer(self, numbers: Numbers, reached: Reached) -> Leaves:
        """``p f + (1 - p) F``, at its price."""
        p = self.probability(numbers, reached)
        reached.charge(self.price * p)
        return mixed(p, reached.compute(), reached.cached)

    def sampled(self, numbers: Numbers, reached: Reached) -> tuple[Leaves, float]:
        """Computed or cached."""
        if self.probability(numbers, reached) > THRESHOLD:
            return reached.compute(), 0.0
        return reached.cached, 1.0

    def tensors(self, numbers: Numbers, num_steps: int) -> dict[str, Tensor]:
        """``p`` by step, for every part; 1 where it was not taught."""
        table = {name: torch.ones(num_steps) for sites in numbers.values() for name in sites}
        for step, sites in numbers.items():
            for name, (logit,) in sites.items():
                table[name][step] = logit.detach().sigmoid()
        return table

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """A probability per step."""
        return {"*": (num_steps,)}


@dataclass(frozen=True)
class PairedRouters(Routers):
    """What L2C trains: every second step, with what the step before it computed.

    Steps 0, 2, 4 ... are full and fill the cache, steps 1, 3, 5 ... are taught. Both latents are the uncached
    denoiser's. Code: pairs drawn from noised training images.
    """

    def is_taught(self, numbers: Numbers, step: int) -> bool:
        """The second step of every pair."""
        return super().is_taught(numbers, step) and step % 2 == 1


@dataclass(frozen=True)
class TrajectoryRouters(Routers):
    """What HarmoniCa trains: whole trajectories of the student, on which caches grow old as they will while sampling.

    At every step but the first the teacher sees the student's latent. After it, what the student went on with becomes
    the cache of the parts with ``p > 0.1``, and stays it for the others. The first term of a step's loss is weighted by
    ``lambda_s``, the image error proxy, anew every ``refresh`` runs: from the run with all ``p = 1``, the routers are
    switched on step by step (the second step first, as in the code), and ``lambda_s = mean|x_0 - x_0'|^2`` between the
    final latents with and without step s's.

    Cost: the weights take as many further runs as there are steps, every time.
    """

    is_students: ClassVar[bool] = True

    price: float = setting(7e-8, "of computing a part: l1, times the sum of p. Code: 7e-8 (10 steps)", ge=0)
    refresh: int = setting(50, "runs between two measurements of the steps' weights. Code: 50 (500 updates)", ge=1)

    def answer(self, numbers: Numbers, reached: Reached) -> Leaves:
        """As every router does; the cache of parts that will be computed is what it goes on with."""
        leaves = super().answer(numbers, reached)
        if self.probability(numbers, reached) > THRESHOLD:
            reached.keep(leaves)
        return leaves

    def weigh(self, numbers: Numbers, run: int, rehearse: Callable[[Answer], Tensor]) -> Mapping[int, float] | None:
        """The image error proxy of every step."""
        if run % self.refresh:
            return None
        on: set[int] = set()

        def partly(numbers: Numbers, reached: Reached) -> Leaves:
            if reached.step in on:
                return self.answer(numbers, reached)
            leaves = reached.compute()
            reached.keep(leaves)
            return leaves

        weights, before = {}, rehearse(partly)
        for step in sorted(step for step in numbers if self.is_taught(numbers, step)):
            on.add(step)
            now = rehearse(partly)
            weights[step], before = float((now - before).square().mean()), now
        return weights

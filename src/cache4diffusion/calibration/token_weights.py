"""What TokenCache trains: for every step, block and token, how much computing it is worth.

Source: arXiv:2409.18523.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cache4diffusion.calibration.calibrator import Shape
from cache4diffusion.calibration.training import Leaves, Numbers, Reached, Spot, Training, mixed
from cache4diffusion.errors import CalibrationError
from cache4diffusion.settings import setting
from cache4diffusion.sites import Blocks
from cache4diffusion.tokens import important_tokens, pruned_blocks


def weights_of(logits: Sequence[Tensor], capacity: float) -> list[Tensor]:
    """``sigmoid(logit - s)``, with the one ``s`` by which all of them have this mean.

    The gradient goes through ``s``, too: what one weight gains, the others lose. (One Newton step from the solution
    stays where it is, and has the solution's gradient.)
    """
    every = torch.cat(list(logits))
    with torch.no_grad():
        low, high = every.min() - 20, every.max() + 20
        for _ in range(50):
            middle = (low + high) / 2
            is_low = (every - middle).sigmoid().mean() > capacity
            low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
        slope = (every - low).sigmoid()
        slope = (slope * (1 - slope)).mean()
    shift = low + ((every - low).sigmoid().mean() - capacity) / slope
    return [(logit - shift).sigmoid() for logit in logits]


@dataclass(frozen=True)
class TokenWeights(Training):
    """A weight ``w`` per step, block and image token; the student goes on with ``w f + (1 - w) F``.

    ``f`` is what a block adds to the stream and ``F`` what it added at the step before, in the student. Text goes by
    the mean weight of its block. All latents are the uncached denoiser's, and the loss is ``mean|target - student|^2``
    of the outputs. Weights of 1 would make no error, so at every step the weights of all blocks and tokens have the
    mean that ``pruned`` and ``share`` leave, and learn where to spend it: they are `weights_of` logits that begin as 0
    and are kept within [-5, 5]. A table is all that a predictor can be that is given the block and the step alone. The
    mean is ours.
    """

    limit: ClassVar[float] = 5.0

    rate: float = setting(0.05, "learning rate of AdamW", gt=0)
    pruned: float = setting(0.75, "share of the blocks that computes some tokens only on a cached step", ge=0, le=1)
    share: float = setting(0.25, "of their tokens that is computed", ge=0, le=1)

    @property
    def site(self) -> Blocks:
        """Every block."""
        return Blocks()

    @property
    def capacity(self) -> float:
        """The share of all tokens that is computed on a cached step."""
        return 1 - self.pruned * (1 - self.share)

    def start(
        self, spots: Sequence[Spot], num_steps: int, generator: torch.Generator, measured: Mapping[str, Tensor]
    ) -> Numbers:
        """Zeros, for every step but the first; nothing, if all tokens or none are computed."""
        if not 0 < self.capacity < 1:
            return {}
        return {i: {spot.name: [torch.zeros(spot.lengths[0])] for spot in spots} for i in range(1, num_steps)}

    def is_taught(self, numbers: Numbers, step: int) -> bool:
        """Every step but the first."""
        return step in numbers

    def answer(self, numbers: Numbers, reached: Reached) -> Leaves:
        """``w f + (1 - w) F`` per token; what was computed is cached for the next step."""
        weights, fresh = self._weights(numbers, reached.step)[reached.spot.name], reached.compute()
        self._check(weights, fresh[0])
        reached.keep(fresh)
        return self._mixed(weights, weights.mean(), fresh, reached.cached)

    def _weights(self, numbers: Numbers, step: int) -> dict[str, Tensor]:
        """Of a step, by the name of the block."""
        sites = numbers[step]
        return dict(zip(sites, weights_of([logit for (logit,) in sites.values()], self.capacity), strict=True))

    @staticmethod
    def _check(weights: Tensor, stream: Tensor) -> None:
        if stream.shape[-2] != len(weights):
            raise CalibrationError(
                f"A stream had {len(weights)} tokens at first and has {stream.shape[-2]} now. Calibrate with images of "
                "one size, and prompts of one length where text and image share a stream."
            )

    @staticmethod
    def _mixed(weights: Tensor, rest: Tensor, fresh: Leaves, cached: Leaves) -> Leaves:
        """The image's tokens by their weights, the text by one for all."""
        image = weights.to(fresh[0].dtype)[:, None]
        return [image * fresh[0] + (1 - image) * cached[0], *mixed(rest, fresh[1:], cached[1:])]

    def sampled(self, numbers: Numbers, reached: Reached) -> tuple[Leaves, float]:
        """The least important blocks compute their most important tokens, and keep the text."""
        every, fresh = self._weights(numbers, reached.step), reached.compute()
        means = [float(weights.mean()) for weights in every.values()]
        if list(every).index(reached.spot.name) not in pruned_blocks(means, self.pruned):
            return fresh, 0.0
        weights = every[reached.spot.name]
        index = important_tokens(weights, self.share)
        chosen = torch.zeros_like(weights).index_fill_(0, index, 1.0)
        rest = torch.zeros((), device=weights.device)
        return self._mixed(chosen, rest, fresh, reached.cached), 1 - len(index) / len(weights)

    @property
    def nothing_words(self) -> str:
        """What to do where nothing is learned."""
        return (
            f"With pruned={self.pruned} and share={self.share} a cached step computes all tokens, or none: use values "
            "between, and more than one step."
        )

    def tensors(self, numbers: Numbers, num_steps: int) -> dict[str, Tensor]:
        """``w`` by step and token, for every block; 1 where it was not taught."""
        table: dict[str, Tensor] = {}
        for step in numbers:
            for name, weights in self._weights(numbers, step).items():
                table.setdefault(name, torch.ones(num_steps, len(weights)))[step] = weights.detach().cpu()
        return table

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """A row of tokens per step."""
        return {"*": (num_steps, None)}

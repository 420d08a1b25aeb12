"""Recompute the tokens that trained weights call important, in the blocks that they call unimportant: TokenCache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from cache4diffusion.devices import sent
from cache4diffusion.errors import CalibrationError, SettingError
from cache4diffusion.gates.base import PartInput, Place
from cache4diffusion.gates.timetable import nearest_steps
from cache4diffusion.tokens.base import TokenPlace
from cache4diffusion.tokens.routed import routed_count

UNKNOWN = 0.5  # the weight of tokens for which there is none


def pruned_blocks(means: Sequence[float], share: float) -> set[int]:
    """The ``floor(share * L)`` blocks of the least mean weight; of equal ones the first.

    A block of weights that are all 1 is none of them, one of weights that are all 0 always is.
    """
    order = sorted(range(len(means)), key=lambda block: (means[block], block))
    count = int(share * len(means) + 1e-9)
    return {b for place, b in enumerate(order) if means[b] <= 0 or (place < count and means[b] < 1)}


def important_tokens(weights: Tensor, share: float) -> Tensor:
    """The ``ceil(share * n)`` tokens of the largest weights, sorted; of equal ones the first.

    All with a weight of 1 are among them, and none with a weight of 0 is.
    """
    order = weights.sort(descending=True, stable=True).indices
    k = min(max(routed_count(share, len(weights)), int((weights >= 1).sum())), int((weights > 0).sum()))
    return order[:k].sort().values


@dataclass(frozen=True)
class WeightedTokens:
    """In `pruned_blocks` the `important_tokens` are computed, in the other blocks everything is.

    A token has a weight for every step and block, whatever the image shows. In a pruned block the image's MLPs (and
    cross-attentions, and what follows the attention in fused parts) run on the important tokens; all else keeps what
    was computed last: self-attention as a whole, of which no token sees keys and values of another step, and the text.
    In other blocks all tokens attend to all, and the cache is refreshed. If all tokens of a block are important it is
    none that is pruned. All rows and branches compute the same tokens.

    Args:
        blocks: share of the blocks that is pruned, 0 to 1.
        share: of the image tokens that a pruned block computes, 0 to 1.
        weights: 0 to 1 by the name of the block, ``"block.3"``: ``[steps, tokens]``; and the run they are for.

    Raises:
        SettingError: a share is out of range.
        CalibrationError: on use: there are weights for another number of tokens.
    """

    blocks: float = 0.75
    share: float = 0.25
    weights: PartInput = field(default_factory=PartInput)

    def __post_init__(self) -> None:
        if not (0 <= self.blocks <= 1 and 0 <= self.share <= 1):
            raise SettingError(
                f"WeightedTokens(blocks={self.blocks}, share={self.share}): both must be shares, 0 to 1."
            )

    @property
    def needs_num_steps(self) -> bool:
        """To see whether the weights fit."""
        return self.weights.num_steps is not None

    @property
    def observes(self) -> frozenset[str]:
        """Nothing of the step itself."""
        return frozenset()

    @cached_property
    def _means(self) -> dict[str, list[float]]:
        """By the name of a block, its importance at every step."""
        return {name: table.double().mean(1).tolist() for name, table in self.weights.weights.items()}

    def init(self) -> None:
        """No state."""

    def observe(self, state: None, place: TokenPlace, seen: dict[str, Tensor]) -> None:
        """Nothing to take in."""

    def computes_all(self, place: TokenPlace) -> bool:
        """Whether the part's block is none that is pruned at this step."""
        row = self._row(place)
        means = [self._mean(block, row) for block in range(place.num_blocks)]
        if place.block not in pruned_blocks(means, self.blocks):
            return True
        weights = self._weights(place.block, row)
        return weights is not None and len(important_tokens(weights, self.share)) == len(weights)

    def select(self, state: None, place: TokenPlace, device: torch.device) -> Tensor:
        """All tokens; or of the image's the important ones, if any."""
        if self.computes_all(place):
            index = torch.arange(place.length)
        else:
            weights = self._weights(place.block, self._row(place))
            index = torch.cat(
                [self._important(weights, s.stop - s.start) + s.start for s in place.segments if s.kind == "image"]
                or [torch.zeros(0, dtype=torch.long)]
            )
        return sent(index, device).expand(place.batch, -1)

    def _important(self, weights: Tensor | None, length: int) -> Tensor:
        """Of the image's tokens.

        Raises:
            CalibrationError: the weights are for another number of tokens.
        """
        if weights is None:
            weights = torch.full((length,), UNKNOWN)
        if len(weights) != length:
            raise CalibrationError(
                f"The weights are for {len(weights)} image tokens, and here are {length}. Calibrate at this size."
            )
        return important_tokens(weights, self.share)

    def _row(self, place: TokenPlace) -> int:
        """The step whose weights are taken."""
        steps = nearest_steps(self.weights, Place(place.step.num_steps, place.levels))
        return place.step.index if steps is None else steps[min(place.step.index, len(steps) - 1)]

    def _mean(self, block: int, row: int) -> float:
        means = self._means.get(f"block.{block}", [])
        return means[row] if row < len(means) else UNKNOWN

    def _weights(self, block: int, row: int) -> Tensor | None:
        table = self.weights.weights.get(f"block.{block}")
        return None if table is None or row >= len(table) else table[row]

    def tensors(self, state: None) -> Sequence[Tensor]:
        """Nothing is held."""
        return ()

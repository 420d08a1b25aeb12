"""Recompute the tokens that a trained router picks from what enters the part: MD-DiT's routing, on cached steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cache4diffusion.devices import sent
from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import PartInput, Place
from cache4diffusion.gates.timetable import nearest_steps
from cache4diffusion.tokens.base import TokenPlace, of_twins


@dataclass(frozen=True)
class RoutedTokens:
    """Of a part's N tokens, the ``ceil(capacity * N)`` with the largest ``z @ w``, for its modulated input ``z``.

    ``w`` is a router of the part's own for every step; without one, the first tokens are taken. Text and image compete.
    The halves of batched guidance compute the same tokens, by the mean of their scores.

    Args:
        capacity: share of the tokens that is computed, 0 to 1.
        routers: weights ``[steps, channels]`` by the path of the part, and the run they are for.

    Raises:
        SettingError: the capacity is out of range.
    """

    capacity: float = 0.25
    routers: PartInput = field(default_factory=PartInput)

    def __post_init__(self) -> None:
        if not 0 <= self.capacity <= 1:
            raise SettingError(f"RoutedTokens(capacity={self.capacity}): capacity must be a share of tokens, 0 to 1.")

    @property
    def needs_num_steps(self) -> bool:
        """To see whether the routers fit."""
        return self.routers.num_steps is not None

    @property
    def observes(self) -> frozenset[str]:
        """What enters the part."""
        return frozenset({"input"}) if self.capacity > 0 else frozenset()

    def init(self) -> None:
        """No state."""

    def observe(self, state: None, place: TokenPlace, seen: dict[str, Tensor]) -> None:
        """Nothing to take in."""

    def select(self, state: None, place: TokenPlace, device: torch.device) -> Tensor:
        """The tokens with the highest scores, sorted; of equal ones the first."""
        k = routed_count(self.capacity, place.length)
        if k == 0:
            return torch.zeros(place.batch, 0, dtype=torch.long, device=device)
        scores = of_twins(self._scores(place, device), place)
        return scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values

    def _scores(self, place: TokenPlace, device: torch.device) -> Tensor:
        table = self.routers.weights.get(place.part)
        steps = nearest_steps(self.routers, Place(place.step.num_steps, place.levels))
        row = place.step.index if steps is None else steps[min(place.step.index, len(steps) - 1)]
        if table is None or row >= len(table):
            return torch.zeros(place.batch, place.length, device=device)
        assert place.entering is not None  # the engine was asked for it
        return place.entering.float() @ sent(table[row].float(), device)

    def tensors(self, state: None) -> Sequence[Tensor]:
        """Nothing is held."""
        return ()


def routed_count(capacity: float, length: int) -> int:
    """``ceil(capacity * length)``, rounding errors of the product aside."""
    return math.ceil(capacity * length - 1e-9)

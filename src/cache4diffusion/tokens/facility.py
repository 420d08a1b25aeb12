"""Merge by attention: destinations that stand for all tokens, and dense linear maps to them and back, of ToMA
(arXiv:2509.10918).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cache4diffusion.devices import sent
from cache4diffusion.errors import SettingError
from cache4diffusion.tokens.base import TokenPlace
from cache4diffusion.tokens.reduction import LinearPlan, Plan, Signal

TIE = 1e-4
"""What two choices may add that count as adding as much."""


def tiles_of(grid: tuple[int, int, int], side: int) -> tuple[Tensor, Tensor, Tensor]:
    """A frame is cut into tiles of about ``side x side``, as even as can be; smaller ones are filled up with token 0.

    Returns:
        The tokens of every tile, row by row, ``[tiles, n]``; which of them there are, likewise; and where among all of
        these every token is, ``[N]``.
    """
    frames, height, width = grid
    tokens = torch.arange(frames * height * width).view(frames, height, width)
    found = [
        part.flatten()
        for frame in tokens
        for strip in frame.tensor_split(max(round(height / side), 1))
        for part in strip.tensor_split(max(round(width / side), 1), dim=1)
    ]
    longest = max(len(part) for part in found)
    index = torch.stack([torch.cat([part, part.new_zeros(longest - len(part))]) for part in found])
    is_real = torch.arange(longest) < torch.tensor([len(part) for part in found])[:, None]
    places = torch.empty(tokens.numel(), dtype=torch.long)
    places[index[is_real]] = is_real.flatten().nonzero()[:, 0]
    return index, is_real, places


def locate(cosines: Tensor, is_real: Tensor, count: int) -> Tensor:
    """Greedy facility location: ``count`` tokens D for which ``sum_i max_{j in D} cos(i, j)`` is large.

    Each choice is the token that adds most to the sum (with nothing chosen, every maximum is -1, the least there is).
    Of those that add as much, up to rounding, it is the first: two tokens that are each other's nearest add the same.
    The sum is at least ``1 - 1/e`` of the largest there is, counted from -1.

    Args:
        cosines: ``[..., n, n]``.
        is_real: which tokens there are, ``[..., n]``.
        count: at most as many as there are.

    Returns:
        Their indices ``[..., count]``, in the order in which they were chosen.
    """
    cosines = cosines.masked_fill(~is_real[..., None], -1.0)  # a token that is none is nobody's concern
    best = torch.full_like(cosines[..., 0], -1.0)
    is_open, order, chosen = is_real.expand(best.shape), torch.arange(best.shape[-1], device=best.device), []
    for _ in range(count):
        gains = (cosines - best[..., None]).clamp_min(0).sum(-2).masked_fill(~is_open, -1.0)
        is_best = gains >= gains.amax(-1, keepdim=True) - TIE
        choice = torch.where(is_best, order, len(order)).amin(-1, keepdim=True)
        is_open = is_open.scatter(-1, choice, False)
        best = torch.maximum(best, cosines.gather(-1, choice[..., None, :].expand(*cosines.shape[:-1], 1))[..., 0])
        chosen.append(choice)
    return torch.cat(chosen, -1)


@dataclass
class FacilityState:
    """Of one block: where its destinations are, and the plan that serves until it is renewed."""

    chosen: Tensor | None = None  # [B, tiles, d], within the tiles
    plan: LinearPlan | None = None


@dataclass(frozen=True)
class FacilityTokens:
    """In every tile, the tokens that together are most like all of it (`locate`) are *destinations*; every token is
    spread over those of its tile.

    ``W = softmax over destinations of cos(x_D, x) / temperature``. A destination goes on as the mean of all tokens,
    weighted by its row of W, and a token gets the outputs of all destinations, weighted by its column. Both are matrix
    products of a fixed size: nothing is sorted or scattered. As the temperature goes to 0, a token belongs to the one
    destination that is most like it, and a constant is a constant at any.

    A tile of n tokens has ``n - int(ratio * n)`` destinations, at least one (where tiles differ in size, the smallest
    says how many). Destinations are chosen anew at every ``renew``-th step, and W is made anew at every
    ``reweigh``-th, for the destinations there are. Halves of batched guidance go by the mean of their cosines, for
    both. Nothing is drawn.

    Args:
        ratio: share of the tokens that is merged, 0 to 1.
        tile: side of a tile, about; 1 or more.
        temperature: above 0. Released code: 1e-3, by which nearly all of a token goes to one destination.
        renew, reweigh: steps, 1 or more.

    Raises:
        SettingError: a value is out of range.

    Memory: d numbers and two indices per token and block.
    """

    ratio: float = 0.5
    tile: int = 8
    temperature: float = 1e-3
    renew: int = 10
    reweigh: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1 or not self.temperature > 0:
            raise SettingError(
                f"FacilityTokens(ratio={self.ratio}, temperature={self.temperature}): ratio must be 0 to 1, and "
                "temperature above 0."
            )
        if min(self.tile, self.renew, self.reweigh) < 1:
            raise SettingError(
                f"FacilityTokens(tile={self.tile}, renew={self.renew}, reweigh={self.reweigh}): all must be 1 or more."
            )

    @property
    def needs_num_steps(self) -> bool:
        """Nothing follows the progress of the run."""
        return False

    @property
    def signal(self) -> Signal | None:
        """Nothing."""
        return None

    def init(self) -> FacilityState:
        """Nothing is chosen yet."""
        return FacilityState()

    def plan(self, state: FacilityState, place: TokenPlace, entering: Tensor) -> Plan | None:
        """A new plan, or the one that still serves; None where no tile merges a token."""
        (segment,), index = place.segments, place.step.index
        assert segment.grid is not None
        served = state.plan
        if served is not None and served.kept.device != entering.device:
            served = None
        if served is not None and index % self.renew and index % self.reweigh:
            return served
        tiles, is_real, places = tiles_of(segment.grid, self.tile)
        smallest = int(is_real.sum(1).min())
        count = max(smallest - int(self.ratio * smallest + 1e-9), 1)
        if count == smallest:
            return None
        tiles, is_real, places = (sent(each, entering.device) for each in (tiles, is_real, places))
        unit = normalize(entering.float(), dim=-1)[:, tiles]  # [B, tiles, n, D]
        pairs = place.batch * tiles.shape[0] * tiles.shape[1]
        if served is None or state.chosen is None or index % self.renew == 0:
            cosines, asked = _of_twins(unit @ unit.transpose(-1, -2), place.twins), tiles.shape[1]
            state.chosen = locate(cosines, is_real, count)
            cosines = cosines.gather(2, state.chosen[..., None].expand(*state.chosen.shape, tiles.shape[1]))
        else:
            theirs = unit.gather(2, state.chosen[..., None].expand(*state.chosen.shape, unit.shape[-1]))
            cosines, asked = _of_twins(theirs @ unit.transpose(-1, -2), place.twins), count
        weights = (cosines / self.temperature).softmax(2).masked_fill(~is_real[:, None], 0.0)
        state.plan = LinearPlan(
            kept=tiles.expand(place.batch, -1, -1).gather(2, state.chosen).flatten(1),
            weights=weights.to(entering.dtype),
            tiles=tiles.flatten().expand(place.batch, -1),
            places=places.expand(place.batch, -1),
            flops=2 * pairs * asked * entering.shape[-1],
        )
        return state.plan

    def tensors(self, state: FacilityState) -> Sequence[Tensor]:
        """The plan, and what it was made for."""
        return [] if state.plan is None or state.chosen is None else [state.chosen, *state.plan.tensors()]


def _of_twins(cosines: Tensor, twins: Tensor | None) -> Tensor:
    """Of rows that are twins their mean."""
    if twins is None:
        return cosines
    mean = (cosines + cosines.roll(len(cosines) // 2, 0)) / 2
    return torch.where(twins[:, None, None, None], mean, cosines)

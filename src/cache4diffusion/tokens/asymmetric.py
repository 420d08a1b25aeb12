"""Nearest destinations of queries, and of values, each by themselves: asymmetric reduction, of AsymRnR
(arXiv:2412.11706).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cache4diffusion.devices import sent
from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import Place
from cache4diffusion.gates.timetable import positions_of
from cache4diffusion.tokens.base import TokenPlace
from cache4diffusion.tokens.merging import destinations, merge_plan
from cache4diffusion.tokens.reduction import Plan, Signal

CHUNK = 4096  # sources whose distances are looked at together


def nearest(x: Tensor, dst: Tensor, src: Tensor, twins: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of every source the least squared distance to a destination, and to which one; both ``[B, sources]``.

    Args:
        x: tokens ``[B, N, D]``.
        dst, src: their indices, ``[destinations]`` and ``[sources]``.
        twins: rows that are matched together, by the mean of their distances.
    """
    wide = x.float()
    targets, distance, target = wide[:, dst], [], []
    for part in src.split(CHUNK):
        sources = wide[:, part]
        squares = sources.square().sum(-1)[..., None] + targets.square().sum(-1)[:, None]
        apart = squares - 2 * sources @ targets.mT
        if twins is not None:
            apart = torch.where(twins[:, None, None], (apart + apart.roll(len(apart) // 2, 0)) / 2, apart)
        least = apart.min(dim=-1)
        distance.append(least.values)
        target.append(least.indices)
    return torch.cat(distance, 1), torch.cat(target, 1)


def redundancy(x: Tensor, grid: tuple[int, int, int], window: tuple[int, ...]) -> Tensor:
    """How much of the tokens the first ones of all windows tell: ``1 - mean d / s``, a mean over rows.

    ``d`` is a token's squared distance to the nearest of them, and ``s`` that of two tokens on average. 1 where all
    tokens of a row are alike, about 0 where the nearest is as far as any.

    Args:
        x: tokens ``[B, N, D]``.
        grid: frames, rows and columns.
        window: likewise.
    """
    dst = destinations(grid, fitting(window, grid), None).to(x.device)
    wide = x.float()
    centred = wide - wide.mean(1, keepdim=True)  # so that little is lost where all are nearly alike
    distance = nearest(centred, dst, others(dst, x.shape[1]))[0].mean(1)
    spread, size = 2 * centred.square().sum(-1).mean(1), wide.square().sum(-1).mean(1)
    return torch.where(spread > 1e-6 * size, 1 - distance / spread, torch.ones_like(spread)).mean()


def fitting(window: tuple[int, ...], grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """The window, no larger than the grid."""
    frames, rows, columns = (min(pair) for pair in zip(window, grid, strict=True))
    return frames, rows, columns


def others(dst: Tensor, length: int) -> Tensor:
    """The tokens that are no destinations, in order."""
    is_dst = torch.zeros(length, dtype=torch.uint8, device=dst.device).scatter_(0, dst, 1)
    return is_dst.sort(stable=True).indices[: length - len(dst)]


@dataclass
class AsymmetricState:
    """Of the queries, or of the values, of one attention."""

    made: int = -1  # of how many-th renewal what follows is
    dst: Tensor | None = None  # [destinations]
    src: Tensor | None = None  # [sources]
    target: Tensor | None = None  # [B, sources]
    order: Tensor | None = None  # [B, sources]: from the nearest to the farthest
    plan: Plan | None = None


@dataclass(frozen=True)
class AsymmetricTokens:
    """One token of each window is a *destination*; of the others, those nearest to one are dropped and stand behind it.

    Nearest by squared distance, in each row by itself (of attention, a row is a head). Of N tokens
    ``max(int(N (1 - ratio)), destinations)`` are left. Nothing is averaged: what is left goes on as it is.

    Destinations are drawn on the host, the same on every device and for every row, and kept with the matching for
    ``renew`` steps. Halves of batched guidance are matched together.

    Args:
        ratio: share of the tokens that is dropped, 0 to 1, where ``ratios`` says nothing.
        ratios: by what is reduced, ``"query"`` or ``"value"``, and the module's path, the ratio of every step; 0 for
            those that are not named. None: ``ratio`` everywhere.
        value_ratio: the ratio of values (and keys); None: as of others.
        window: frames, rows and columns of a window. Released code: (6, 2, 2), of CogVideoX (2, 2, 2).
        renew: steps that a matching serves. Released code: 1 to 5.
        seed: of the draws.
        levels: the noise levels of the steps in ``ratios``, if known.
        resample: whether runs of other steps or levels take the ratios of the nearest.

    Raises:
        SettingError: a value is out of range.

    Memory: two indices per token, head and attention, and those of a plan.
    """

    ratio: float = 0.5
    ratios: Mapping[str, tuple[float, ...]] | None = None
    value_ratio: float | None = None
    window: tuple[int, ...] = (6, 2, 2)
    renew: int = 1
    seed: int = 0
    levels: tuple[float, ...] | None = None
    resample: bool = False

    def __post_init__(self) -> None:
        named = {value for values in (self.ratios or {}).values() for value in values}
        shares = [self.ratio, *named, *(() if self.value_ratio is None else (self.value_ratio,))]
        if not all(0 <= share <= 1 for share in shares):
            raise SettingError(
                f"AsymmetricTokens(ratio={self.ratio}, value_ratio={self.value_ratio}): these and all ratios must be "
                "shares, 0 to 1."
            )
        if len(self.window) != 3 or min(self.window) < 1 or self.renew < 1:
            raise SettingError(
                f"AsymmetricTokens(window={self.window}, renew={self.renew}): a window has frames, rows and columns; "
                "these and renew must be 1 or more."
            )

    @property
    def needs_num_steps(self) -> bool:
        """To see whether the ratios fit."""
        return bool(self.ratios)

    @property
    def signal(self) -> Signal | None:
        """Nothing of other steps."""
        return None

    def init(self) -> AsymmetricState:
        """Nothing is matched yet."""
        return AsymmetricState()

    def plan(self, state: AsymmetricState, place: TokenPlace, entering: Tensor) -> Plan | None:
        """What is left at this step."""
        (segment,), (batch, length, dim) = place.segments, entering.shape
        assert segment.grid is not None
        window = fitting(self.window, segment.grid)
        fewest = math.prod(side // piece for side, piece in zip(segment.grid, window, strict=True))
        left = max(int(length * (1 - self._ratio(place)) + 1e-9), fewest)
        if left == length:
            return None
        renewal, flops = place.step.index // self.renew, 0
        if state.made != renewal or state.dst is None or state.dst.device != entering.device:
            key = f"{self.seed}/{renewal}/{place.part}/{place.kind}"
            generator = torch.Generator("cpu").manual_seed(zlib.crc32(key.encode()))
            state.dst = sent(destinations(segment.grid, window, generator), entering.device)
            state.src, state.made, state.plan = others(state.dst, length), renewal, None
            distance, state.target = nearest(entering, state.dst, state.src, place.twins)
            state.order = distance.sort(dim=1, stable=True).indices
            flops = 2 * batch * len(state.src) * len(state.dst) * dim
        assert state.dst is not None and state.src is not None
        assert state.target is not None and state.order is not None
        if state.plan is None or state.plan.length != left:
            dst, src = (index.expand(batch, -1) for index in (state.dst, state.src))
            state.plan = merge_plan(dst, src, state.target, state.order[:, : length - left], "pick", flops=flops)
        return state.plan

    def _ratio(self, place: TokenPlace) -> float:
        """The share that is dropped."""
        if self.ratios is None:
            return self.value_ratio if place.kind == "value" and self.value_ratio is not None else self.ratio
        ratios = self.ratios.get(f"{place.kind} {place.part}")
        if ratios is None:
            return 0.0
        run = Place(place.step.num_steps, place.levels)
        positions = positions_of(run, len(ratios), self.levels, resample=self.resample)
        return ratios[round(positions[place.step.index])]

    def tensors(self, state: AsymmetricState) -> Sequence[Tensor]:
        """The matching and the plan."""
        held = [state.dst, state.src, state.target, state.order]
        return [*(each for each in held if each is not None), *(state.plan.tensors() if state.plan is not None else ())]

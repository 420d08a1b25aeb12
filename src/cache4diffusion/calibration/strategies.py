"""What DaTo searches for: how deep a U-Net is computed at each step, and on how many tokens (arXiv:2501.00375)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cache4diffusion.calibration.calibrator import Fit, Shape, Sums
from cache4diffusion.calibration.figure import Figure
from cache4diffusion.calibration.search import Found, Genome, Search
from cache4diffusion.settings import setting
from cache4diffusion.sites import ReducedLevel

MADE_FOR = 50
THIRDS = ((15, 5), (20, 3), (15, 5))  # steps of each "third" of 50, and how many of them may be full
DEPTHS = (0, 1, 2)
FULL = 2


def full_counts(steps: int) -> list[tuple[int, int]]:
    """Steps of each third of a run, and how many of them may be full: as of 50 steps, at least one each."""
    found, start, end = [], 0, 0
    for length, count in THIRDS:
        end += length
        stop = round(end * steps / MADE_FOR)
        found.append((stop - start, min(max(round(count * steps / MADE_FOR), 1), stop - start)))
        start = stop
    return found


@dataclass(frozen=True)
class Strategies(Search):
    """Strategies of which none is both cheaper and closer to the uncached result: a depth and a ratio per step.

    A genome has a depth of 0, 1 or 2 and a ratio for every step; the first step's depth is 2. Of the first 30 %, next
    40 % and last 30 % of the steps at most 5, 3 and 5 in 50 are full, as in the paper: surplus ones are made depth 1.

    The paper searches depths first (on 32 prompts: ImageReward up, time down), then ratios (FID down, time down), each
    for 100 generations. Here it is one search for both; neither a reward model nor a set of images is at hand, so that
    the result is compared with the uncached one, and FLOPs stand for time.
    """

    ratios: tuple[float, ...] = setting((0.3, 0.4, 0.5, 0.6, 0.7), "among which are chosen. Paper: 0.3 to 0.7")

    @property
    def site(self) -> ReducedLevel:
        """The method's own."""
        return ReducedLevel()

    def choices(self, num_steps: int) -> Sequence[int]:
        """A depth and a ratio for every step."""
        return (len(DEPTHS),) * num_steps + (len(self.ratios),) * num_steps

    def repaired(self, genome: Genome, generator: torch.Generator) -> Genome:
        """With a full first step, and no more full ones than each third may have."""
        steps = len(genome) // 2
        depths, start = [FULL, *genome[1:steps]], 0
        for length, most in full_counts(steps):
            full = [i for i in range(start, start + length) if i > 0 and depths[i] == FULL]
            allowed = most - (start == 0)
            order = torch.randperm(len(full), generator=generator).tolist()
            for place in order[allowed:]:
                depths[full[place]] = FULL - 1
            start += length
        return (*depths, *genome[steps:])

    def settings(self, genome: Genome) -> dict[str, Any]:
        """Depths and ratios."""
        steps = len(genome) // 2
        return {"strategy": genome[:steps], "ratios": tuple(self.ratios[gene] for gene in genome[steps:])}

    def tensors(self, front: Sequence[Found]) -> Mapping[str, Tensor]:
        """The strategies, the cheapest first, with their objectives."""
        settings = [self.settings(found.genome) for found in front]
        named = {name: [one[name] for one in settings] for name in ("strategy", "ratios")}
        named |= {"cost": [found.cost for found in front], "error": [found.error for found in front]}
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in named.items()}

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """By strategy and step."""
        return {"strategy": (None, num_steps), "ratios": (None, num_steps), "cost": (None,), "error": (None,)}

    def figure(self, sums: Sums, fit: Fit) -> Figure:
        """All that were tried, and those that are left."""
        tried = [(cost, error) for cost, error in sums["tried"].tolist()]
        left = list(zip(fit.tensors["cost"].tolist(), fit.tensors["error"].tolist(), strict=True))
        return Figure("share of the FLOPs", "error", points={"tried": tried}, lines={"left": left})

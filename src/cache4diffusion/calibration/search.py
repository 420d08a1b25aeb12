"""What a search is: settings of a method found by sampling with many of them, cheaper and closer ones over others.

The contract, drawn once::

    results = <the prompts' uncached results>
    population = <random genomes>                               # lists of small whole numbers, made valid by repaired()
    for each of ``generations``:
        cost, error = <sample the prompts with search.settings(genome)>       # FLOPs, distance from the results
        population += <children of two, chosen by fronts and distances>
        population  = <the best ``population`` of them>                        # NSGA-II
    fit = search.tensors(<all genomes that no other one beats in both>)

The object is frozen settings. The engine runs what is tried as it runs any method. The multi-objective evolution is
NSGA-II (Deb et al. 2002): genomes are ranked by fronts of those that no other one dominates, and within a front by how
far their neighbours on it are; two tournaments choose parents.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cache4diffusion.calibration.calibrator import Calibrator
from cache4diffusion.calibration.quality import GOOD, POOR, Quality
from cache4diffusion.settings import setting

Genome = tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """A genome that was tried.

    Args:
        genome: which.
        cost: the share of the uncached runs' FLOPs that it takes.
        error: ``|x - x0| / |x0|`` of the results, a mean over the prompts; x0 is the uncached one.
    """

    genome: Genome
    cost: float
    error: float

    def beats(self, other: Found) -> bool:
        """Whether it is as good in both objectives and better in one."""
        is_as_good = self.cost <= other.cost and self.error <= other.error
        return is_as_good and (self.cost < other.cost or self.error < other.error)


Evaluate = Callable[[Genome], Found]


@dataclass(frozen=True)
class Search(Calibrator):
    """Base of every search: frozen settings, declared with `setting`.

    Cost: ``population (generations + 1)`` runs per prompt at most; a genome that was tried is not sampled again.
    """

    population: int = setting(16, "genomes that live at a time. Paper: 25 (ratios)", ge=4)
    generations: int = setting(10, "how often they have children. Paper: 100", ge=1)
    mutation: float = setting(0.05, "chance of every number of a child to be drawn anew", ge=0, le=1)
    seed: int = setting(0, "of the draws", ge=0)

    @abstractmethod
    def choices(self, num_steps: int) -> Sequence[int]:
        """How many values each number of a genome can have: 0 to that, exclusive."""

    @abstractmethod
    def repaired(self, genome: Genome, generator: torch.Generator) -> Genome:
        """The genome itself, or a valid one near it."""

    @abstractmethod
    def settings(self, genome: Genome) -> dict[str, Any]:
        """Settings of the method."""

    @abstractmethod
    def tensors(self, front: Sequence[Found]) -> Mapping[str, Tensor]:
        """What the method takes of those that are left, the cheapest first."""

    def drawn(self, num_steps: int, generator: torch.Generator) -> Genome:
        """A random genome."""
        genome = tuple(_below(count, generator) for count in self.choices(num_steps))
        return self.repaired(genome, generator)

    def judge(self, tried: Sequence[Found], front: Sequence[Found]) -> Quality:
        """How much better what is left is than what it began with, at no more FLOPs each.

        Args:
            tried: everything, in the order in which it was; first the random population.
            front: what is left.
        """
        began = tried[: self.population]
        ratios = [
            math.log(max(min(f.error for f in front if f.cost <= b.cost), 1e-12) / max(b.error, 1e-12)) for b in began
        ]
        share = math.exp(sum(ratios) / len(ratios))
        words = (
            f"{len(front)} of {len(tried)} strategies are left; at as many FLOPs they have {share:.0%} of the error of "
            "random ones"
        )
        avoided = 1 - share
        if avoided >= GOOD:
            words = f"{words}: a sound basis."
        elif avoided >= POOR:
            words = f"{words}: compare before use."
        else:
            words = f"{words}: little was gained; use more generations."
        return Quality(avoided, sum(f.error for f in front) / len(front), len(tried), words)


def evolve(
    search: Search, num_steps: int, evaluate: Evaluate, advance: Callable[[str], None] = lambda words: None
) -> list[Found]:
    """Every genome that was tried, in that order.

    Args:
        search: its settings.
        num_steps: of a run.
        evaluate: samples with a genome.
        advance: told of each.
    """
    generator = torch.Generator().manual_seed(search.seed)
    known: dict[Genome, Found] = {}

    def of(genome: Genome) -> Found:
        if genome not in known:
            known[genome] = evaluate(genome)
        best = min(known.values(), key=lambda found: found.error)
        advance(f"search, {len(known)} tried, least error {best.error:.3g}")
        return known[genome]

    living = [of(search.drawn(num_steps, generator)) for _ in range(search.population)]
    for _ in range(search.generations):
        order = ranked(living)
        children = [of(_child(search, num_steps, order, generator)) for _ in range(search.population)]
        every = {found.genome: found for found in (*living, *children)}
        living = ranked(list(every.values()))[: search.population]
    return list(known.values())


def _child(search: Search, num_steps: int, order: Sequence[Found], generator: torch.Generator) -> Genome:
    """Of two parents, each the better one of two; every number from either, and sometimes from none."""
    parents = [min(_below(len(order), generator) for _ in range(2)) for _ in range(2)]
    numbers = []
    for place, count in enumerate(search.choices(num_steps)):
        is_new = float(torch.rand((), generator=generator)) < search.mutation
        inherited = order[parents[_below(2, generator)]].genome[place]
        numbers.append(_below(count, generator) if is_new else inherited)
    return search.repaired(tuple(numbers), generator)


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def fronts(tried: Sequence[Found]) -> list[list[Found]]:
    """Those that no other beats, then those that none of the rest beats, and so on."""
    rest, found = list(tried), []
    while rest:
        found.append(unbeaten(rest))
        rest = [one for one in rest if one not in found[-1]]
    return found


def unbeaten(tried: Sequence[Found]) -> list[Found]:
    """Those that no other beats."""
    return [one for one in tried if not any(other.beats(one) for other in tried)]


def front_of(tried: Sequence[Found]) -> list[Found]:
    """Those that no other beats, the cheapest first; of equals the first."""
    best = {(found.cost, found.error): found for found in reversed(unbeaten(tried))}
    return [best[key] for key in sorted(best)]


def distances(front: Sequence[Found]) -> list[float]:
    """How far the neighbours of each are apart, as shares of the whole front's span; infinite at its ends."""
    total = [0.0] * len(front)
    for value in (lambda found: found.cost, lambda found: found.error):
        order = sorted(range(len(front)), key=lambda place: value(front[place]))
        span = value(front[order[-1]]) - value(front[order[0]])
        total[order[0]] = total[order[-1]] = math.inf
        for before, place, after in zip(order, order[1:], order[2:], strict=False):
            total[place] += (value(front[after]) - value(front[before])) / span if span else 0.0
    return total


def ranked(tried: Sequence[Found]) -> list[Found]:
    """The best first: by front, and within one the loneliest."""
    found = []
    for front in fronts(tried):
        apart = distances(front)
        found += [front[place] for place in sorted(range(len(front)), key=lambda place: -apart[place])]
    return found

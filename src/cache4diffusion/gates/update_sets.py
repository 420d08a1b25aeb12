"""Which steps refresh each part of a denoiser, by how alike its outputs are: the schedules of BAC, arXiv:2506.13456."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from cache4diffusion.errors import SettingError

Matrix = Sequence[Sequence[float]]  # [i][j]: how alike the output of step j is to that of step i


def update_steps(similarity: Matrix, budget: int) -> tuple[int, ...]:
    """The ``budget`` steps, 0 among them, whose outputs stand best for those of the steps behind them.

    They maximise ``sum over j of similarity[c(j)][j]`` for the last update step ``c(j)`` before or at ``j``, found by
    dynamic programming over (number of updates that follow, update step). Of equal sets the one with the earlier steps.

    Args:
        similarity: ``[K][K]`` for a run of K steps; only ``j > i`` is read.
        budget: 1 to K steps.

    Raises:
        SettingError: the budget is out of range.
    """
    count = len(similarity)
    if not 1 <= budget <= count:
        raise SettingError(f"update_steps(budget={budget}): budget must be 1 to {count} steps.")
    reach = [_running(row, i) for i, row in enumerate(similarity)]  # [i][j]: sum of similarity[i][i + 1 .. j]
    worth = [sums[-1] for sums in reach]  # of the steps behind update step i, if so many updates follow: here none
    following: list[list[int]] = []  # the update step behind i that is worth most, and of equals the first
    for _ in range(budget - 1):
        best = [
            max(((reach[i][j - 1] + worth[j], -j) for j in range(i + 1, count)), default=(float("-inf"), 0))
            for i in range(count)
        ]
        worth = [gained for gained, _ in best]
        following.append([-j for _, j in best])
    steps = [0]
    for after in reversed(following):
        steps.append(after[steps[-1]])
    return tuple(steps)


def _running(row: Sequence[float], start: int) -> list[float]:
    sums, total = [0.0] * len(row), 0.0
    for j in range(start + 1, len(row)):
        total += row[j]
        sums[j] = total
    return sums


def caching_error(similarity: Matrix, steps: Sequence[int]) -> float:
    """What is lost by going on with the outputs of ``steps``: ``sum over j of 1 - similarity[c(j)][j]``."""
    borders = [*steps, len(similarity)]
    return sum(1 - similarity[i][j] for i, end in pairwise(borders) for j in range(i + 1, end))


def bubbled(
    updates: Mapping[str, tuple[int, ...]], errors: Mapping[str, float], readers: Sequence[str], sources: int
) -> dict[str, tuple[int, ...]]:
    """Refresh what a feed-forward part reads whenever it is refreshed itself, or it would amplify an old error.

    From the last of ``readers`` to the first: its update steps become update steps of those ``sources`` parts in front
    of it whose caching error is largest as well. Steps are only added.

    Args:
        updates: update steps of every part, in the order in which parts run.
        errors: caching error of every part.
        readers: the feed-forward parts.
        sources: how many parts in front of each, 0 or more.
    """
    order, found = list(updates), {name: set(steps) for name, steps in updates.items()}
    for reader in sorted(readers, key=order.index, reverse=True):
        upstream = sorted(order[: order.index(reader)], key=lambda name: (-errors[name], order.index(name)))
        for name in upstream[:sources]:
            found[name] |= found[reader]
    return {name: tuple(sorted(steps)) for name, steps in found.items()}

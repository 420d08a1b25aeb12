"""Weights that the bases share: differences of a feature between full steps, and the polynomial through them."""

from __future__ import annotations

from collections.abc import Sequence


def ladder(times: Sequence[float], order: int, first_difference_step: float = 0) -> list[list[float]]:
    """Differences of order 0 .. ``order`` at the newest full step, each as weights of the snapshots, newest first.

    TaylorSeer's released recursion, run on unit vectors: ``d_0`` is the snapshot; ``d_m`` is the change of ``d_{m-1}``
    since the full step before, divided by the distance of those two steps, whatever earlier distances were.

    Args:
        times: of the snapshots, newest first.
        order: highest difference wanted; fewer come back where there are not enough full steps.
        first_difference_step: full steps before this one give no differences.
    """
    count = len(times)
    rungs: list[list[float]] = []
    for newest in range(count - 1, -1, -1):  # from the oldest full step to the newest
        fresh = [[1.0 if j == newest else 0.0 for j in range(count)]]
        if rungs and times[newest] >= first_difference_step:
            gap = times[newest] - times[newest + 1]
            for m in range(min(order, len(rungs))):
                fresh.append([(a - b) / gap for a, b in zip(fresh[m], rungs[m], strict=True)])
        rungs = fresh
    return rungs


def combine(rungs: Sequence[Sequence[float]], factors: Sequence[float]) -> list[float]:
    """``sum over m of factors[m] * rungs[m]``: weights of the snapshots."""
    return [sum(f * w for f, w in zip(factors, column, strict=True)) for column in zip(*rungs, strict=True)]


def powers(k: float, count: int) -> list[float]:
    """``k^m / m!`` for m = 0 .. count - 1."""
    factors = [1.0]
    for m in range(1, count):
        factors.append(factors[-1] * k / m)
    return factors


def lagrange(times: Sequence[float], time: float) -> list[float]:
    """Weights of the polynomial through all snapshots, evaluated at ``time``."""
    weights = []
    for j, own in enumerate(times):
        weight = 1.0
        for i, other in enumerate(times):
            if i != j:
                weight *= (time - other) / (own - other)
        weights.append(weight)
    return weights

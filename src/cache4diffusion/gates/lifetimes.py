"""How long what was computed stays good, by how much it changes from step to step: the schedules of Block Caching."""

from __future__ import annotations

from collections.abc import Sequence


def accumulated_steps(changes: Sequence[float], threshold: float) -> tuple[int, ...]:
    """The full steps: those at which the changes since the last full one sum up to more than ``threshold``.

    Changes of 0.2 with threshold 0.5 over 7 steps are ``FccFccF``. What counts is the sum of the changes of single
    steps, not (as in SmoothCache) the change over all of them.

    Args:
        changes: ``r[i]``, of step i since step i - 1; ``r[0]`` is not read.
        threshold: largest sum that is cached; 0 is full everywhere.
    """
    full, total = [0], 0.0
    for step in range(1, len(changes)):
        total += changes[step]
        if total > threshold or threshold == 0:
            full.append(step)
            total = 0.0
    return tuple(full)

"""From what routers have learned to a schedule per part."""

from __future__ import annotations

from collections.abc import Sequence


def routed_steps(probabilities: Sequence[float], threshold: float) -> tuple[int, ...]:
    """The full steps of a part: those with ``p > threshold`` or ``p = 1``, and the first.

    ``routed_steps([0.2, 0.05, 1.0, 0.05], 0.1)`` is ``FcFc``, at any threshold above 0.05.

    Args:
        probabilities: by step, that the part is worth computing; exactly 1 where it is always computed.
        threshold: published: 0.1; 0 is full everywhere.
    """
    return tuple(step for step, p in enumerate(probabilities) if step == 0 or p > threshold or p >= 1 or threshold == 0)

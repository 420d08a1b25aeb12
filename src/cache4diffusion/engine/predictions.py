"""Predictions of many sites at a time.

A cached step asks for the prediction of one site after the other, and each is a few small operations. Where predictions
are sums of snapshots with the same weights, as at sites that were computed at the same steps, those that will be asked
for next are made along with the one that is: in as many operations as one alone takes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import Tensor

from cache4diffusion.predictors import LinearPredictor
from cache4diffusion.predictors.history import History, WeightedSum, add_up
from cache4diffusion.storage import GROUP_BYTES


class Predictions:
    """The predictions of one call, handed out one by one.

    Sites are taken in order, as many at a time as their sums need `GROUP_BYTES`; of these, the ones with equal weights
    are a group, and it is made when the first of them is asked for. So no more than that lies here waiting. Alone are
    made: what is a snapshot as it lies, and what is to be fetched from another device or unpacked from few bits, since
    that takes room too (and is on its way for one site at a time).

    Args:
        predictor: makes them.
        states: what is remembered of each site, in the order in which they will be asked for.
        time: of the step.
    """

    def __init__(self, predictor: LinearPredictor, states: Mapping[str, History], time: float) -> None:
        groups: dict[Hashable, dict[str, WeightedSum]] = {}
        window, size = 0, 0
        for name, state in states.items():
            found = predictor.sum_at(state, time)
            if found is None:
                continue
            needed = found.nbytes if found.is_direct else 0
            if size + needed > GROUP_BYTES:
                window, size = window + 1, 0
            size += needed
            groups.setdefault((window, found.weights) if needed else name, {})[name] = found
        self._groups = {name: group for group in groups.values() for name in group}
        self._made: dict[str, list[Tensor]] = {}

    def take(self, name: str) -> list[Tensor] | None:
        """The prediction of a site, once; None if it is none of those that are made here."""
        group = self._groups.pop(name, None)
        if group is not None and name not in self._made:
            self._made.update(zip(group, add_up(list(group.values())), strict=True))
        return self._made.pop(name, None)

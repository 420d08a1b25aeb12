"""Observing what enters each block (DBPrune)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cache4diffusion.engine.decide import relative_change
from cache4diffusion.engine.driver import Inner
from cache4diffusion.engine.observers.base import Observer, Seen
from cache4diffusion.engine.state import Context
from cache4diffusion.gates import Entrance


class EntranceObserver(Observer):
    """Sees what enters each block that decides for itself, in front of it."""

    watch: Entrance
    sees_streams = True

    def before(
        self, context: Context, position: int, inner: Inner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Decide about this block."""
        if position in self.driver.keys:
            entered = self.host.stream_inputs(position, args, kwargs)[0]
            context.scratch["entering"] = entered[0].numel()
            self.meet(context, position, lambda: {position: entered})

    def score(self, now: Seen, then: Seen) -> Tensor:
        """Its relative change."""
        ((name, entered),) = now.items()
        return relative_change(entered, then[name], self.per_row, self.watch.norm, self.host.group)

    def tell(self, context: Context, scores: list[float]) -> list[Any]:
        """With ``leaders`` also what the step's first blocks scored, on average; with a size, how much entered."""
        if self.watch.with_size:
            entering = self.host.group.count(context.scratch["entering"])
            return [(score, entering) for score in scores]
        if not self.watch.leaders:
            return scores
        earlier = [verdict.scores for verdict in context.verdicts.values()]
        return [(score, self._leading(earlier, unit)) for unit, score in enumerate(scores)]

    def _leading(self, earlier: list[tuple[Any, ...]], unit: int) -> float | None:
        asked = [scores[unit][0] for scores in earlier if scores[unit] is not None]
        positive = [score for score in asked[: self.watch.leaders] if score > 0]
        return sum(positive) / len(positive) if positive else None

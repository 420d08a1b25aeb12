"""Observing what enters each block (DBPrune), and how far it turns that (QuantCache)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cache4diffusion.engine.decide import relative_change, turned
from cache4diffusion.engine.driver import Inner
from cache4diffusion.engine.observers.base import Observer, Seen, remember
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

    def after(
        self, context: Context, position: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Keep how far a block that ran turned what entered it."""
        verdict, kept = context.verdicts.get(position), context.state.references
        if not self.watch.with_angle or verdict is None or verdict.is_cached or position not in kept:
            return
        left = self.host.stream_outputs(position, args, kwargs, output)[0]
        angles = turned(kept[position], left, self.per_row, self.host.group)
        remember(kept, ("angle", position), angles, None if verdict.is_full else verdict.full_rows, is_shared=False)

    def measured(self, context: Context, key: int, now: Seen, then: Seen) -> Tensor:
        """The change, and with ``with_angle`` how far the block's last run turned what entered (NaN: not known)."""
        change = super().measured(context, key, now, then)
        if not self.watch.with_angle:
            return change
        angles = context.state.references.get(("angle", key))
        return torch.stack([change, torch.full_like(change, math.nan) if angles is None else angles])

    def tell(self, context: Context, scores: list[Any]) -> list[Any]:
        """With ``leaders`` also what the step's first blocks scored, on average; with a size, how much entered; with an
        angle, that of the block's last run."""
        if self.watch.with_angle:
            return [(change, None if math.isnan(angle) else angle) for change, angle in zip(*scores, strict=True)]
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

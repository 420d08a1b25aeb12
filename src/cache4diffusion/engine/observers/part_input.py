"""Observing what enters each part (LazyDiT)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cache4diffusion.engine.observers.base import Observer
from cache4diffusion.engine.state import Context
from cache4diffusion.gates import PartInput, Place, logit_of
from cache4diffusion.gates.timetable import nearest_steps


class PartInputObserver(Observer):
    """Asked by the driver in front of each part."""

    watch: PartInput

    @property
    def needs_blocks(self) -> bool:
        """Parts are met without them."""
        return False

    def install(self) -> None:
        """The driver knows where parts are."""
        self.driver.ask = self.ask  # type: ignore[attr-defined] - compositions give this watch to gated parts only
        self._weights: dict[tuple[str, int], Tensor] = {}

    def ask(self, context: Context, key: int, part: str, entering: Sequence[Tensor]) -> None:
        """Decide about a part, unless that was done in front of its first module."""
        if key in context.verdicts:
            return

        def observe() -> list[float]:
            self.host.trace.syncs += 1
            return self.scores(context, part, entering).tolist()

        self.decisions.take(context, key, observe)

    def scores(self, context: Context, part: str, entering: Sequence[Tensor]) -> Tensor:
        """``sigmoid(sum z @ w)`` per row, or their mean; shape [rows] or [1]."""
        weights = self._weights_at(context, part, entering[0].device)
        if weights is None:
            scores = torch.full((entering[0].shape[0],), 0.5)
        else:
            (logits,) = self.host.group.total(logit_of(entering, weights))
            scores = logits.sigmoid()
        return scores if self.per_row else scores.mean().reshape(1)

    def _weights_at(self, context: Context, part: str, device: torch.device) -> Tensor | None:
        table = self.watch.weights.get(part)
        run, index = context.call.run, context.step.index
        steps = nearest_steps(self.watch, Place(context.step.num_steps, run.timesteps))
        row = index if steps is None else steps[min(index, len(steps) - 1)]
        if table is None or row >= len(table):
            return None
        if (part, row) not in self._weights or self._weights[part, row].device != device:
            self._weights[part, row] = table[row].to(device, torch.float32)
        return self._weights[part, row]

"""Observing the denoiser's input and output from outside (EasyCache)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cache4diffusion.engine.decide import mean_sizes
from cache4diffusion.engine.leaves import flatten
from cache4diffusion.engine.observers.base import Observe, Observer, remember
from cache4diffusion.engine.state import Context


class DriftObserver(Observer):
    """Sees the latent and the output."""

    def look(self, context: Context) -> Observe:
        """How much the output should change, by what it did between the last two full steps."""
        kept, latent = context.state.references, context.latent
        assert latent is not None

        def observe() -> list[float | None]:
            if "rate" not in kept:
                return [None] * len(context.state.units[0])
            self.host.trace.syncs += 1
            moved, size = self.sizes(latent - kept["latent"], kept["output"])
            score = kept["rate"] * moved / size
            still = (moved == 0) & kept["rate"].isfinite()
            return torch.where(still, torch.zeros_like(score), score).tolist()

        return observe

    def sizes(self, *tensors: Tensor) -> list[Tensor]:
        """Mean size of each."""
        return mean_sizes(*tensors, per_row=self.per_row, group=self.host.group)

    def finish(self, context: Context, output: Any) -> None:
        """On a full step learn how the output answers to the latent; remember this latent on every step."""
        kept, latent, verdict = context.state.references, context.latent, context.verdicts[0]
        assert latent is not None
        if not verdict.is_cached:
            rows = None if verdict.is_full else verdict.full_rows
            reached = next(leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor))
            if "output" in kept:
                answered, moved = self.sizes(reached - kept["output"], latent - kept["full_latent"])
                rate = torch.where(answered == 0, torch.zeros_like(moved), answered / moved)
                remember(kept, "rate", rate, rows if self.per_row else None)
            remember(kept, "output", reached, rows)
            remember(kept, "full_latent", latent, rows)
        remember(kept, "latent", latent)

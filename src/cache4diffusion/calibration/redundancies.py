"""What AsymRnR measures: how redundant the queries and the values of each attention are. Source: arXiv:2412.11706."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cache4diffusion.calibration.calibrator import Fit, Shape, Sums
from cache4diffusion.calibration.figure import Figure
from cache4diffusion.calibration.statistic import Seen, StepMeans
from cache4diffusion.settings import setting
from cache4diffusion.sites import ReducedAttention
from cache4diffusion.tokens import AsymmetricTokens
from cache4diffusion.tokens.asymmetric import redundancy


@dataclass(frozen=True)
class Redundancies(StepMeans):
    """`redundancy` of queries and of values at every step, of every self-attention by itself, ``[K]`` each.

    As the method meets them: normalised, with their positions, head by head. A mean over prompts and branches. A
    table's name says what, and the path: ``query transformer_blocks.0.attn``.
    """

    effect: ClassVar[str] = "how redundant tokens are"

    window: tuple[int, ...] = setting((6, 2, 2), "frames, rows and columns of a window, as the method's")

    @property
    def site(self) -> ReducedAttention:
        """The method's own."""
        return ReducedAttention()

    @property
    def tokens(self) -> AsymmetricTokens:
        """The method's own, at rest."""
        return AsymmetricTokens(ratio=0.0, window=self.window)

    def measure(self, memory: dict[str, Any], seen: Seen) -> Mapping[str, tuple[int, Tensor]]:
        """How redundant they are in this call."""
        found = {}
        for path, (query, value, grid) in seen.features.items():
            frames, rows, columns = grid.tolist()
            for name, x in (("query", query), ("value", value)):
                found[f"{name} {path}"] = (seen.step, redundancy(x, (frames, rows, columns), self.window))
        return found

    def figure(self, sums: Sums, fit: Fit) -> Figure:
        """Means over attentions, by step."""
        lines = {}
        for kind in ("query", "value"):
            tables = [table for name, table in fit.tensors.items() if name.startswith(kind)]
            mean = torch.stack(tables).mean(0).tolist()
            lines[kind] = [(float(i), value) for i, value in enumerate(mean)]
        return Figure("step", "share of the tokens' spread that a few of them tell", lines=lines)

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """A table per attention, of queries and of values."""
        return {"query *": (num_steps,), "value *": (num_steps,)}

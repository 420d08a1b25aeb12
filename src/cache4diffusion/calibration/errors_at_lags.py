"""What SmoothCache measures: how far a part's output is from its output some steps later. Source: arXiv:2411.10510."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cache4diffusion.calibration.calibrator import Fit, Shape, Sums
from cache4diffusion.calibration.figure import Figure
from cache4diffusion.calibration.relative import relative_l1
from cache4diffusion.calibration.statistic import Seen, StepMeans
from cache4diffusion.settings import setting
from cache4diffusion.sites import Parts


@dataclass(frozen=True)
class LagErrors(StepMeans):
    """``E_r[i] = |o_i - o_(i+r)|_1 / |o_(i+r)|_1`` for lags r = 1 .. lookahead, a mean over the blocks of a kind.

    In float32, over tokens, channels and the whole batch, divided by the *later* output, as in the released code. Row
    ``r - 1`` of a kind's table is lag r; its last r entries have no later step and are 0.

    Memory: ``lookahead`` copies of every part's output.
    """

    effect: ClassVar[str] = "how much features differ between steps"

    lookahead: int = setting(3, "most steps between two compared outputs. Code: 3", ge=1, le=16)

    @property
    def site(self) -> Parts:
        """Every part, with a decision per kind."""
        return Parts(decisions="kind")

    def measure(self, memory: dict[str, Any], seen: Seen) -> Mapping[str, tuple[int, Tensor]]:
        """The errors of the last steps' outputs if they were reused now, by lag; a mean over the blocks of a kind."""
        now: dict[str, list[list[Tensor]]] = {}
        for name, leaves in seen.features.items():
            now.setdefault(seen.decisions[name], []).append([leaf.detach().clone() for leaf in leaves])
        past: deque[dict[str, list[list[Tensor]]]] = memory.setdefault("past", deque(maxlen=self.lookahead))
        found = {}
        for kind, parts in now.items():
            errors = torch.full((self.lookahead,), torch.nan, dtype=torch.float64)
            for lag, then in enumerate(reversed(past)):
                if len(then.get(kind, [])) == len(parts):
                    pairs = zip(then[kind], parts, strict=True)
                    errors[lag] = sum(relative_l1(before, after) for before, after in pairs) / len(parts)
            found[kind] = (seen.step, errors)
        past.append(now)
        return found

    def fit(self, sums: Sums) -> Fit:
        """Means, moved to the step that would be computed."""
        later = super().fit(sums)
        tables = {}
        for kind, mean in later.tensors.items():
            table = torch.zeros_like(mean.T)
            for lag in range(1, self.lookahead + 1):
                table[lag - 1, : max(len(mean) - lag, 0)] = mean[lag:, lag - 1]
            tables[kind] = table
        return Fit(tables, later.quality)

    def figure(self, sums: Sums, fit: Fit) -> Figure:
        """Errors of lag 1, by kind."""
        lines = {
            f"{kind}, lag {lag}": [(float(i), float(table[lag - 1, i])) for i in range(table.shape[1] - lag)]
            for kind, table in fit.tensors.items()
            for lag in sorted({1, self.lookahead})
        }
        return Figure("step", "relative error of reuse", lines=lines)

    def shapes(self, num_steps: int) -> Mapping[str, Shape]:
        """A table per kind of part."""
        return {"*": (self.lookahead, num_steps)}

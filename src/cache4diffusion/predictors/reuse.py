"""Plain reuse: the feature of the last full step, as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cache4diffusion.predictors.base import LinearPredictor


@dataclass(frozen=True)
class Reuse(LinearPredictor):
    """``y(i0 + k) = y(i0)``. Exact for constant features. Memory: one copy of the feature."""

    @property
    def capacity(self) -> int:
        """The newest one."""
        return 1

    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """All on the newest."""
        return [1.0]

"""Relative change against the last full step: the gate of FBCache and DBCache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import Front, Step


@dataclass(frozen=True)
class ProbeThreshold:
    """Cached while the residual of the first blocks differs little from the one at the last full step.

    ``score = mean|r - r_ref| / mean|r_ref|``; cached iff ``score < threshold`` (strictly: 0 never caches).

    Args:
        threshold: 0 or more.
        blocks: how many first blocks are computed on every step and watched, 1 or more.
        is_open_at_one: whether a threshold of 1 or more caches whatever the score, as in cache-dit.

    Raises:
        SettingError: a value is out of range.
    """

    threshold: float = 0.08
    blocks: int = 1
    is_open_at_one: bool = False

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise SettingError(f"ProbeThreshold(threshold={self.threshold}): threshold must be 0 (off) or more.")
        if self.blocks < 1:
            raise SettingError(f"ProbeThreshold(blocks={self.blocks}): at least one block must be watched.")

    @property
    def watch(self) -> Front:
        """The residual of the first blocks, against the last full step."""
        return Front(self.blocks)

    @property
    def needs_num_steps(self) -> bool:
        """Never."""
        return False

    def begin(self, num_steps: int | None) -> Any:
        """No state: the engine keeps the reference."""
        return None

    def propose(self, state: Any, step: Step, score: float | None) -> bool:
        """Compare with the threshold."""
        if score is None or self.threshold == 0:
            return False
        return score < self.threshold or (self.is_open_at_one and self.threshold >= 1)

    def commit(self, state: Any, step: Step, cached: bool, score: float | None) -> None:
        """Nothing to remember."""

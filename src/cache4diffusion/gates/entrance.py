"""Each block decides by what enters it: the gate of DBPrune (cache-dit)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import Entrance, Step

FIRST = 5  # blocks of a step whose scores make the dynamic threshold


@dataclass(frozen=True)
class EntranceThreshold:
    """A block is cached while what enters it differs little from what entered when it last ran.

    ``score = mean|x - x_ref| / mean|x_ref|``; cached iff ``score < threshold`` (strictly: 0 never caches). With
    ``dynamic``: ``t = relax * d`` for the mean ``d`` of the first 5 scores of the step (those above 0, of the blocks
    asked before); where ``t`` is below ``cap`` the threshold of this block is ``max(threshold, t)``.

    Args:
        threshold: 0 or more; 1 or more caches whatever the score, as cache-dit does.
        dynamic: whether the threshold follows the step's first blocks.
        relax: see above. Code: 1.25.
        cap: see above; None is twice the threshold.

    Raises:
        SettingError: a value is out of range.
    """

    threshold: float = 0.08
    dynamic: bool = False
    relax: float = 1.25
    cap: float | None = None

    def __post_init__(self) -> None:
        if not self.threshold >= 0 or not self.relax > 0 or (self.cap is not None and not self.cap >= 0):
            raise SettingError(
                f"EntranceThreshold(threshold={self.threshold}, relax={self.relax}, cap={self.cap}): threshold and cap "
                "must be 0 (off) or more, relax above 0."
            )

    @property
    def watch(self) -> Entrance:
        """What enters each block; with ``dynamic`` the step's first scores beside it."""
        return Entrance(leaders=FIRST if self.dynamic else 0)

    @property
    def needs_num_steps(self) -> bool:
        """Never."""
        return False

    def begin(self, num_steps: int | None) -> None:
        """No state."""

    def effective(self, leading: float | None) -> float:
        """The threshold of a block, by the mean score of the step's first ones (None where there is none yet)."""
        if leading is None:
            return self.threshold
        relaxed = self.relax * leading
        cap = 2 * self.threshold if self.cap is None else self.cap
        return max(self.threshold, relaxed) if relaxed < cap else self.threshold

    def propose(self, state: None, step: Step, score: Any) -> bool:
        """Compare with the threshold."""
        if score is None or self.threshold == 0:
            return False
        change, leading = score if self.dynamic else (score, None)
        return self.threshold >= 1 or change < self.effective(leading)

    def commit(self, state: None, step: Step, cached: bool, score: Any) -> None:
        """Nothing to remember."""

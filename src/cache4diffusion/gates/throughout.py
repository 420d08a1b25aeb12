"""Every step, from the first one on: for methods that need no full step to begin from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import StaticGate, Step


@dataclass(frozen=True)
class Throughout(StaticGate):
    """Cached from step ``start`` on. ``Throughout()`` over 4 steps is ``rrrr`` where tokens are reduced, and ``Fccc``
    where features are predicted, which needs a full step first.

    Args:
        start: the first steps that are full, 0 or more.
        is_on: False never caches.

    Raises:
        SettingError: ``start`` is negative.
    """

    start: int = 0
    is_on: bool = True

    def __post_init__(self) -> None:
        if self.start < 0:
            raise SettingError(f"Throughout(start={self.start}): start must be 0 steps or more.")

    @property
    def never_caches(self) -> bool:
        """Whether it is off."""
        return not self.is_on

    def propose(self, state: Any, step: Step, score: float | None) -> bool:
        """Cached, if it is on."""
        return self.is_on and step.index >= self.start

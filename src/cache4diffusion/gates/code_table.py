"""A table of what is computed at each step, over the steps that remain: the schedules of FEB-Cache."""

from __future__ import annotations

from dataclasses import dataclass

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import Place, StaticGate, Step

ATTENTION = ("attn", "cross_attn")


@dataclass(frozen=True)
class CodeTable(StaticGate):
    """A code per step, the last step's first: 0 computes all, 1 reuses attention, 2 reuses all.

    A run of n steps has at step s the code ``codes[floor((n - 1 - s) T / n)]`` of a table for T steps: its own where
    n = T, else that of the same share of steps that remain. Step 0 is full. ``CodeTable((0, 2, 0, 2, 0, 0))`` over 6
    steps is ``FFcFcF``.

    Where a site decides by kind, code 1 keeps attention cached and all else full; where it takes one decision, code 1
    is full.

    Args:
        codes: one or more, each 0, 1 or 2.

    Raises:
        SettingError: another code, or none.
    """

    codes: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not self.codes or not set(self.codes) <= {0, 1, 2}:
            raise SettingError(f"CodeTable(codes={self.codes}): use one or more of 0, 1 and 2.")

    @property
    def needs_num_steps(self) -> bool:
        """To count the steps that remain."""
        return any(self.codes)

    @property
    def never_caches(self) -> bool:
        """Whether every step is full."""
        return not any(self.codes)

    def begin(self, num_steps: int | None) -> int:
        """The smallest code at which the only decision is cached."""
        return 2

    def begin_at(self, place: Place) -> int:
        """The smallest code at which this decision is cached."""
        return 1 if place.decision in ATTENTION else 2

    def propose(self, state: int, step: Step, score: float | None) -> bool:
        """Cached from that code on."""
        if step.index == 0 or self.never_caches:
            return False
        assert step.num_steps is not None  # the engine refuses to begin without it
        remaining = max(step.num_steps - 1 - step.index, 0)
        return self.codes[remaining * len(self.codes) // step.num_steps] >= state

"""How deep a U-Net is computed at each step: the strategies of DaTo (arXiv:2501.00375)."""

from __future__ import annotations

from dataclasses import dataclass

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import Place, StaticGate, Step


@dataclass(frozen=True)
class DepthTable(StaticGate):
    """A depth per step: 0 reuses the output, 1 computes the outermost level alone, 2 or more everything.

    A run of n steps has at step s the depth of place ``floor(s * len(depths) / n)``; step 0 is computed as a whole.
    ``DepthTable((2, 1, 0, 2, 1, 0))`` over 6 steps is ``FccFcc`` at a site with one decision, ``FpcFpc`` at
    `ReducedLevel`.

    The decision called ``"output"`` is cached at depth 0, and ``"tokens"`` where ``prunes`` says so. Any other one is
    cached at depths 0 and 1.

    Args:
        depths: one or more, each 0 or more.
        prunes: whether tokens are left out, per step, as the depths.

    Raises:
        SettingError: a negative depth, or none; no flag.
    """

    depths: tuple[int, ...] = (2,)
    prunes: tuple[bool, ...] = (False,)

    def __post_init__(self) -> None:
        if not self.depths or min(self.depths) < 0 or not self.prunes:
            raise SettingError(
                f"DepthTable(depths={self.depths}, prunes={self.prunes}): give one or more of each; depths from 0."
            )

    @property
    def needs_num_steps(self) -> bool:
        """Where steps differ."""
        return max(len(self.depths), len(self.prunes)) > 1

    @property
    def never_caches(self) -> bool:
        """Whether all of every step is computed."""
        return min(self.depths) >= 2 and not any(self.prunes)

    def begin(self, num_steps: int | None) -> str:
        """Of a decision without a name."""
        return ""

    def begin_at(self, place: Place) -> str:
        """Which decision it is."""
        return place.decision

    def propose(self, state: str, step: Step, score: float | None) -> bool:
        """As said above."""
        table = self.prunes if state == "tokens" else self.depths
        place = 0
        if len(table) > 1:
            assert step.num_steps is not None  # the engine refuses to begin without it
            place = min(step.index, step.num_steps - 1) * len(table) // step.num_steps
        if state == "tokens":
            return self.prunes[place]
        return step.index > 0 and self.depths[place] <= (0 if state == "output" else 1)

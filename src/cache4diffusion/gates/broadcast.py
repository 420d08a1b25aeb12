"""A range for each kind of attention, in the middle of the run: the gate of PAB (arXiv:2408.12588)."""

from __future__ import annotations

from dataclasses import dataclass

from cache4diffusion.errors import SettingError
from cache4diffusion.gates.base import Place, StaticGate, Step

_SCALE = 1000.0  # of the timesteps in which windows are given


@dataclass(frozen=True)
class Broadcast(StaticGate):
    """Cached where ``step % range != 0`` and ``low < int(timestep) < high``, with a range for each kind of attention.

    ``Broadcast(spatial=2, window=(100, 800))`` over 10 steps at the timesteps 1000, 900, ..., 100 is ``FFFcFcFcFF``.
    The MLPs that are cached at all are full but for the ``mlp_skip`` steps behind the step nearest to each of
    ``mlp_timesteps``.

    Timesteps are on a scale of 1000: those of a run that begins at 1 or below are multiplied by it. Where they are
    not known, or are on no such scale (logarithms of the noise level, which fall below 0: Stable Video Diffusion), the
    run's steps are taken to fall evenly from 1000 to 0.

    Args:
        spatial, temporal, cross: ranges, 1 or more; 1 never caches. A decision of another name is spatial.
        window: timesteps between which caching is allowed, the low one first; both are outside of it.
        mlp_timesteps: where MLPs are computed to be reused.
        mlp_skip: for how many steps they are.

    Raises:
        SettingError: a value is out of range.
    """

    spatial: int = 2
    temporal: int = 4
    cross: int = 6
    window: tuple[float, float] = (100.0, 850.0)
    mlp_timesteps: tuple[float, ...] = ()
    mlp_skip: int = 2

    def __post_init__(self) -> None:
        if min(self.spatial, self.temporal, self.cross) < 1:
            raise SettingError(
                f"Broadcast(spatial={self.spatial}, temporal={self.temporal}, cross={self.cross}): ranges must be 1 "
                "(never cached) or more."
            )
        if len(self.window) != 2 or not 0 <= self.window[0] <= self.window[1]:
            raise SettingError(f"Broadcast(window={self.window}): give two timesteps from 0 up, the low one first.")
        if min((*self.mlp_timesteps, self.mlp_skip)) < 0:
            raise SettingError(
                f"Broadcast(mlp_timesteps={self.mlp_timesteps}, mlp_skip={self.mlp_skip}): all must be 0 or more."
            )

    @property
    def never_caches(self) -> bool:
        """Whether every step of every kind is full."""
        has_mlp = bool(self.mlp_timesteps) and self.mlp_skip > 0
        is_closed = max(self.spatial, self.temporal, self.cross) == 1 or self.window[0] == self.window[1]
        return is_closed and not has_mlp

    @property
    def needs_num_steps(self) -> bool:
        """To know where in the noise a step lies."""
        return not self.never_caches

    def begin(self, num_steps: int | None) -> frozenset[int]:
        """The cached steps of a run of this length."""
        return self.begin_at(Place(num_steps))

    def begin_at(self, place: Place) -> frozenset[int]:
        """The cached steps of this decision in this run."""
        if place.num_steps is None:  # nothing is ever cached, or the run would have been refused
            return frozenset()
        times = _timesteps(place, place.num_steps)
        if place.decision == "mlp":
            starts = [min(range(len(times)), key=lambda i: abs(times[i] - wanted)) for wanted in self.mlp_timesteps]
            return frozenset(start + 1 + i for start in starts for i in range(self.mlp_skip)) - frozenset(starts)
        ranges = {"temporal": self.temporal, "cross": self.cross}
        every, (low, high) = ranges.get(place.decision, self.spatial), self.window
        return frozenset(i for i, time in enumerate(times) if i % every and low < int(time) < high)

    def propose(self, state: frozenset[int], step: Step, score: float | None) -> bool:
        """As the table says."""
        return step.index in state


def _timesteps(place: Place, num_steps: int) -> list[float]:
    """The timestep of every step, on a scale of 1000."""
    if place.levels is None or len(place.levels) != num_steps or min(place.levels) < 0:
        return [_SCALE * (1 - i / num_steps) for i in range(num_steps)]
    scale = _SCALE if max(place.levels) <= 1 else 1.0
    return [scale * level for level in place.levels]

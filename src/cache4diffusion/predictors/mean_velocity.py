"""MeanCache's predictor: the last velocity, corrected by how it differs from the mean velocity of the steps before.

Source: MeanCache, arXiv:2601.19961; released code UnicomAI/MeanCache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from cache4diffusion.errors import SettingError
from cache4diffusion.predictors.history import History, weighted_sum
from cache4diffusion.storage import PLAIN, Kept, Ring, Store


@dataclass
class VelocityLog:
    """Velocities and the latents they were used at, the latent now, and the noise levels of the run."""

    log: History  # two leaves: velocity, latent before its step
    now: Kept | None = None  # the latent after the newest step
    full_steps: int = 0  # so far
    sigmas: list[float] = field(default_factory=list)  # by step, one more than there are steps

    def tensors(self) -> Iterator[Tensor]:
        """Everything held, for the ledger."""
        yield from self.log.tensors()
        if self.now is not None:
            yield from self.now.tensors()

    @property
    def rings(self) -> list[Ring]:
        """Of both leaves."""
        return self.log.rings

    @property
    def buffers(self) -> list[Tensor]:
        """Where they lie."""
        return [ring.data for ring in self.rings]


@dataclass(frozen=True)
class MeanVelocity:
    """Predict ``v = v_last - J (s_{i+1} - s_i)``, ``J = (v_a - (x_i - x_a) / (s_i - s_a)) / (s_i - s_a)``.

    ``a`` is the step ``look_back`` steps ago, ``x`` the latent before a step, ``s`` the noise level (sigma), ``v`` the
    velocity used, predicted ones included. ``J`` compares a velocity with the mean one since then; for a velocity that
    is linear in sigma it is minus half its slope, so that ``v_last`` moves to the mean of the coming step. With
    ``look_back=1`` the mean *is* the velocity of an Euler step: plain reuse.

    For the trajectory site (``feature="all"``) alone, which tells it latents and noise levels.

    Args:
        look_back: 1 or more, by number of full steps so far (the first entry is for cached steps after one full
            step); the last one for all later ones. Code: 1 to 6.

    Raises:
        SettingError: a value is out of range.

    Memory: ``2 max(look_back) + 1`` latents per run.
    """

    needs_latents: ClassVar[bool] = True

    look_back: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if not self.look_back or min(self.look_back) < 1:
            raise SettingError(
                f"MeanVelocity(look_back={self.look_back}): use one or more numbers of steps, 1 or more."
            )

    @property
    def needs_num_steps(self) -> bool:
        """The noise levels come from the scheduler."""
        return False

    def init(self, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> VelocityLog:
        """An empty log."""
        return VelocityLog(History(max(self.look_back), rows, store))

    def see_sigmas(self, state: VelocityLog, sigmas: Sequence[float]) -> None:
        """Take in the run's noise levels."""
        state.sigmas = list(sigmas)

    def update(
        self, state: VelocityLog, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None
    ) -> None:
        """Log the velocity of a full step."""
        state.full_steps += 1
        self._log(state, leaves, time)

    def is_ready(self, state: VelocityLog) -> bool:
        """Once there is a velocity, and noise levels to go with it."""
        return not state.log.is_empty and bool(state.sigmas)

    def predict(self, state: VelocityLog, time: float, rows: Sequence[int] | None = None) -> list[Tensor]:
        """A weighted sum of two velocities and two latents."""
        track = state.log.shared
        assert track is not None and state.now is not None
        velocities, latents = state.log.rings
        wanted = self.look_back[min(state.full_steps, len(self.look_back)) - 1]
        start = min(wanted, len(track.times)) - 1
        newest, oldest = track.slots[0], track.slots[start]
        step, sigmas = round(time), state.sigmas
        span = sigmas[step] - sigmas[round(track.times[start])]
        ahead = (sigmas[step + 1] - sigmas[step]) / span
        if start == 0:  # J is 0
            return [velocities.value(newest)]
        snapshots = [velocities.read(newest), velocities.read(oldest), state.now.read(), latents.read(oldest)]
        return [weighted_sum(snapshots, [1.0, -ahead, ahead / span, -ahead / span], velocities.dtype)]

    def prefetch(self, state: VelocityLog, time: float) -> None:
        """Begin to bring all of it."""
        if state.log.shared is not None and state.now is not None:
            state.log.prefetch(state.log.shared.slots)
            state.now.prefetch()

    def commit(
        self, state: VelocityLog, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None
    ) -> None:
        """Log the velocity that a cached step went on with."""
        self._log(state, leaves, time)

    def _log(self, state: VelocityLog, leaves: Sequence[Tensor], time: float) -> None:
        velocity, before, after = leaves
        state.log.write([velocity, before], time)
        if state.now is None or not state.now.fits(after):
            state.now = state.log.store.keep(after)
        else:
            state.now.set(after)

"""Chebyshev predictor: ridge regression of the whole history on Chebyshev polynomials of time.

Source: Spectrum, arXiv:2603.01623; released code hanjq17/Spectrum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from cache4diffusion.errors import SettingError
from cache4diffusion.predictors.base import LinearPredictor
from cache4diffusion.predictors.differences import lagrange
from cache4diffusion.predictors.history import History, Track
from cache4diffusion.storage import PLAIN, Store


class TimedHistory(History):
    """Snapshots of a run whose length is known."""

    def __init__(self, capacity: int, rows: int | None, num_steps: int, store: Store = PLAIN) -> None:
        super().__init__(capacity, rows, store)
        self.num_steps = num_steps


@dataclass(frozen=True)
class Chebyshev(LinearPredictor):
    """Predict ``x(tau)^T C`` with ``C = (X^T X + ridge I)^-1 X^T F``, the regression of all full steps' features ``F``.

    A row of ``X`` is ``T_0(tau) .. T_degree(tau)`` at a full step, ``tau = 2 i / num_steps - 1``. ``C`` is linear in
    the features, so the prediction is a weighted sum of them and ``C`` itself is never made.
    Exact for polynomials of the degree as ``ridge`` goes to 0 and there are more full steps than that; a ridge also
    shrinks the constant, so that not even constant features are exact. Needs the length of the run.

    Args:
        degree: highest polynomial, 0 or more. Published: 4.
        ridge: penalty on the coefficients, more than 0. Published: 0.1.
        blend: share of the regression; the rest is the line through the last two full steps. Published: 1
            (0.5 to 1 in examples).
        window: full steps kept, 2 or more. Code: 100.

    Raises:
        SettingError: a value is out of range.

    Memory: one copy of the feature per full step of the run (at most ``window``), per site and branch.
    """

    keeps_constants: ClassVar[bool] = False  # the ridge shrinks them

    degree: int = 4
    ridge: float = 0.1
    blend: float = 1.0
    window: int = 100

    def __post_init__(self) -> None:
        if self.degree < 0:
            raise SettingError(f"Chebyshev(degree={self.degree}): degree must be 0 or more.")
        if not self.ridge > 0:
            raise SettingError(f"Chebyshev(ridge={self.ridge}): ridge must be more than 0.")
        if not 0 <= self.blend <= 1:
            raise SettingError(f"Chebyshev(blend={self.blend}): blend must be 0 (a line) to 1 (the regression).")
        if self.window < 2:
            raise SettingError(f"Chebyshev(window={self.window}): window must be 2 full steps or more.")

    @property
    def capacity(self) -> int:
        """All full steps of a usual run."""
        return self.window

    @property
    def needs_num_steps(self) -> bool:
        """``tau`` runs over the whole run."""
        return True

    def init(self, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> TimedHistory:
        """An empty history that knows the length of the run.

        Raises:
            SettingError: the length is not known.
        """
        if num_steps is None:
            raise SettingError("Chebyshev needs the number of steps of the run.")
        return TimedHistory(self.capacity, rows, num_steps, store)

    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """In a run whose last step is the next one."""
        return list(_weights_in(self, tuple(times), time, round(time) + 1))

    def row_weights(self, state: History, track: Track, row: int, time: float) -> list[float]:
        """``X (X^T X + ridge I)^-1 x(tau)``, blended with the line."""
        assert isinstance(state, TimedHistory)
        return list(_weights_in(self, tuple(track.times), time, state.num_steps))


@lru_cache(maxsize=64)
def _weights_in(settings: Chebyshev, times: tuple[float, ...], time: float, num_steps: int) -> tuple[float, ...]:
    """Weights of all snapshots; the many sites of a denoiser ask for the same ones."""
    design = _polynomials(settings.degree, torch.tensor(times, dtype=torch.float64), num_steps)
    wanted = _polynomials(settings.degree, torch.tensor([time], dtype=torch.float64), num_steps)
    normal = design.T @ design + settings.ridge * torch.eye(settings.degree + 1, dtype=torch.float64)
    regression = (design @ torch.linalg.solve(normal, wanted[0])).tolist()
    line = lagrange(times[:2], time) + [0.0] * (len(times) - 2)
    return tuple(settings.blend * r + (1 - settings.blend) * w for r, w in zip(regression, line, strict=True))


def _polynomials(degree: int, times: Tensor, num_steps: int) -> Tensor:
    """``T_0 .. T_degree`` at every time."""
    tau = 2 * times / num_steps - 1
    columns = [torch.ones_like(tau), tau]
    for _ in range(2, degree + 1):
        columns.append(2 * tau * columns[-1] - columns[-2])
    return torch.stack(columns[: degree + 1], dim=1)

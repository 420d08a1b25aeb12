"""Momentum predictor: TaylorSeer's differences, smoothed over past full steps.

Source: the idea of FeMO (submission 13027 to ICLR 2026). Its formulas could not be read; these are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from cache4diffusion.devices import in_double
from cache4diffusion.errors import SettingError
from cache4diffusion.predictors.base import LinearPredictor
from cache4diffusion.predictors.differences import combine, ladder, powers
from cache4diffusion.predictors.history import History, Track
from cache4diffusion.storage import PLAIN, Store


@dataclass(frozen=True)
class Momentum(LinearPredictor):
    """Predict ``y(i0 + k) = y(i0) + sum over m of k^m / m! * v_m``, for m = 1 .. order.

    ``v_m`` is the momentum of `Taylor`'s difference ``d_m``: ``v <- beta v + (1 - beta) d`` at every full step, divided
    by ``1 - beta^n`` after n of them, as in Adam. That is the mean of the last differences with weights 1, beta,
    beta^2, ..., and is computed as such from raw snapshots; what lies before the oldest snapshot counts no more.
    Exact for features affine in the step, thanks to the correction; it lags behind curved ones. ``beta=0`` is `Taylor`.

    Args:
        order: highest power, 0 or more; 0 is plain reuse. Published: 1 (interval 10), 2 (interval 3).
        beta: weight of the past, 0 to below 1. Published: not readable.
        history: full steps kept, more than ``order``.
        first_difference_step: full steps before this one give no differences; see `Taylor`.

    Raises:
        SettingError: a value is out of range.

    Memory: ``history`` copies of the feature per site and branch.
    """

    order: int = 1
    beta: float = 0.5
    history: int = 4
    first_difference_step: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.order < 0:
            raise SettingError(f"{name}(order={self.order}): order must be 0 (plain reuse) or more.")
        if not 0 <= self.beta < 1:
            raise SettingError(f"{name}(beta={self.beta}): beta must be 0 (no momentum) to below 1.")
        if self.history <= self.order:
            raise SettingError(f"{name}(history={self.history}): history must be more than order={self.order}.")
        if self.first_difference_step < 0:
            raise SettingError(
                f"{name}(first_difference_step={self.first_difference_step}): must be a step index, 0 or more."
            )

    @property
    def capacity(self) -> int:
        """All differences of the window come from these."""
        return self.history

    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """Of the smoothed differences, ``k^m / m!`` of each."""
        return self._weights_with(self.beta, tuple(times), time)

    def _weights_with(self, beta: float, times: tuple[float, ...], time: float) -> list[float]:
        past = _ladders(times, self.order, self.first_difference_step)
        smoothed = [past[0][0]]
        for m in range(1, len(past[0])):
            known = [rungs[m] for rungs in past if len(rungs) > m]  # of this and of earlier full steps
            decay = [beta**n for n in range(len(known))]
            smoothed.append([weight / sum(decay) for weight in combine(known, decay)])
        return combine(smoothed, powers(time - times[0], len(smoothed)))


@lru_cache(maxsize=64)
def _ladders(times: tuple[float, ...], order: int, first_difference_step: int) -> list[list[list[float]]]:
    """The ladder of differences as it was at every full step of the window, newest first."""
    return [[[0.0] * n + rung for rung in ladder(times[n:], order, first_difference_step)] for n in range(len(times))]


class SearchedHistory(History):
    """Snapshots, and every row's own beta."""

    def __init__(self, capacity: int, rows: int | None, beta: float, store: Store = PLAIN) -> None:
        super().__init__(capacity, rows, store)
        self.beta = beta
        self.betas: dict[int, float] = {}  # of the rows that have moved


@dataclass(frozen=True)
class AdaptedMomentum(Momentum):
    """`Momentum` whose ``beta`` is searched while sampling, for every feature and row of the batch by itself.

    At a full step, before it is taken in, the step is predicted with ``beta - gamma`` and ``beta + gamma`` (within the
    bounds); ``beta`` moves to the one that came nearer, and stays where neither did better.

    Args:
        order: see `Momentum`.
        beta: where the search begins.
        history: see `Momentum`.
        first_difference_step: see `Momentum`.
        gamma: step of the search, 0 or more; 0 is `Momentum`. Published: not readable.
        lowest: lower bound of beta.
        highest: upper bound of beta.

    Raises:
        SettingError: a value is out of range.

    Memory: ``history`` copies of the feature per site and branch. A full step makes two predictions and one host sync
    per feature more.
    """

    is_row_wise: ClassVar[bool] = True
    mixes_tokens: ClassVar[bool] = True  # beta is searched by the error of all of them

    gamma: float = 0.1
    lowest: float = 0.0
    highest: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma < 0:
            raise SettingError(f"AdaptedMomentum(gamma={self.gamma}): gamma must be 0 (no search) or more.")
        if not 0 <= self.lowest <= self.beta <= self.highest < 1:
            raise SettingError(
                f"AdaptedMomentum(lowest={self.lowest}, highest={self.highest}): the bounds must lie around "
                f"beta={self.beta}, between 0 and below 1."
            )

    def init(self, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> SearchedHistory:
        """An empty history with the first beta."""
        return SearchedHistory(self.capacity, rows, self.beta, store)

    def update(self, state: History, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None) -> None:
        """Search, then take the feature in."""
        assert isinstance(state, SearchedHistory)
        if not state.fits(leaves, rows):
            state.betas.clear()
        elif self.gamma > 0 and not state.is_empty:
            self._search(state, leaves, time, range(leaves[0].shape[0]) if rows is None else rows)
        state.write(leaves, time, rows)

    def row_weights(self, state: History, track: Track, row: int, time: float) -> list[float]:
        """Those of the row's own beta."""
        assert isinstance(state, SearchedHistory)
        return self._weights_with(state.betas.get(row, state.beta), tuple(track.times), time)

    def _search(self, state: SearchedHistory, leaves: Sequence[Tensor], time: float, rows: Sequence[int]) -> None:
        now = [state.betas.get(row, state.beta) for row in rows]
        lower = [max(beta - self.gamma, self.lowest) for beta in now]
        upper = [min(beta + self.gamma, self.highest) for beta in now]
        errors = torch.stack([self._errors(state, leaves, time, rows, betas) for betas in (lower, upper)], 1).tolist()
        for row, low, high, (error_low, error_high) in zip(rows, lower, upper, errors, strict=True):
            if error_low != error_high:
                state.betas[row] = low if error_low < error_high else high

    def _errors(
        self, state: SearchedHistory, leaves: Sequence[Tensor], time: float, rows: Sequence[int], betas: list[float]
    ) -> Tensor:
        """Squared distance of the prediction with these betas from the feature, per row."""
        tried = SearchedHistory(state.capacity, state.rows, state.beta)
        tried.rings, tried.shared, tried.tracks = state.rings, state.shared, state.tracks
        tried.betas = dict(zip(rows, betas, strict=True))
        predicted = self.predict(tried, time, rows)
        return torch.stack(
            [
                (in_double(p) - in_double(leaf)).square().flatten(1).sum(1)
                for p, leaf in zip(predicted, leaves, strict=True)
            ]
        ).sum(0)

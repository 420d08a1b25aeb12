"""What a predictor is: it turns the features of past full steps into the feature of a cached one.

It sees ``(time, feature)`` pairs and a time to predict; never the denoiser, never a call count. The object is frozen
settings; its state (`History` for every linear one) belongs to the engine and is changed only by ``update`` and
``commit``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from cache4diffusion.predictors.history import History, Track, WeightedSum, add_up, weighted_sum
from cache4diffusion.storage import PLAIN, Store


@runtime_checkable
class Predictor(Protocol):
    """Makes the feature of a cached step."""

    @property
    def needs_num_steps(self) -> bool:
        """Whether the length of the run must be known."""
        ...

    def init(self, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> Any:
        """Return the empty state of one site, for one branch of one run.

        Args:
            rows: size of the batch axis where rows may decide for themselves, else None.
            num_steps: length of the run, where it is known.
            store: how snapshots are kept.
        """
        ...

    def update(self, state: Any, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None) -> None:
        """Take in the feature of a full step (of the given rows)."""
        ...

    def is_ready(self, state: Any) -> bool:
        """Whether anything can be predicted, for every row."""
        ...

    def predict(self, state: Any, time: float, rows: Sequence[int] | None = None) -> list[Tensor]:
        """Return the predicted leaves (of the given rows). Writes nothing; the caller must not write into them."""
        ...

    def prefetch(self, state: Any, time: float) -> None:
        """Begin to bring what `predict` will read at ``time``, where it lies on another device."""
        ...

    def commit(self, state: Any, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None) -> None:
        """Take note of the feature that a cached step went on with (of the given rows).

        Called exactly once per cached step, with what was used: the prediction, or the prediction with some tokens
        computed. Only recursive predictors remember it; in any other history a prediction has no place.
        """
        ...


@dataclass(frozen=True)
class LinearPredictor(ABC):
    """A predictor whose prediction is ``sum_j w_j * S_j`` over raw snapshots ``S_j``, newest first.

    A subclass gives `capacity` and `weights`; all tensor work is here. Weights are host floats and the sum is
    accumulated in float32, so a basis never loses accuracy to the feature's dtype. Where more than the times decides
    about the weights, it overrides `row_weights`.
    """

    is_row_wise: ClassVar[bool] = False  # whether the weights of rows differ although their times are the same
    keeps_constants: ClassVar[bool] = True  # whether what never changes is predicted exactly: weights add up to 1

    @property
    @abstractmethod
    def capacity(self) -> int:
        """How many past full steps are kept."""

    @abstractmethod
    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """Weights of the snapshots at ``times`` (newest first, at least one) for a prediction at ``time``."""

    @property
    def needs_num_steps(self) -> bool:
        """Few care where the run ends."""
        return False

    def init(self, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> History:
        """An empty `History`."""
        return History(self.capacity, rows, store)

    def update(self, state: History, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None) -> None:
        """Copy the feature into the ring."""
        state.write(leaves, time, rows)

    def is_ready(self, state: History) -> bool:
        """One snapshot is enough: with fewer than it wants, a predictor falls back to a lower order."""
        return not state.is_empty

    def predict(self, state: History, time: float, rows: Sequence[int] | None = None) -> list[Tensor]:
        """The weighted sum, per leaf."""
        if state.shared is not None and not self.is_row_wise:
            return add_up([self._sum(state, state.shared, time)], rows)[0]
        chosen = range(state.rings[0].shape[0]) if rows is None else rows
        parts = [self._terms(state, track, row, time) for row, track in zip(chosen, state.of(chosen), strict=True)]
        used, outputs = {slot for terms in parts for slot, _ in terms}, []
        for ring in state.rings:
            opened = {slot: ring.read(slot) for slot in used}
            predicted = [
                weighted_sum([opened[slot][row] for slot, _ in terms], [weight for _, weight in terms], ring.dtype)
                for row, terms in zip(chosen, parts, strict=True)
            ]
            outputs.append(torch.stack(predicted))
        return outputs

    def sum_at(self, state: History, time: float) -> WeightedSum | None:
        """What `predict` adds up for all rows alike, if it does nothing else; else None.

        Sums of many sites that have the same weights are made together. A class with a `predict` of its own has none.
        """
        if state.shared is None or self.is_row_wise or type(self).predict is not LinearPredictor.predict:
            return None
        return self._sum(state, state.shared, time)

    def prefetch(self, state: History, time: float) -> None:
        """Begin to bring the snapshots of the sum, those of all rows."""
        if state.is_empty:
            return
        if state.shared is not None and not self.is_row_wise:
            slots = {slot for slot, _ in self._terms(state, state.shared, 0, time)}
        else:
            rows = range(state.rings[0].shape[0])
            pairs = zip(rows, state.of(rows), strict=True)
            slots = {slot for row, track in pairs for slot, _ in self._terms(state, track, row, time)}
        state.prefetch(sorted(slots))

    def commit(  # noqa: B027 - optional step
        self, state: History, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None
    ) -> None:
        """Nothing: what is predicted enters no history of full steps."""

    def row_weights(self, state: History, track: Track, row: int, time: float) -> list[float]:
        """Weights of the snapshots of ``track``, newest first, for one row (for all of them if they share a track)."""
        return _weights(self, tuple(track.times), time)

    def slot_weights(self, state: History, time: float) -> list[float]:
        """Weights in the order of the ring's slots (0 for a free slot): what a compiled block multiplies with."""
        assert state.shared is not None
        by_slot = [0.0] * self.capacity
        for slot, weight in zip(state.shared.slots, self._weights_at(state, state.shared, 0, time), strict=True):
            by_slot[slot] = weight
        return by_slot

    def _sum(self, state: History, track: Track, time: float) -> WeightedSum:
        terms = self._terms(state, track, 0, time)
        return WeightedSum(state, tuple(slot for slot, _ in terms), tuple(weight for _, weight in terms))

    def _terms(self, state: History, track: Track, row: int, time: float) -> list[tuple[int, float]]:
        """Slots and weights of the snapshots that count; of the newest one, if none does."""
        weights = self._weights_at(state, track, row, time)
        terms = [(slot, weight) for slot, weight in zip(track.slots, weights, strict=True) if weight != 0.0]
        return terms or [(track.slots[0], 0.0)]

    def _weights_at(self, state: History, track: Track, row: int, time: float) -> list[float]:
        if track.times[0] == time:  # asked again about a step that is in the history already
            return [1.0] + [0.0] * (len(track.times) - 1)
        return self.row_weights(state, track, row, time)


@dataclass(frozen=True)
class RecursivePredictor(LinearPredictor):
    """A linear predictor whose history holds every step: what full steps computed and what cached ones went on with."""

    def commit(self, state: History, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None) -> None:
        """Copy what was used into the ring."""
        state.write(leaves, time, rows, is_prediction=True)


@lru_cache(maxsize=64)
def _weights(predictor: LinearPredictor, times: tuple[float, ...], time: float) -> list[float]:
    """Weights of all snapshots; the many sites of a denoiser ask for the same ones."""
    weights = predictor.weights(times, time)
    return weights + [0.0] * (len(times) - len(weights))

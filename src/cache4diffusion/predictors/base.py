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

from cache4diffusion.predictors.history import History, Track, weighted_sum


@runtime_checkable
class Predictor(Protocol):
    """Makes the feature of a cached step."""

    @property
    def needs_num_steps(self) -> bool:
        """Whether the length of the run must be known."""
        ...

    def init(self, rows: int | None, num_steps: int | None = None) -> Any:
        """Return the empty state of one site, for one branch of one run.

        Args:
            rows: size of the batch axis where rows may decide for themselves, else None.
            num_steps: length of the run, where it is known.
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

    def init(self, rows: int | None, num_steps: int | None = None) -> History:
        """An empty `History`."""
        return History(self.capacity, rows)

    def update(self, state: History, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None) -> None:
        """Copy the feature into the ring."""
        state.write(leaves, time, rows)

    def is_ready(self, state: History) -> bool:
        """One snapshot is enough: with fewer than it wants, a predictor falls back to a lower order."""
        return not state.is_empty

    def predict(self, state: History, time: float, rows: Sequence[int] | None = None) -> list[Tensor]:
        """The weighted sum, per leaf."""
        if state.shared is not None and not self.is_row_wise:
            weights, slots = self._weights_at(state, state.shared, 0, time), state.shared.slots
            buffers = state.buffers if rows is None else [_take(buffer, rows) for buffer in state.buffers]
            return [weighted_sum([buffer[slot] for slot in slots], weights) for buffer in buffers]
        chosen = range(state.buffers[0].shape[1]) if rows is None else rows
        tracks = [state.tracks[row] if state.shared is None else state.shared for row in chosen]
        outputs = []
        for buffer in state.buffers:
            predicted = []
            for row, track in zip(chosen, tracks, strict=True):
                weights = self._weights_at(state, track, row, time)
                predicted.append(weighted_sum([buffer[slot, row] for slot in track.slots], weights))
            outputs.append(torch.stack(predicted))
        return outputs

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


def _take(buffer: Tensor, rows: Sequence[int]) -> Tensor:
    index = torch.tensor(rows, device=buffer.device)
    return buffer.index_select(1, index)

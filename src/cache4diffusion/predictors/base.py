"""What a predictor is: it turns the features of past full steps into the feature of a cached one.

It sees ``(time, feature)`` pairs and a time to predict; never the denoiser, never a call count. The object is frozen
settings; its state (`History` for every linear one) belongs to the engine and is changed only by ``update``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from cache4diffusion.predictors.history import History, Track, weighted_sum


@runtime_checkable
class Predictor(Protocol):
    """Makes the feature of a cached step."""

    def init(self, rows: int | None) -> Any:
        """Return the empty state of one site, for one branch of one run.

        Args:
            rows: size of the batch axis where rows may decide for themselves, else None.
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


@dataclass(frozen=True)
class LinearPredictor(ABC):
    """A predictor whose prediction is ``sum_j w_j * S_j`` over raw snapshots ``S_j``, newest first.

    A subclass gives `capacity` and `weights`; all tensor work is here. Weights are host floats and the sum is
    accumulated in float32, so a basis never loses accuracy to the feature's dtype.
    """

    @property
    @abstractmethod
    def capacity(self) -> int:
        """How many past full steps are kept."""

    @abstractmethod
    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """Weights of the snapshots at ``times`` (newest first, at least one) for a prediction at ``time``."""

    def init(self, rows: int | None) -> History:
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
        if state.shared is not None:
            weights, slots = self._row_weights(state.shared, time), state.shared.slots
            buffers = state.buffers if rows is None else [_take(buffer, rows) for buffer in state.buffers]
            return [weighted_sum([buffer[slot] for slot in slots], weights) for buffer in buffers]
        chosen = range(len(state.tracks)) if rows is None else rows
        tracks = [state.tracks[row] for row in chosen]
        outputs = []
        for buffer in state.buffers:
            predicted = []
            for row, track in zip(chosen, tracks, strict=True):
                weights = self._row_weights(track, time)
                predicted.append(weighted_sum([buffer[slot, row] for slot in track.slots], weights))
            outputs.append(torch.stack(predicted))
        return outputs

    def slot_weights(self, state: History, time: float) -> list[float]:
        """Weights in the order of the ring's slots (0 for a free slot): what a compiled block multiplies with."""
        assert state.shared is not None
        by_slot = [0.0] * self.capacity
        for slot, weight in zip(state.shared.slots, self._row_weights(state.shared, time), strict=True):
            by_slot[slot] = weight
        return by_slot

    def _row_weights(self, track: Track, time: float) -> list[float]:
        return _weights(self, tuple(track.times), time)


@lru_cache(maxsize=64)
def _weights(predictor: LinearPredictor, times: tuple[float, ...], time: float) -> list[float]:
    """Weights of all snapshots; the many sites of a denoiser ask for the same ones."""
    weights = predictor.weights(times, time)
    return weights + [0.0] * (len(times) - len(weights))


def _take(buffer: Tensor, rows: Sequence[int]) -> Tensor:
    index = torch.tensor(rows, device=buffer.device)
    return buffer.index_select(1, index)

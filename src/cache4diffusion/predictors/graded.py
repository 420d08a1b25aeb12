"""Reuse of what is kept in mixed precision: the channels that changed most in full, the others in int8.

Our reading of QuantCache, arXiv:2503.06545; no code is out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cache4diffusion.errors import SettingError
from cache4diffusion.predictors.base import LinearPredictor
from cache4diffusion.predictors.history import History
from cache4diffusion.storage import PLAIN, Ring, Store, scaled_axes

Grade = Literal["precise", "coarse", "order"]


class GradedHistory(History):
    """The newest feature in pieces: of each tensor the channels in full, those in int8, and the order they were in."""

    def __init__(self, rows: int | None, store: Store = PLAIN) -> None:
        super().__init__(1, rows, store)
        self.grades: list[list[Grade]] = []  # of every tensor of the feature

    def newest(self) -> list[Tensor]:
        """In one piece."""
        return self.joined(super().newest())

    def joined(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of a feature from their pieces, channels in their own order."""
        rest, leaves = iter(pieces), []
        for grades in self.grades:
            found = [next(rest) for _ in grades]
            if len(found) == 1:
                leaves += found
            else:
                precise, coarse, order = found
                axis = _axis(precise)
                leaves.append(taken(torch.cat([precise, coarse], axis), order.long().argsort(dim=1), axis))
        return leaves

    def _ring(self, place: int, shape: tuple[int, ...], leaf: Tensor) -> Ring:
        grades = [grade for each in self.grades for grade in each]
        return self.store.ring(1, shape, leaf, torch.int8 if grades[place] == "coarse" else None)


@dataclass(frozen=True)
class Graded(LinearPredictor):
    """``y(i0 + k) = y(i0)``, of which ``(bits - 8) / 8`` of the channels were kept as they were and the others in int8.

    In full are the channels that diverged most since the full step before, ``sum|y - y_kept| / sum|y_kept|`` over the
    places of a row; at the first one the largest. Every row and every tensor of a feature has its own order, and as
    many channels in full as any other, so that what is held does not depend on what is sampled. With 16 bits it is
    `Reuse`, bit for bit; with 8 it is reuse with ``cache_dtype="int8"``. Channels are the last axis of tokens, axis 1
    of maps.

    Args:
        bits: 8 to 16 on average, of a denoiser that runs in 16.

    Raises:
        SettingError: bits are out of range.

    Memory: one copy of the feature in so many bits, a float32 scale for each channel in int8, and its number (2 bytes)
    for every channel. Cost: on full steps a sort per row; on cached ones the channels are put back in order.
    """

    bits: float = 12.0

    def __post_init__(self) -> None:
        if not 8 <= self.bits <= 16:
            raise SettingError(f"Graded(bits={self.bits}): bits must be 8 (all in int8) to 16 (as it is).")

    @property
    def capacity(self) -> int:
        """The newest one."""
        return 1

    @property
    def narrowest(self) -> torch.dtype | None:
        """What some channels are kept in, whatever the storage says; None: none is."""
        return None if self.bits == 16 else torch.int8

    def weights(self, times: Sequence[float], time: float) -> list[float]:
        """All on the newest."""
        return [1.0]

    def init(self, rows: int | None, num_steps: int | None = None, store: Store = PLAIN) -> GradedHistory:
        """Nothing yet."""
        return GradedHistory(rows, store)

    def grades(self, leaf: Tensor) -> list[Grade]:
        """The pieces that a tensor is kept in."""
        if leaf.ndim < 2 or not leaf.is_floating_point():
            return ["precise"]
        count, total = self._full(leaf), leaf.shape[_axis(leaf)]
        if count == total:
            return ["precise"]
        return ["coarse"] if count == 0 else ["precise", "coarse", "order"]

    def _full(self, leaf: Tensor) -> int:
        """How many of its channels are kept in full."""
        return round((self.bits - 8) / 8 * leaf.shape[_axis(leaf)])

    def update(self, state: History, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None) -> None:
        """Sort the channels by how far they moved, and keep the pieces."""
        assert isinstance(state, GradedHistory)
        kept = self.predict(state, time, rows) if self._is_known(state, rows) else []
        is_alike = len(kept) == len(leaves) and all(a.shape == b.shape for a, b in zip(kept, leaves, strict=True))
        before: Sequence[Tensor | None] = kept if is_alike else [None] * len(leaves)
        state.grades = [self.grades(leaf) for leaf in leaves]
        pieces = []
        for leaf, then, grades in zip(leaves, before, state.grades, strict=True):
            if "order" not in grades:
                pieces.append(leaf)
                continue
            axis, count = _axis(leaf), self._full(leaf)
            order = divergence(leaf, then).argsort(dim=1, descending=True, stable=True)
            ordered = taken(leaf, order, axis)
            pieces += ordered.tensor_split([count], dim=axis)
            pieces.append(order.to(torch.int16 if leaf.shape[axis] <= 1 << 15 else torch.int32))
        state.write(pieces, time, rows)

    @staticmethod
    def _is_known(state: History, rows: Sequence[int] | None) -> bool:
        """Whether all of these rows were kept before."""
        if state.shared is not None:
            return bool(state.shared.times)
        chosen = range(len(state.tracks)) if rows is None else rows
        return all(track.times for track in state.of(chosen))

    def predict(self, state: History, time: float, rows: Sequence[int] | None = None) -> list[Tensor]:
        """The newest feature, in one piece."""
        assert isinstance(state, GradedHistory)
        return state.joined(super().predict(state, time, rows))


def _axis(leaf: Tensor) -> int:
    """Of the channels."""
    return scaled_axes(torch.int8, leaf.ndim)[-1] if leaf.ndim > 2 else 1


def divergence(leaf: Tensor, before: Tensor | None) -> Tensor:
    """How far every channel of every row moved from what was kept, relative to that; its size where nothing was."""
    axis = _axis(leaf)
    dims = [other for other in range(1, leaf.ndim) if other != axis]

    def size(x: Tensor) -> Tensor:
        return x.abs().sum(dims) if dims else x.abs()

    now = leaf.float()
    if before is None:
        return size(now)
    moved = size(now - before.float())
    return moved / size(before.float()).masked_fill(moved == 0, 1)


def taken(leaf: Tensor, order: Tensor, axis: int) -> Tensor:
    """The channels of every row in its order ``[B, C]``."""
    shape = [leaf.shape[0], *[order.shape[1] if other == axis else 1 for other in range(1, leaf.ndim)]]
    index = order.reshape(shape).expand(*[n if other != axis else order.shape[1] for other, n in enumerate(leaf.shape)])
    return leaf.gather(axis, index)

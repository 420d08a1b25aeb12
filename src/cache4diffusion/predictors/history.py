"""Raw snapshots of a feature at past full steps: the memory of every linear predictor.

A feature is a flat list of tensors (leaves). Per leaf there is one preallocated ring buffer ``[capacity, *shape]``;
nothing is allocated per step once it is filled. Rows of a batch that take their own decisions have their own list of
full steps; as long as every row was always written together, one list serves all and weights are host floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_FIRST_SLOTS = 8  # of a long ring


@dataclass
class Track:
    """When one row (or all of them) was written, newest first, into which slot of the ring, and with what."""

    times: list[float] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    predicted: list[bool] = field(default_factory=list)  # whether it is a prediction, which only recursive ones keep

    def next_slot(self, time: float, capacity: int) -> int:
        """Slot the snapshot of ``time`` goes to: the same again for an equal time, else a free one, else the oldest."""
        if self.times and self.times[0] == time:
            return self.slots[0]
        return len(self.slots) if len(self.slots) < capacity else self.slots[-1]

    def push(self, time: float, slot: int, capacity: int, is_prediction: bool) -> None:
        """Note that ``slot`` now holds the feature of ``time``."""
        if self.times and self.times[0] == time:
            self.predicted[0] = is_prediction
            return
        self.times.insert(0, time)
        self.slots.insert(0, slot)
        self.predicted.insert(0, is_prediction)
        del self.times[capacity:], self.slots[capacity:], self.predicted[capacity:]

    def copy(self) -> Track:
        """An independent copy, for a row that goes its own way from here."""
        return Track(list(self.times), list(self.slots), list(self.predicted))


class History:
    """Snapshots of one site's feature, for one branch of one run.

    Args:
        capacity: snapshots kept, 1 or more.
        rows: size of the batch axis (axis 0 of every leaf) when rows may decide for themselves, else None.
    """

    def __init__(self, capacity: int, rows: int | None = None) -> None:
        self.capacity = capacity
        self.rows = rows
        self.buffers: list[Tensor] = []
        self.shared: Track | None = Track()
        self.tracks: list[Track] = []

    @property
    def is_empty(self) -> bool:
        """Whether nothing can be predicted yet (for at least one row)."""
        if self.shared is not None:
            return not self.shared.times
        return any(not track.times for track in self.tracks)

    def tensors(self) -> Iterator[Tensor]:
        """Everything held, for the ledger."""
        yield from self.buffers

    def clear(self) -> None:
        """Forget all snapshots; the buffers stay."""
        self.shared, self.tracks = Track(), []

    def fits(self, leaves: Sequence[Tensor], rows: Sequence[int] | None = None) -> bool:
        """Whether the leaves have the shapes, dtypes and device the buffers were made for."""
        if len(leaves) != len(self.buffers):
            return False
        for buffer, leaf in zip(self.buffers, leaves, strict=True):
            if buffer.dtype != leaf.dtype or buffer.device != leaf.device or buffer.ndim != leaf.ndim + 1:
                return False
            skip = 2 if rows is not None else 1
            if buffer.shape[skip:] != leaf.shape[skip - 1 :]:
                return False
        return True

    def _allocate(self, leaves: Sequence[Tensor], rows: Sequence[int] | None) -> None:
        self.buffers = []
        for leaf in leaves:
            shape = tuple(leaf.shape if rows is None or self.rows is None else (self.rows, *leaf.shape[1:]))
            self.buffers.append(_empty_ring(min(self.capacity, _FIRST_SLOTS), shape, leaf))
        self.clear()

    def _make_room(self, slot: int) -> None:
        """A long ring begins short and doubles: how many full steps a run has is not known."""
        for i, buffer in enumerate(self.buffers):
            if slot >= buffer.shape[0]:
                longer = _empty_ring(min(self.capacity, 2 * buffer.shape[0]), tuple(buffer.shape[1:]), buffer[0])
                longer[: buffer.shape[0]].copy_(buffer)
                self.buffers[i] = longer

    def write(
        self, leaves: Sequence[Tensor], time: float, rows: Sequence[int] | None = None, *, is_prediction: bool = False
    ) -> None:
        """Copy ``leaves`` into the ring as the feature at ``time``.

        Args:
            leaves: the feature; with ``rows``, only those rows of it.
            time: coordinate of this full step, rising within a run. An equal time overwrites the newest snapshot.
            rows: indices of the batch rows the leaves hold, or None for all.
            is_prediction: whether the feature was predicted, not computed.

        Raises:
            ValueError: rows are named, but the size of the batch was not when this history was made.
        """
        if rows is not None and self.rows is None:
            raise ValueError(
                "History(rows=None) has no rows of its own: give the size of the batch to write some rows."
            )
        if not self.fits(leaves, rows):
            self._allocate(leaves, rows)
        if rows is None and self.shared is not None:
            slot = self.shared.next_slot(time, self.capacity)
            self._make_room(slot)
            for buffer, leaf in zip(self.buffers, leaves, strict=True):
                buffer[slot].copy_(leaf)
            self.shared.push(time, slot, self.capacity, is_prediction)
            return
        if self.shared is not None:
            self.tracks = [self.shared.copy() for _ in range(self.buffers[0].shape[1])]
            self.shared = None
        for position, row in enumerate(rows if rows is not None else range(len(self.tracks))):
            track = self.tracks[row]
            slot = track.next_slot(time, self.capacity)
            self._make_room(slot)
            for buffer, leaf in zip(self.buffers, leaves, strict=True):
                buffer[slot, row].copy_(leaf[position])
            track.push(time, slot, self.capacity, is_prediction)
        first = self.tracks[0]
        if all(track == first for track in self.tracks):
            self.shared, self.tracks = first, []


def _empty_ring(capacity: int, shape: tuple[int, ...], leaf: Tensor) -> Tensor:
    """A buffer ``[capacity, *shape]`` whose slots lie in memory like ``leaf``.

    A prediction in another memory format (channels last, say) would lead the host to other kernels, which round
    differently.
    """
    order = sorted(range(leaf.ndim), key=lambda axis: (-leaf.stride(axis), axis))
    ring = leaf.new_empty((capacity, *[shape[axis] for axis in order]))
    return ring.permute(0, *[1 + order.index(axis) for axis in range(leaf.ndim)])


def weighted_sum(snapshots: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_j weights[j] * snapshots[j]``, accumulated in float32 (or wider), in the snapshots' dtype.

    A single weight of exactly 1 returns that snapshot itself, without a copy.
    """
    terms = [(s, w) for s, w in zip(snapshots, weights, strict=True) if w != 0.0]
    if len(terms) == 1 and terms[0][1] == 1.0:
        return terms[0][0]
    if not terms:
        return torch.zeros_like(snapshots[0])
    first, weight = terms[0]
    is_narrow = first.dtype in (torch.float16, torch.bfloat16)
    total = (first.float() if is_narrow else first) * weight
    for snapshot, weight in terms[1:]:
        total.add_(snapshot, alpha=weight)
    return total.to(first.dtype) if is_narrow else total

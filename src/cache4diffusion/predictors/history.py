"""Raw snapshots of a feature at past full steps: the memory of every linear predictor.

A feature is a flat list of tensors (leaves). Per leaf there is one preallocated ring ``[capacity, *shape]``
(`storage.Ring`); nothing is allocated per step once it is filled. Rows of a batch that take their own decisions have
their own list of full steps; as long as every row was always written together, one list serves all and weights are host
floats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cache4diffusion.storage import PLAIN, Ring, Store

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
        store: how they are kept.
    """

    def __init__(self, capacity: int, rows: int | None = None, store: Store = PLAIN) -> None:
        self.capacity = capacity
        self.rows = rows
        self.store = store
        self.rings: list[Ring] = []
        self.shared: Track | None = Track()
        self.tracks: list[Track] = []

    @property
    def is_empty(self) -> bool:
        """Whether nothing can be predicted yet (for at least one row)."""
        if self.shared is not None:
            return not self.shared.times
        return any(not track.times for track in self.tracks)

    @property
    def buffers(self) -> list[Tensor]:
        """Where the snapshots lie, as they are kept: ``[capacity, *shape]`` for every leaf."""
        return [ring.data for ring in self.rings]

    def tensors(self) -> Iterator[Tensor]:
        """Everything held, for the ledger."""
        for ring in self.rings:
            yield from ring.tensors()

    def clear(self) -> None:
        """Forget all snapshots; the buffers stay."""
        self.shared, self.tracks = Track(), []

    def fits(self, leaves: Sequence[Tensor], rows: Sequence[int] | None = None) -> bool:
        """Whether the leaves have the shapes, dtypes and device the buffers were made for."""
        pairs = zip(self.rings, leaves, strict=False)
        return len(leaves) == len(self.rings) and all(ring.fits(leaf, rows is not None) for ring, leaf in pairs)

    def _allocate(self, leaves: Sequence[Tensor], rows: Sequence[int] | None) -> None:
        self.rings = []
        for leaf in leaves:
            shape = tuple(leaf.shape if rows is None or self.rows is None else (self.rows, *leaf.shape[1:]))
            self.rings.append(self.store.ring(min(self.capacity, _FIRST_SLOTS), shape, leaf))
        self.clear()

    def _make_room(self, slot: int) -> None:
        """A long ring begins short and doubles: how many full steps a run has is not known."""
        for ring in self.rings:
            if slot >= ring.capacity:
                ring.grow(min(self.capacity, 2 * ring.capacity))

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
            for ring, leaf in zip(self.rings, leaves, strict=True):
                ring.write(slot, leaf)
            self.shared.push(time, slot, self.capacity, is_prediction)
            return
        if self.shared is not None:
            self.tracks = [self.shared.copy() for _ in range(self.rings[0].shape[0])]
            self.shared = None
        for position, row in enumerate(rows if rows is not None else range(len(self.tracks))):
            track = self.tracks[row]
            slot = track.next_slot(time, self.capacity)
            self._make_room(slot)
            for ring, leaf in zip(self.rings, leaves, strict=True):
                ring.write(slot, leaf[position], row)
            track.push(time, slot, self.capacity, is_prediction)
        first = self.tracks[0]
        if all(track == first for track in self.tracks):
            self.shared, self.tracks = first, []

    def amend(self, leaves: Sequence[Tensor]) -> None:
        """The newest snapshot of all rows was changed to ``leaves``, in place if `predict` gave it out as it lies."""
        slot = self.of((0,))[0].slots[0]
        for ring, leaf in zip(self.rings, leaves, strict=True):
            if not ring.holds(leaf):
                ring.write(slot, leaf)

    def of(self, rows: Iterable[int]) -> list[Track]:
        """The list of full steps of each of these rows."""
        return [self.tracks[row] if self.shared is None else self.shared for row in rows]

    def prefetch(self, slots: Iterable[int]) -> None:
        """Begin to bring snapshots that lie on another device."""
        for slot in slots:
            for ring in self.rings:
                ring.prefetch(slot)


def weighted_sum(snapshots: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    """``sum_j weights[j] * snapshots[j]``, accumulated in float32 (or wider).

    A single weight of exactly 1 returns that snapshot itself, without a copy where it is of the wanted dtype.

    Args:
        snapshots: what is summed up, one or more.
        weights: of each.
        dtype: of the result; None: the snapshots' own.
    """
    dtype = snapshots[0].dtype if dtype is None else dtype
    terms = [(s, w) for s, w in zip(snapshots, weights, strict=True) if w != 0.0]
    if len(terms) == 1 and terms[0][1] == 1.0:
        return terms[0][0].to(dtype)
    if not terms:
        return torch.zeros_like(snapshots[0], dtype=dtype)
    first, weight = terms[0]
    is_narrow = first.dtype in (torch.float16, torch.bfloat16)
    total = (first.float() if is_narrow else first) * weight
    for snapshot, weight in terms[1:]:
        total.add_(snapshot, alpha=weight)
    return total.to(dtype)

"""Raw snapshots of a feature at past full steps: the memory of every linear predictor.

A feature is a flat list of tensors (leaves). Per leaf there is one preallocated ring ``[capacity, *shape]``
(`storage.Ring`); nothing is allocated per step once it is filled. Rows of a batch that take their own decisions have
their own list of full steps; as long as every row was always written together, one list serves all and weights are host
floats.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cache4diffusion.storage import PLAIN, Ring, Store, axes_in_memory, stacked

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
        for place, leaf in enumerate(leaves):
            shape = tuple(leaf.shape if rows is None or self.rows is None else (self.rows, *leaf.shape[1:]))
            self.rings.append(self._ring(place, shape, leaf))
        self.clear()

    def _ring(self, place: int, shape: tuple[int, ...], leaf: Tensor) -> Ring:
        """Room for one of the leaves."""
        return self.store.ring(min(self.capacity, _FIRST_SLOTS), shape, leaf)

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

    def newest(self) -> list[Tensor]:
        """The newest snapshot of all rows, on the feature's device and in its dtype."""
        slot = self.of((0,))[0].slots[0]
        return [ring.value(slot) for ring in self.rings]

    def of(self, rows: Iterable[int]) -> list[Track]:
        """The list of full steps of each of these rows."""
        return [self.tracks[row] if self.shared is None else self.shared for row in rows]

    def prefetch(self, slots: Iterable[int]) -> None:
        """Begin to bring snapshots that lie on another device."""
        for slot in slots:
            for ring in self.rings:
                ring.prefetch(slot)


@dataclass(frozen=True)
class WeightedSum:
    """A prediction that is ``sum_j weights[j] * S_j`` over snapshots of one site, the same for every row.

    Args:
        history: where the snapshots are.
        slots: which of them, one or more.
        weights: of each.
    """

    history: History
    slots: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def is_direct(self) -> bool:
        """Whether the snapshots can be added up as they lie: nothing has to be fetched or unpacked before."""
        return all(ring.is_direct for ring in self.history.rings)

    @property
    def nbytes(self) -> int:
        """What is allocated to make it: the sum, and what it is added up in; nothing for a snapshot as it lies."""
        total = 0
        for ring in self.history.rings:
            if self.weights == (1.0,):
                dtypes = {ring.dtype} - {ring.kept}
            else:
                dtypes = {ring.dtype, _wide(ring.kept)}
            total += math.prod(ring.shape) * sum(dtype.itemsize for dtype in dtypes)
        return total


def add_up(sums: Sequence[WeightedSum], rows: Sequence[int] | None = None) -> list[list[Tensor]]:
    """The leaves of each of these sums (of the given rows), in a few operations for all of them together.

    Args:
        sums: one or more, all with the same weights.
        rows: None for all.
    """
    rings = [(ring, found.slots) for found in sums for ring in found.history.rings]
    columns = [[ring.read(slots[j]) for ring, slots in rings] for j in range(len(sums[0].weights))]
    if rows is not None:
        columns = [[_take(snapshot, rows) for snapshot in column] for column in columns]
    leaves = iter(weighted_sums(columns, sums[0].weights, [ring.dtype for ring, _ in rings]))
    return [[next(leaves) for _ in found.history.rings] for found in sums]


def weighted_sum(snapshots: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    """``sum_j weights[j] * snapshots[j]``: `weighted_sums` of one feature.

    Args:
        snapshots: what is summed up, one or more.
        weights: of each.
        dtype: of the result; None: the snapshots' own.
    """
    dtype = snapshots[0].dtype if dtype is None else dtype
    return weighted_sums([[snapshot] for snapshot in snapshots], weights, [dtype])[0]


def weighted_sums(
    columns: Sequence[Sequence[Tensor]], weights: Sequence[float], dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """``sum_j weights[j] * columns[j][i]`` for every feature ``i``, accumulated in float32 (or wider).

    All features of a dtype go through the same few operations, so their number costs no time of its own; the numbers do
    not depend on what else is added up. A single weight of exactly 1 returns the snapshots themselves, without a copy
    where they are of the wanted dtype. Sums that are rounded at the end may lie in one piece of memory, each in its own
    part of it.

    Args:
        columns: for each weight, the snapshot of every feature.
        weights: one or more.
        dtypes: of the results.
    """
    terms = [(column, weight) for column, weight in zip(columns, weights, strict=True) if weight != 0.0]
    results = list(columns[0])
    for chosen in _alike((x.dtype, dtype, x.device) for x, dtype in zip(columns[0], dtypes, strict=True)):
        own = [([column[i] for i in chosen], weight) for column, weight in terms]
        made = _sums(own, dtypes[chosen[0]]) if own else [torch.zeros_like(results[i], dtype=dtypes[i]) for i in chosen]
        for i, total in zip(chosen, made, strict=True):
            results[i] = total
    return results


def _sums(terms: Sequence[tuple[list[Tensor], float]], dtype: torch.dtype) -> list[Tensor]:
    """The sums of snapshots of one dtype and device."""
    (newest, weight), *others = terms
    if not others and weight == 1.0:
        return _converted(newest, dtype)
    if newest[0].dtype in (torch.float16, torch.bfloat16):
        totals = _converted(newest, torch.float32)
        torch._foreach_mul_(totals, weight)
    else:
        totals = list(torch._foreach_mul(newest, weight))
    for snapshots, weight in others:
        torch._foreach_add_(totals, snapshots, alpha=weight)
    return _converted(totals, dtype)


def _converted(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Tensors of one dtype and device in another dtype (or themselves), each lying in memory as it does."""
    converted = list(tensors)
    if tensors[0].dtype == dtype:
        return converted
    orders = [axes_in_memory(tensor) for tensor in tensors]
    for chosen in _alike((x.shape, tuple(order)) for x, order in zip(tensors, orders, strict=True)):
        like = tensors[chosen[0]]

        def make(shape: tuple[int, ...], like: Tensor = like) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=like.device)

        places = stacked(make, len(chosen), like.shape, orders[chosen[0]]).unbind()
        for i, place in zip(chosen, places, strict=True):
            converted[i] = place
    torch._foreach_copy_(converted, tensors)
    return converted


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What snapshots of a dtype are added up in."""
    return dtype if dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32


def _alike(kinds: Iterable[Hashable]) -> Iterable[list[int]]:
    """Positions of equal values, together."""
    found: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        found.setdefault(kind, []).append(i)
    return found.values()


def _take(snapshot: Tensor, rows: Sequence[int]) -> Tensor:
    return snapshot.index_select(0, torch.tensor(rows, device=snapshot.device))
